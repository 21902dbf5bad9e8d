"""The metrics of a step, put together from what each process saw."""

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dca_jax.credit import Advantages, Scheme
from dca_jax.credit.calibrated import SEEN, seen_of
from dca_jax.episode import ROLES, Episode, Outcome
from dca_jax.intervals import Estimate
from dca_jax.review.types import Request, Usage
from dca_jax.rollout import Rollout, Spent
from dca_jax.rollout.rewrites import Proposals


class Clock:
  """Seconds between laps."""

  def __init__(self) -> None:
    self.seconds: dict[str, float] = {}
    self._last = time.perf_counter()

  def lap(self, name: str) -> None:
    now = time.perf_counter()
    self.seconds[name], self._last = now - self._last, now


class Tally(NamedTuple):
  """The metrics of a step as one process sees them, to be put together by `merge`."""

  means: dict[str, tuple[float, float]]
  """Totals and counts."""
  sums: dict[str, float]
  largest: dict[str, float]
  reviewer: dict[str, float]
  """What the reviewer says of itself."""


class Credited(NamedTuple):
  """What credit assignment made of a batch, on the host."""

  values_BxK: np.ndarray
  """Of the prefixes before each step; not a number where there is none."""
  advantages: Advantages
  continued: Spent
  """What was generated for prefix values."""
  spot: Spent | None
  """For spot checks; None where the run makes none."""
  proposals: Proposals | None = None
  """Of rewrites; None where the run has none."""

  @property
  def further(self) -> Spent:
    """All of what was generated beside the episodes."""
    others = [self.spot, self.proposals and self.proposals.spent]
    return functools.reduce(Spent.plus, filter(None, others), self.continued)

  def finished(self, episodes: Sequence[Episode]) -> list[Episode]:
    """The batch's reviewed episodes with all that happened to them."""
    own_PxG, tokens_BxT = self.advantages
    rows = self.values_BxK, own_PxG.reshape(-1), tokens_BxT
    return [
      dataclasses.replace(
        episode,
        values=values_K[: len(episode.steps)].astype(float).tolist(),
        advantage=float(own),
        credit=credit_T[: len(episode.tokens)].tolist(),
      )
      for episode, values_K, own, credit_T in zip(episodes, *rows, strict=True)
    ]


def tally(
  scheme: Scheme,
  rollout: Rollout,
  credited: Credited,
  reviewer: dict[str, float],
  clock: Clock,
  labels: Callable[[Request], Sequence[str]] | None = None,
) -> Tally:
  """The metrics of this process's part of a step; `reviewer` is what that says of itself, `labels`
  the task's true roles of steps."""
  largest = {f"seconds/{key}": value for key, value in clock.seconds.items()}
  if rollout.environment_seconds:
    largest["seconds/environments"] = rollout.environment_seconds
  largest["seconds/step"] = total = sum(clock.seconds.values())
  means, more = _credit(scheme, rollout, credited)
  means |= _outcomes(rollout) | _reviews(rollout)
  if labels and rollout.environment_seconds:  # Of turns.
    true = [role for episode in rollout.episodes for role in labels(Request.of(episode))]
    needless = sum(role in ("redundant", "irrelevant") for role in true)
    means["train/needless"] = needless, len(rollout.episodes)
  further = credited.further
  means["train/unjudged_further"] = further.unjudged, further.answers
  sums = {
    "train/completions": float(len(rollout.outcomes)),
    "train/generated_tokens": float(rollout.generated + further.tokens),
    "train/tokens_per_second": float(rollout.sampled_BxT.sum() / total),
  }
  if credited.spot is not None:
    effects = [check.effect for episode in rollout.episodes for check in episode.checks.values()]
    sums |= {"spot/steps": float(len(effects)), "spot/tokens": float(credited.spot.tokens)}
    means["spot/effect"] = sum(effects), len(effects)
  if rollout.unfinished is not None:
    ages = [episode.age for episode in rollout.episodes]
    means |= {
      "rollout/age": (sum(ages), len(ages)),
      "rollout/stale": (rollout.stale, rollout.sampled_BxT.sum()),
    }
    largest["rollout/age_max"] = max(ages)
  if credited.proposals is not None:
    kept, n = sum(e.rewrite is not None for e in rollout.episodes), len(rollout.episodes)
    proposed, spent = credited.proposals
    counts = {"proposed": proposed, "kept": kept, "tokens": spent.tokens}
    sums |= {f"rewrite/{key}": float(count) for key, count in counts.items()}
    means["rewrite/share"] = kept, n + kept
  said = {key: (float(x), float(count)) for key, (x, count) in means.items()}
  return Tally(said, sums, largest | more, reviewer)


Means = dict[str, tuple[float, float]]


