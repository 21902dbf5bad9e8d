"""Spot checks: what a step did for the outcome, measured by the policy itself.

The policy goes on from before a step and from after it, and the verifier judges where it ends. The
difference of success is an unbiased measurement of the step's advantage, with much noise. No text
can talk it into anything, and it knows nothing of the rest of the episode that the step was taken
from.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dca_jax.checks import at_least, between
from dca_jax.episode import Check, Episode, Outcome
from dca_jax.rollout.collect import Rollout
from dca_jax.rollout.prefixes import Continues, Prefix, continued


@dataclasses.dataclass(frozen=True)
class SpotConfig:
  """The `spot` section."""

  share: float = 0.0
  """Chance that a step is measured, of the steps that credit can move: those of episodes with
  several, in groups whose rewards differ. 0 measures none."""
  answers: int = 1
  """Answers sampled from before a step, and as many from after it."""

  def check(self) -> dict[str, str]:
    return between(0, 1, self, "share") | at_least(1, self, "answers")

  def unused(self) -> dict[str, str]:
    return {} if self.share else {"answers": "spot.share is 0"}


class Place(NamedTuple):
  """A step of a batch."""

  episode: int
  step: int


def chosen(config: SpotConfig, seed: int, episodes: Sequence[Episode], group: int) -> list[Place]:
  """The steps to measure, known before anything is reviewed: a function of the seed, of what the
  episode is called, and of the outcomes."""
  places = []
  for i, episode in enumerate(episodes):
    first = i // group * group
    rewards = {other.outcome.reward for other in episodes[first : first + group]}
    if episode.trained and len(episode.steps) > 1 and len(rewards) > 1:
      dice = np.random.default_rng([seed, *episode.id.encode()])
      drawn = np.flatnonzero(dice.random(len(episode.steps)) < config.share)
      places += [Place(i, int(k)) for k in drawn]
  return places


def measured(
  config: SpotConfig, seed: int, policy: Continues, rollout: Rollout
) -> tuple[Rollout, int]:
  """The batch with its spot checks, and how many tokens were generated for them.

  A prefix that several steps share is continued once. Where the verifier has no verdict on one
  side of a step, the step is not measured.
  """
  episodes = [*rollout.episodes]
  group = len(episodes) // len(rollout.prompt_lengths_P)
  places = chosen(config, seed, episodes, group)
  numbers: dict[Prefix, int] = {}

  def number(i: int, length: int) -> int:
    return numbers.setdefault(Prefix.of(rollout, i // group, i, length), len(numbers))

  sides = []
  for i, k in places:
    here, *later = episodes[i].steps[k : k + 2]
    sides.append((number(i, here.start), number(i, later[0].start) if later else None))
  outcomes, generated = continued(policy, rollout, [*numbers], config.answers)
  for (i, k), (before, after) in zip(places, sides, strict=True):
    ended = outcomes[after] if after is not None else [episodes[i].outcome] * config.answers
    check = Check(_rewards(outcomes[before]), _rewards(ended))
    if all(check):
      episodes[i] = dataclasses.replace(episodes[i], checks={**episodes[i].checks, k: check})
  return rollout._replace(episodes=episodes), generated


def _rewards(outcomes: Sequence[Outcome]) -> tuple[float, ...]:
  return tuple(outcome.reward for outcome in outcomes if outcome.judged)
