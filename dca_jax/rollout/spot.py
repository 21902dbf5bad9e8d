"""Spot checks: what the steps of an episode did for the outcome, measured by the policy itself.

The policy goes on from every step boundary of some episodes, and the verifier judges where it ends.
The difference of success from before a step to after it is an unbiased measurement of the step's
advantage, with much noise. No text can talk it into anything, and it knows nothing of the rest of
the episode that the step was taken from. Neighbouring steps share the boundary between them, so
measuring whole episodes takes half as many answers as measuring scattered steps.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dca_jax.checks import at_least, between
from dca_jax.episode import Check, Episode, Outcome
from dca_jax.rollout.collect import Rollout
from dca_jax.rollout.prefixes import Continues, Prefix, continued


@dataclasses.dataclass(frozen=True)
class SpotConfig:
  """The `spot` section."""

  share: float = 0.0
  """Share of the episodes whose steps are measured, of those that credit can move: with several
  steps, in groups whose rewards differ. Within a group an episode that did better than the rest is
  as likely as one that did worse, however few there are, because what is learnt of the two is kept
  apart. 0 measures none."""
  first: int = 0
  """In so many training steps, the first ones of a run, all of these episodes are measured, so that
  what is learnt from checks is known soon."""
  answers: int = 1
  """Answers sampled from each step boundary."""

  def check(self) -> dict[str, str]:
    return between(0, 1, self, "share") | at_least(1, self, "answers") | at_least(0, self, "first")

  def unused(self) -> dict[str, str]:
    return {} if self.share else dict.fromkeys(("first", "answers"), "spot.share is 0")


def chosen(share: float, seed: int, episodes: Sequence[Episode], group: int) -> list[int]:
  """The episodes to measure, known before anything is reviewed: a function of the seed, of what an
  episode is called, and of the outcomes."""
  drawn = []
  for i, episode in enumerate(episodes):
    first = i // group * group
    rewards = np.array([other.outcome.reward for other in episodes[first : first + group]])
    better = rewards > rewards.mean()
    if episode.trained and len(episode.steps) > 1 and np.ptp(rewards) > 0:
      alike = (better == better[i - first]).sum()
      dice = np.random.default_rng([seed, *episode.id.encode()])
      drawn += [i] if dice.random() < share * group / (2 * alike) else []
  return drawn


def measured(
  config: SpotConfig, seed: int, step: int, policy: Continues, rollout: Rollout
) -> tuple[Rollout, int]:
  """The batch of `step` with its spot checks, and how many tokens were generated for them.

  A prefix that several episodes share is continued once. Where the verifier has no verdict on one
  side of a step, the step is not measured.
  """
  episodes = [*rollout.episodes]
  group = len(episodes) // len(rollout.prompt_lengths_P)
  share = np.inf if step <= config.first else config.share
  drawn = chosen(share, seed, episodes, group)
  numbers: dict[Prefix, int] = {}
  places = {}
  for i in drawn:
    prefixes = [Prefix.of(rollout, i // group, i, step.start) for step in episodes[i].steps]
    places[i] = [numbers.setdefault(prefix, len(numbers)) for prefix in prefixes]
  outcomes, generated = continued(policy, rollout, [*numbers], config.answers)
  for i in drawn:
    ends = [_rewards(outcomes[n]) for n in places[i]]
    ends.append(_rewards([episodes[i].outcome] * config.answers))
    checks = {k: Check(*ends[k : k + 2]) for k in range(len(places[i])) if all(ends[k : k + 2])}
    episodes[i] = dataclasses.replace(episodes[i], checks=checks)
  return rollout._replace(episodes=episodes), generated


def _rewards(outcomes: Sequence[Outcome]) -> tuple[float, ...]:
  return tuple(outcome.reward for outcome in outcomes if outcome.judged)
