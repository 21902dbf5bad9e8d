"""Values of prefixes from the policy itself: how likely is success before each step is written?

`monte_carlo` samples further answers from every step boundary and counts the successes (VinePPO,
Kazemnejad et al. 2024): unbiased, blind to the rest of the answer, and paid for in generated
tokens. In the middle of an episode with an environment, that is begun anew from the episode's seed
and hears the same turns once more, before the policy goes on.
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
from dca_jax.episode import Episode, Outcome, Review, Segment
from dca_jax.rollout.collect import Rollout
from dca_jax.rollout.engine import Wanted
from dca_jax.rollout.sampler import Sampler
from dca_jax.rollout.turns import Played, Seat, outcomes_of, seated


class Spent(NamedTuple):
  """What further answers took."""

  tokens: int = 0
  """Generated for them."""
  answers: int = 0
  unjudged: int = 0
  """Of the answers; an environment could not be brought to where they begin, or failed, or the
  verifier has no verdict."""

  def plus(self, other: "Spent") -> "Spent":
    return Spent(*(a + b for a, b in zip(self, other, strict=True)))


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
  ) -> tuple[list[Review], Spent]:
    """The reviews with values in them, and what was generated for that."""
    return reviews, Spent()

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
    values = map(scores_before, rollout.episodes)
    return [Review("ok", values=own) for own in values], Spent()


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
) -> tuple[list[Review], Spent]:
  """Reviews that hold a value for each step of each episode, and what was generated.

  A prefix that several episodes share is continued once. Where no answer has a verdict, the value
  is not a number. Where the environment has failed, it is not asked again.
  """
  numbers: dict[Prefix, int] = {}
  places = []
  for i, episode in enumerate(rollout.episodes):
    steps = episode.steps if episode.seed is None or episode.outcome.judged else ()
    prefixes = [Prefix.of(rollout, i, step.start) for step in steps]
    places.append([numbers.setdefault(prefix, len(numbers)) for prefix in prefixes])
  further, spent = continued(policy, rollout, [*numbers], continuations)
  rewards = [[f.outcome.reward for f in own if f.outcome.judged] for own in further]
  values = [sum(own) / len(own) if own else math.nan for own in rewards]
  told = [tuple(values[n] for n in own) for own in places]
  return [Review("ok", values=own) if own else Review("none") for own in told], spent


class Prefix(NamedTuple):
  """Where further answers begin."""

  episode: int
  """Of the batch, that has the same problem, and the same environment where it has one."""
  tokens: bytes
  """Those of the batch's rows, so that equal prefixes are equal."""

  @classmethod
  def of(cls, rollout: Rollout, episode: int, length: int) -> "Prefix":
    """That before a place of an episode; all of a group that are written so are one, except with
    environments, which may differ in what nobody has seen."""
    group = len(rollout.episodes) // len(rollout.prompt_lengths_P)
    alone = rollout.episodes[episode].seed is not None
    first = episode if alone else episode // group * group
    return cls(first, rollout.tokens_BxT[episode, :length].tobytes())


class Further(NamedTuple):
  """A further answer: what follows its prefix, and what became of it."""

  tokens: np.ndarray
  outcome: Outcome

  def prefixes(self, begun: Prefix) -> Iterator[Prefix]:
    """All that it comes through, from where it was `begun` on."""
    whole, size = begun.tokens + self.tokens.tobytes(), self.tokens.itemsize
    for end in range(len(begun.tokens), len(whole) + 1, size):
      yield Prefix(begun.episode, whole[:end])


def continued(
  policy: Continues, rollout: Rollout, prefixes: Sequence[Prefix], answers: int
) -> tuple[list[list[Further]], Spent]:
  """Further answers from each prefix, and what they took.

  An answer gets as many tokens as it would have had. All processes call this together, each with
  prefixes of its own, none included.
  """
  counts = gather("prefixes", len(prefixes))
  if not prefixes:
    return [], Spent()
  begun = [np.frombuffer(tokens, rollout.tokens_BxT.dtype) for _, tokens in prefixes]
  first = sum(counts[: jax.process_index()])  # So that no two have the same noise.
  ids = np.arange(first, first + len(begun))
  acts = rollout.episodes[prefixes[0].episode].seed is not None
  go_on = _in_environments if acts else _written_on
  attempts = sorted(go_on(policy, rollout, prefixes, ids, answers), key=lambda a: a.row)
  problems = [rollout.episodes[i].problem for i, _ in prefixes for _ in range(answers)]
  outcomes = outcomes_of(policy.sampler, problems, attempts)
  further, tokens = [], 0
  for attempt, outcome in zip(attempts, outcomes, strict=True):
    length = len(begun[attempt.row // answers])
    after = np.array(attempt.tokens[length:], rollout.tokens_BxT.dtype)
    further.append(Further(after, outcome))
    tokens += attempt.sampled_after(length)
  spent = Spent(tokens, len(further), sum(not outcome.judged for outcome in outcomes))
  return [further[i : i + answers] for i in range(0, len(further), answers)], spent


def _in_environments(
  policy: Continues, rollout: Rollout, prefixes: Sequence[Prefix], ids: np.ndarray, answers: int
) -> Iterator[Played]:
  """The answers of `continued`, where environments are to be brought to the prefixes."""
  group = len(rollout.episodes) // len(rollout.prompt_lengths_P)
  seats = []
  for n, (i, tokens) in enumerate(prefixes):
    episode, p = rollout.episodes[i], i // group
    assert episode.seed is not None
    prompt = rollout.prompts_PxS[p, : rollout.prompt_lengths_P[p]]
    before = episode.before(len(tokens) // rollout.tokens_BxT.itemsize)
    seats += [
      Seat(n * answers + k, episode.problem, prompt, int(ids[n]), k, episode.seed, before)
      for k in range(answers)
    ]
  return seated(policy.sampler, policy.params, seats, policy.noise)


def _written_on(
  policy: Continues, rollout: Rollout, prefixes: Sequence[Prefix], ids: np.ndarray, answers: int
) -> Iterator[Played]:
  """The answers of `continued`, where a prefix is all that there is."""
  group = len(rollout.episodes) // len(rollout.prompt_lengths_P)
  begun = [(i // group, np.frombuffer(tokens, rollout.tokens_BxT.dtype)) for i, tokens in prefixes]
  begun_P = np.array([len(tokens) for _, tokens in begun], np.int32)
  sampler, most = policy.sampler, policy.sampler.config.max_tokens
  wanted = Wanted(
    *_joined(begun, rollout, most),
    ids,
    np.broadcast_to(np.arange(answers), (len(begun), answers)),
    most - begun_P,
    begun_P,
  )
  wanted = _filled(wanted, len(rollout.episodes))
  for sample in sampler.engine.stream(policy.params, wanted, policy.noise):
    if sample.row // answers < len(begun):
      tokens = np.concatenate([begun[sample.row // answers][1], sample.tokens])
      # What the policy thinks of what it wrote before, nobody asks here.
      written = Segment(tokens, True, np.zeros(len(tokens), np.float32))
      yield Played(sample.row, (written,), sample.truncated)


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
