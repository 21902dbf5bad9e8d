"""Values of prefixes from the policy itself: how likely is success before each step is written?

`monte_carlo` samples further answers from every step boundary and counts the successes (VinePPO,
Kazemnejad et al. 2024): unbiased, blind to the rest of the answer, and paid for in generated
tokens.
"""

import bisect
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from dca_jax.checks import at_least
from dca_jax.devices.processes import gather
from dca_jax.episode import Episode, Outcome, Review
from dca_jax.rollout.collect import Rollout
from dca_jax.rollout.engine import Wanted
from dca_jax.rollout.sampler import Sampler
from dca_jax.rollout.verify import verify
from dca_jax.tasks.tokenizer import text_of


class Continues(NamedTuple):
  """What further answers of the policy take."""

  sampler: Sampler
  params: Any
  noise: tuple[int, ...]
  """Of the step; see `Engine.stream`."""


@dataclasses.dataclass(frozen=True)
class Values:
  """The `value` section: where the prefix values of `potential` credit come from. A source is a
  subclass, which overrides what it needs."""

  source: str = "reviewer"
  """`reviewer`, `monte_carlo`, `learned` or `environment`; or your own, MODULE:CLASS."""

  from_reviewer: ClassVar[bool] = False
  """Whether they are the reviewer's word."""
  needs: ClassVar[str] = ""
  """What the task must offer."""

  @property
  def answers(self) -> int:
    """How many further answers of the policy it samples for each prefix."""
    return 0

  def init(self, width: int, seed: int) -> Any:
    """What training keeps of it, for hidden states of `width`; None where it keeps nothing."""
    return None

  def ask(
    self, policy: Continues, rollout: Rollout, reviews: list[Review]
  ) -> tuple[list[Review], int]:
    """The reviews with values in them, and how many tokens were generated for that."""
    return reviews, 0

  def read(self, policy, head, params, batch, review) -> tuple[Any, Any]:
    """On the devices: the review arrays with values in them, and what `learn` wants to know."""
    return review, None

  def learn(self, head, memory, batch, rewards_PxG) -> tuple[Any, dict[str, jax.Array]]:
    """After the update: what training keeps from now on, and metrics."""
    return head, {}


@dataclasses.dataclass(frozen=True)
class FromReviewer(Values):
  """The reviewer's own values."""

  from_reviewer: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class FromEnvironment(Values):
  """The environment's scores of the state: a step's is that of the state before its turn, so their
  differences tell what a turn brought, and add up to the outcome."""

  source: str = "environment"

  needs: ClassVar[str] = "environment"

  def ask(self, policy, rollout, reviews):
    return [Review("ok", values=scores_before(episode)) for episode in rollout.episodes], 0


def scores_before(episode: Episode) -> tuple[float, ...]:
  """The score of the state before the turn of each step; not a number before the first."""
  ends = [end for _, end, segment in episode.spans() if segment.sampled]
  scores = (math.nan, *episode.outcome.progress)
  return tuple(scores[bisect.bisect_right(ends, step.start)] for step in episode.steps)


@dataclasses.dataclass(frozen=True)
class MonteCarlo(Values):
  """Successes of further answers from every step boundary."""

  source: str = "monte_carlo"
  continuations: int = 4
  """Answers sampled from each step boundary."""

  @property
  def answers(self) -> int:
    return self.continuations

  def check(self) -> dict[str, str]:
    return at_least(1, self, "continuations")

  def ask(self, policy, rollout, reviews):
    return monte_carlo(self.continuations, policy, rollout)


