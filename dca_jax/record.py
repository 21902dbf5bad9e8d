"""What a step leaves behind: trajectories and metrics."""

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dca_jax.credit import CreditConfig
from dca_jax.episode import ROLES
from dca_jax.review import Review as HostReview
from dca_jax.review.types import Usage
from dca_jax.rollout import Trajectory
from dca_jax.rollout.collect import Advantages, Begun
from dca_jax.rollout.evaluate import Estimate


def trajectories(begun: Begun, reviews: list[HostReview], values_BxK, advantages: Advantages):
  rollout, completion_advantages = begun.rollout, advantages.completions_PxG.reshape(-1)
  for i, (request, spans, review) in enumerate(zip(begun.requests, begun.spans, reviews, strict=True)):
    problem = rollout.problems[i * len(rollout.problems) // len(reviews)]
    length = int(rollout.samples.lengths_B[i])
    steps: list[dict] = []
    for k, ((start, end), text) in enumerate(zip(spans, request.steps, strict=True)):
      steps.append({"start": start, "end": end, "text": text})
      if review.roles:
        steps[k] |= {"role": review.roles[k], "weight": review.weights[k]}
      if not math.isnan(value := float(values_BxK[i, k])):
        steps[k]["value"] = value
    yield Trajectory(
      id=request.id,
      problem=problem.id,
      prompt=problem.prompt,
      answer=problem.answer,
      tokens=rollout.samples.tokens_BxT[i, :length].tolist(),
      steps=steps,
      **dataclasses.asdict(rollout.outcomes[i]),
      review=review.status,
      model=review.model,
      trained=bool(rollout.trained_B[i]),
      advantage=float(completion_advantages[i]),
      credit=advantages.tokens_BxT[i, :length].tolist(),
    )


class Clock:
  """Seconds between laps."""

  def __init__(self):
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


def tally(
  credit: CreditConfig,
  begun: Begun,
  continued: int,
  rewards_B,
  reviews: list[HostReview],
  values_BxK,
  advantages: Advantages,
  reviewer: dict[str, float],
  clock: Clock,
) -> Tally:
  samples, sampled = begun.rollout.samples, begun.rollout.sampled
  n, asked = len(rewards_B), sum(begun.asked)
  roles = [role for review in reviews for role in review.roles]
  counted = samples.lengths_B if credit.conserve == "tokens" else samples.tokens_BxT.shape[1]
  mass = advantages.completions_PxG.reshape(-1).astype(np.float64) * counted
  # 1 where all steps weigh the same, 0 where one has everything.
  weights = [np.array(r.weights) / sum(r.weights) for r in reviews if len(r.weights) > 1 and sum(r.weights) > 0]
  evenness = [-np.sum(w * np.log(np.where(w > 0, w, 1.0))) / np.log(len(w)) for w in weights]
  largest = {f"seconds/{key}": value for key, value in clock.seconds.items()}
  largest["seconds/step"] = total = sum(clock.seconds.values())
  if credit.scheme in ("uniform", "weighted", "signed"):  # The others keep sums of their own, or none.
    spread = np.abs(advantages.tokens_BxT.sum(1, dtype=np.float64) - mass)
    largest["credit/conservation_error"] = float((spread / np.maximum(1.0, np.abs(mass))).max())
  known = ~np.isnan(values_BxK)
  groups = rewards_B.reshape(len(begun.rollout.problems), -1).tolist()

  def parts(name: str) -> tuple[float, int]:
    values = [o.parts[name] for o in sampled if name in o.parts]
    return sum(values), len(values)

  means = {
    "train/reward": (sum(o.reward for o in sampled), len(sampled)),
    "train/accuracy": (sum(o.correct for o in sampled), len(sampled)),
    "train/truncated": (sum(o.truncated for o in sampled), len(sampled)),
    "train/unjudged": (sum(not o.judged for o in sampled), len(sampled)),
    **{f"verifier/{name}": parts(name) for name in sorted({name for o in sampled for name in o.parts})},
    "train/uncut": (begun.uncut, n),
    "train/length": (samples.lengths_B.sum(), n),
    "train/mixed_groups": (sum(len(set(group)) > 1 for group in groups), len(groups)),
    "review/asked": (asked, n),
    "review/ok": (sum(review.status == "ok" for review in reviews), asked),
    "review/weight_entropy": (sum(evenness), len(evenness)),
    **{f"review/{role}": (roles.count(role), len(roles)) for role in ROLES},
    "credit/moved": (np.abs(advantages.tokens_BxT).sum(), np.abs(mass).sum()),
    "value/brier": (np.square(values_BxK - rewards_B[:, None]).sum(where=known), known.sum()),
  }
  sums = {
    "train/completions": float(len(sampled)),
    "train/generated_tokens": float(begun.rollout.generated + continued),
    "train/tokens_per_second": float(samples.lengths_B.sum() / total),
  }
  return Tally({key: (float(x), float(count)) for key, (x, count) in means.items()}, sums, largest, reviewer)


# Means that say nothing where they are over nothing; of the others it is 0.
_LEFT_OUT = ("review/weight_entropy", "value/brier")
# What of a reviewer's metrics adds up over processes; the rest are shares and medians.
_ADD_UP = {field.name for field in dataclasses.fields(Usage)} | {"dollars_spent", "concurrency"}


def merge(tallies: Sequence[Tally]) -> dict[str, float]:
  """The metrics of a step over all processes."""
  merged: dict[str, float] = {}
  for key in dict.fromkeys(key for tally in tallies for key in tally.means):
    totals, counts = (sum(x) for x in zip(*(tally.means.get(key, (0, 0)) for tally in tallies), strict=True))
    if counts or key not in _LEFT_OUT:
      merged[key] = totals / counts if counts else 0.0
  merged |= {key: sum(tally.sums[key] for tally in tallies) for key in tallies[0].sums}
  merged |= {key: max(tally.largest[key] for tally in tallies) for key in tallies[0].largest}
  for key in sorted({key for tally in tallies for key in tally.reviewer}):
    total = sum(tally.reviewer.get(key, 0.0) for tally in tallies)
    name = re.sub(r"_\d$", "", key.rpartition("/")[2])  # The number is that of a panel's member.
    merged[key] = total if name in _ADD_UP else total / len(tallies)
  return merged


def eval_metrics(scores: dict[str, Estimate]) -> dict[str, float]:
  flat: dict[str, float] = {}
  for name, e in scores.items():
    flat |= {f"eval/{name}": e.value, f"eval/{name}_low": e.low, f"eval/{name}_high": e.high}
  return flat
