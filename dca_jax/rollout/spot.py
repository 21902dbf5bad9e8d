"""Spot checks: what the steps of an episode did for the outcome, measured by the policy itself.

The policy goes on from the step boundaries of some episodes, and the verifier judges where it ends.
The difference of success from before a step to after it is an unbiased measurement of the step's
advantage, with much noise. No text can talk it into anything, and it knows nothing of the rest of
the episode that the step was taken from. Neighbouring steps share the boundary between them, and
often the answers too, so measuring whole episodes is cheaper than measuring scattered steps.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from dca_jax.checks import at_least, between
from dca_jax.episode import Check, Episode
from dca_jax.rollout.collect import Rollout
from dca_jax.rollout.prefixes import Continues, Prefix, Spent, continued


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
  """Answers that come through each step boundary, at least."""

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
) -> tuple[Rollout, Spent]:
  """The batch of `step` with its spot checks, and what was generated for them.

  An answer measures every boundary that it comes through, because what it writes from there on
  depends on nothing before. So the policy goes on from every other boundary first, and then from
  those that too few came through; a boundary's value is the mean over all that did. Where the
  policy writes a step once more, the same answers stand before and after it, and their luck cancels
  out. Where the verifier has no verdict on one side of a step, the step is not measured. An
  environment is the episode's own, from the same seed: its hidden luck is on both sides.
  """
  episodes = [*rollout.episodes]
  group = len(episodes) // len(rollout.prompt_lengths_P)
  share = np.inf if step <= config.first else config.share
  places = {
    i: [Prefix.of(rollout, i, step.start) for step in episodes[i].steps]
    for i in chosen(share, seed, episodes, group)
  }
  # By boundary the rewards of the answers that come through it, by their number.
  found: dict[Prefix, dict[int, float]] = {prefix: {} for own in places.values() for prefix in own}
  spent, number = Spent(), itertools.count()
  for turn in range(2):
    ahead = dict.fromkeys(prefix for own in places.values() for prefix in own[turn::2])
    begun = [prefix for prefix in ahead if len(found[prefix]) < config.answers]
    with_noise = policy._replace(noise=(*policy.noise, turn))
    further, more = continued(with_noise, rollout, begun, config.answers)
    spent = spent.plus(more)
    for prefix, answers in zip(begun, further, strict=True):
      for answer in (one for one in answers if one.outcome.judged):
        n = next(number)
        for through in found.keys() & {*answer.prefixes(prefix)}:
          found[through][n] = answer.outcome.reward
  for i, own in places.items():
    last = episodes[i].outcome
    end = {-n: last.reward for n in range(1, config.answers * last.judged + 1)}
    ends = itertools.pairwise([*(found[prefix] for prefix in own), end])
    checks = {k: _check(*pair) for k, pair in enumerate(ends) if all(pair)}
    episodes[i] = dataclasses.replace(episodes[i], checks=checks)
  return rollout._replace(episodes=episodes), spent


def _check(before: dict[int, float], after: dict[int, float]) -> Check:
  both = [n for n in before if n in after]
  first, second = (
    (*(side[n] for n in both), *(side[n] for n in side if n not in both))
    for side in (before, after)
  )
  return Check(first, second, len(both))