def monte_carlo(
  continuations: int, policy: Continues, rollout: Rollout
) -> tuple[list[Review], int]:
  """Reviews that hold a value for each step of each episode, and how many tokens were generated.

  A prefix that several episodes share is continued once.
  """
  group = len(rollout.episodes) // len(rollout.prompt_lengths_P)
  numbers: dict[Prefix, int] = {}
  places = []
  for i, episode in enumerate(rollout.episodes):
    prefixes = [Prefix.of(rollout, i // group, i, step.start) for step in episode.steps]
    places.append([numbers.setdefault(prefix, len(numbers)) for prefix in prefixes])
  further, generated = continued(policy, rollout, [*numbers], continuations)
  values = [sum(f.outcome.reward for f in own) / continuations for own in further]
  reviews = [Review("ok", values=tuple(values[n] for n in own)) for own in places]
  return reviews, generated


class Prefix(NamedTuple):
  """Where further answers begin: a problem of the batch, by its row, and what is written."""

  problem: int
  tokens: bytes
  """Those of the batch's rows, so that equal prefixes are equal."""

  @classmethod
  def of(cls, rollout: Rollout, problem: int, episode: int, length: int) -> "Prefix":
    return cls(problem, rollout.tokens_BxT[episode, :length].tobytes())


class Further(NamedTuple):
  """A further answer: what was written after its prefix, and what became of it."""

  tokens: np.ndarray
  outcome: Outcome

  def prefixes(self, begun: Prefix) -> Iterator[Prefix]:
    """All that it comes through, from where it was `begun` on."""
    whole, size = begun.tokens + self.tokens.tobytes(), self.tokens.itemsize
    for end in range(len(begun.tokens), len(whole) + 1, size):
      yield Prefix(begun.problem, whole[:end])


def continued(
  policy: Continues, rollout: Rollout, prefixes: Sequence[Prefix], answers: int
) -> tuple[list[list[Further]], int]:
  """Further answers from each prefix, and how many tokens were generated.

  An answer gets as many tokens as it would have had. All processes call this together, each with
  prefixes of its own, none included.
  """
  counts = gather("prefixes", len(prefixes))
  if not prefixes:
    return [], 0
  sampler, params, noise = policy
  begun = [(p, np.frombuffer(tokens, rollout.tokens_BxT.dtype)) for p, tokens in prefixes]
  most, tokenizer = sampler.config.max_tokens, sampler.tokenizer
  group = len(rollout.episodes) // len(rollout.prompt_lengths_P)
  problems = [rollout.episodes[p * group].problem for p, _ in begun]
  begun_P = np.array([len(tokens) for _, tokens in begun], np.int32)
  first = sum(counts[: jax.process_index()])  # So that no two have the same noise.
  wanted = Wanted(
    *_joined(begun, rollout, most),
    np.arange(first, first + len(begun)),
    np.broadcast_to(np.arange(answers), (len(begun), answers)),
    most - begun_P,
    begun_P,
  )
  attempts: list[Any] = [None] * (len(begun) * answers)
  written: list[Any] = [*attempts]
  for sample in sampler.engine.stream(params, _filled(wanted, len(rollout.episodes)), noise):
    p = sample.row // answers
    if p >= len(begun):
      continue
    whole = np.concatenate([begun[p][1], sample.tokens])
    attempts[sample.row] = problems[p], text_of(tokenizer, whole), sample.truncated
    written[sample.row] = np.asarray(sample.tokens, rollout.tokens_BxT.dtype)
  further = [*map(Further, written, verify(sampler.task, attempts))]
  generated = sum(map(len, written))
  return [further[i : i + answers] for i in range(0, len(further), answers)], generated


def _filled(wanted: Wanted, rows: int) -> Wanted:
  """What is wanted, and where that is little so many samples of one token that their number is a
  sixteenth or a quarter of `rows` or all of them: an engine has a program for each number."""
  count, answers = wanted.numbers_PxG.shape
  most = max(1, rows // answers)
  size = next((n for n in (most // 16, most // 4, most) if n >= count), count)
  added = size - count
  filled = Wanted(*(np.pad(x, [(0, added)] + [(0, 0)] * (x.ndim - 1), "edge") for x in wanted))
  filled.limits_P[count:] = 1
  return filled


def _joined(
  begun: Sequence[tuple[int, np.ndarray]], rollout: Rollout, most: int
) -> tuple[np.ndarray, np.ndarray]:
  """Prompts with what was written after them, as token ids [P, S + most] and lengths [P]."""
  ids = np.zeros((len(begun), rollout.prompts_PxS.shape[1] + most), np.int32)
  lengths = np.zeros(len(begun), np.int32)
  for row, (p, tokens) in enumerate(begun):
    prompt = rollout.prompts_PxS[p, : rollout.prompt_lengths_P[p]]
    lengths[row] = len(prompt) + len(tokens)
    ids[row, : lengths[row]] = np.concatenate([prompt, tokens])
  return ids, lengths
