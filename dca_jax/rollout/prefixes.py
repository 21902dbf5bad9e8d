"""Values of prefixes from the policy itself: how likely is success before each step is written?

`monte_carlo` samples further answers from every step boundary and counts the successes (VinePPO,
Kazemnejad et al. 2024): unbiased, blind to the rest of the answer, and paid for in generated tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from dca_jax.checks import at_least
from dca_jax.devices.processes import gather
from dca_jax.episode import Outcome, Problem, Review
from dca_jax.rollout.collect import Rollout
from dca_jax.rollout.sampler import Sampler
from dca_jax.rollout.steps import stop_length
from dca_jax.rollout.verify import verify
from dca_jax.tasks import Task
from dca_jax.tasks.tokenizer import text_of, token_bytes


class Continues(NamedTuple):
  """What further answers of the policy take."""

  sampler: Sampler
  params: Any
  key: jax.Array
  task: Task
  tokenizer: Any


@dataclasses.dataclass(frozen=True)
class Values:
  """The `value` section: where the prefix values of `potential` credit come from. A source is a
  subclass, which overrides what it needs."""

  source: str = "reviewer"
  """`reviewer`, `monte_carlo` or `learned`; or your own, MODULE:CLASS."""

  from_reviewer: ClassVar[bool] = False
  """Whether they are the reviewer's word."""

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
  outcomes, generated = continued(policy, rollout, [*numbers], continuations)
  values = [sum(o.reward for o in own) / continuations for own in outcomes]
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


def continued(
  policy: Continues, rollout: Rollout, prefixes: Sequence[Prefix], answers: int
) -> tuple[list[list[Outcome]], int]:
  """What became of further answers from each prefix, and how many tokens were generated.

  An answer gets as many tokens as it would have had. All processes call this together, each with
  prefixes of its own, none included.
  """
  sampler, params, key, task, tokenizer = policy
  episodes, prompts = rollout.episodes, (rollout.prompts_PxS, rollout.prompt_lengths_P)
  group, tokens_BxT = len(episodes) // len(prompts[1]), rollout.tokens_BxT
  begun = [(p, np.frombuffer(prefix, tokens_BxT.dtype)) for p, prefix in prefixes]

  # Of like lengths together, because a batch takes as long as its longest answer; the last batch is
  # filled up.
  order = sorted(range(len(begun)), key=lambda n: -len(begun[n][1]))
  outcomes: list[list[Outcome]] = [[] for _ in begun]
  generated, most = 0, sampler.config.max_tokens
  # All processes sample together, as often as the one with most prefixes needs.
  counts = gather("prefixes", len(begun))
  before, rows = sum(counts[: jax.process_index()]), len(episodes)
  for first in range(0, max(counts), rows):
    batch = np.resize(order[first : first + rows] or [0], rows)
    ids, lengths = _joined([begun[n] for n in batch] if begun else [], prompts, rows, most)
    tried: list[tuple[Problem, str, bool]] = []
    drawn = sampler(params, ids, lengths, before + batch, key, np.arange(answers))
    for row, n in enumerate(order[first : first + rows]):
      p, tokens = begun[n]
      for a in range(row * answers, (row + 1) * answers):
        length, room = int(drawn.lengths_B[a]), most - len(tokens)
        whole = np.concatenate([tokens, drawn.tokens_BxT[a, : min(length, room)]])
        stops = sampler.config.stop
        stop = stop_length(stops, token_bytes(tokenizer, whole)) if stops else None
        truncated = stop is None and (bool(drawn.truncated_B[a]) or length > room)
        problem = episodes[p * group].problem
        tried.append((problem, text_of(tokenizer, whole[:stop]), truncated))
        generated += min(length, room)
    for a, outcome in enumerate(verify(task, tried)):
      outcomes[order[first + a // answers]].append(outcome)
  return outcomes, generated


def _joined(
  begun: Sequence[tuple[int, np.ndarray]],
  prompts: tuple[np.ndarray, np.ndarray],
  rows: int,
  most: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Prompts with what was written after them, as token ids [B, S + most] and lengths [B]; rows that
  nothing is begun for hold a token that nobody reads."""
  ids = np.zeros((rows, prompts[0].shape[1] + most), np.int32)
  lengths = np.ones(rows, np.int32)
  for row, (p, tokens) in enumerate(begun):
    prompt = prompts[0][p, : prompts[1][p]]
    lengths[row] = len(prompt) + len(tokens)
    ids[row, : lengths[row]] = np.concatenate([prompt, tokens])
  return ids, lengths