def _outcomes(rollout: Rollout) -> Means:
  sampled, n = rollout.outcomes, len(rollout.episodes)
  groups = rollout.rewards_B.reshape(len(rollout.prompt_lengths_P), -1).tolist()
  named = {name for o in sampled for name in o.parts}
  seen = [kind for episode in rollout.episodes for kind in seen_of(episode)]
  turns = sum(s.sampled for e in rollout.episodes for s in e.segments)
  return {
    "train/reward": (sum(o.reward for o in sampled), len(sampled)),
    "train/accuracy": (sum(o.correct for o in sampled), len(sampled)),
    "train/truncated": (sum(o.truncated for o in sampled), len(sampled)),
    "train/unjudged": (sum(not o.judged for o in sampled), len(sampled)),
    **{f"verifier/{name}": _part(name, sampled) for name in sorted(named)},
    "train/uncut": (rollout.uncut, n),
    "train/length": (rollout.sampled_BxT.sum(), n),
    # Of a policy that performs, these grow; in steps an episode.
    "train/repeats": (seen.count(SEEN.index("repeat")), n),
    "train/checks": (seen.count(SEEN.index("check")), n),
    "train/mixed_groups": (sum(len(set(group)) > 1 for group in groups), len(groups)),
    **({"train/turns": (turns, n)} if rollout.environment_seconds else {}),
  }


def _part(name: str, outcomes: Sequence[Outcome]) -> tuple[float, int]:
  values = [o.parts[name] for o in outcomes if name in o.parts]
  return sum(values), len(values)


def _reviews(rollout: Rollout) -> Means:
  reviews = [episode.review for episode in rollout.episodes]
  roles = [role for review in reviews for role in review.roles]
  # 1 where all steps weigh the same, 0 where one has everything.
  weights = [
    np.array(r.weights) / sum(r.weights)
    for r in reviews
    if len(r.weights) > 1 and sum(r.weights) > 0
  ]
  evenness = [-np.sum(w * np.log(np.where(w > 0, w, 1.0))) / np.log(len(w)) for w in weights]
  count = sum(request is not None for asked in rollout.asked for request in asked.requests)
  return {
    "review/asked": (count, len(reviews)),
    "review/ok": (sum(review.status == "ok" for review in reviews), count),
    "review/weight_entropy": (sum(evenness), len(evenness)),
    **{f"review/{role}": (roles.count(role), len(roles)) for role in ROLES},
  }


def _credit(scheme: Scheme, rollout: Rollout, credited: Credited) -> tuple[Means, dict[str, float]]:
  """Means of credit and values, and the largest error of conservation."""
  sampled_BxT, values_BxK = rollout.sampled_BxT, credited.values_BxK
  tokens_BxT = credited.advantages.tokens_BxT
  counted = sampled_BxT.sum(1) if scheme.conserve == "tokens" else sampled_BxT.shape[1]
  mass_B = credited.advantages.episodes_PxG.reshape(-1).astype(np.float64) * counted
  known = ~np.isnan(values_BxK)
  errors = np.square(values_BxK - rollout.rewards_B[:, None])
  means: Means = {
    "credit/moved": (np.abs(tokens_BxT).sum(), np.abs(mass_B).sum()),
    "value/brier": (errors.sum(where=known), known.sum()),
  }
  if not scheme.conserves:  # It keeps a sum of its own, or none.
    return means, {}
  spread = np.abs(tokens_BxT.sum(1, dtype=np.float64) - mass_B)
  largest = float((spread / np.maximum(1.0, np.abs(mass_B))).max())
  return means, {"credit/conservation_error": largest}


# Means that say nothing where they are over nothing; of the others it is 0.
_LEFT_OUT = ("review/weight_entropy", "value/brier", "spot/effect", "train/unjudged_further")
# What of a reviewer's metrics adds up over processes; the rest are shares and medians.
_ADD_UP = {field.name for field in dataclasses.fields(Usage)} | {"dollars_spent", "concurrency"}


def merge(tallies: Sequence[Tally]) -> dict[str, float]:
  """The metrics of a step over all processes."""
  merged: dict[str, float] = {}
  for key in dict.fromkeys(key for tally in tallies for key in tally.means):
    said = [tally.means.get(key, (0, 0)) for tally in tallies]
    totals, counts = (sum(x) for x in zip(*said, strict=True))
    if counts or key not in _LEFT_OUT:
      merged[key] = totals / counts if counts else 0.0
  merged |= {key: sum(tally.sums[key] for tally in tallies) for key in tallies[0].sums}
  merged |= {key: max(tally.largest[key] for tally in tallies) for key in tallies[0].largest}
  for key in sorted({key for tally in tallies for key in tally.reviewer}):
    told = [tally.reviewer[key] for tally in tallies if key in tally.reviewer]
    name = re.sub(r"_\d$", "", key.rpartition("/")[2])  # The number is that of a panel's member.
    merged[key] = sum(told) if name in _ADD_UP else sum(told) / len(told)
  return merged


def waits(tallies: Sequence[Tally]) -> dict[str, float]:
  """Seconds that each process waited for the slowest in a step, which they begin together and end
  in one update; nothing where there is one process."""
  busy = [said.largest["seconds/step"] - said.largest["seconds/update"] for said in tallies]
  waited = {f"seconds/wait_{p}": max(busy) - own for p, own in enumerate(busy)}
  return waited if len(busy) > 1 else {}


def eval_metrics(scores: dict[str, Estimate]) -> dict[str, float]:
  flat: dict[str, float] = {}
  for name, e in scores.items():
    flat |= {f"eval/{name}": e.value, f"eval/{name}_low": e.low, f"eval/{name}_high": e.high}
  return flat
