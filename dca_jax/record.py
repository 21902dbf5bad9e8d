"""What a step leaves behind: trajectories and metrics."""

import math
import time

import numpy as np

from dca_jax.batch import Advantages, Begun, Rollout
from dca_jax.credit import CreditConfig
from dca_jax.evaluate import Estimate
from dca_jax.review import Review as HostReview
from dca_jax.roles import ROLES
from dca_jax.rollout import Trajectory


def trajectories(begun: Begun, reviews: list[HostReview], values_BxK, advantages: Advantages):
  rollout, completion_advantages = begun.rollout, advantages.completions_PxG.reshape(-1)
  for i, (request, spans, review) in enumerate(zip(begun.requests, begun.spans, reviews, strict=True)):
    problem = rollout.problems[i * len(rollout.problems) // len(reviews)]
    length, outcome = int(rollout.samples.lengths_B[i]), rollout.outcomes[i]
    steps: list[dict] = [
      {"start": a, "end": b, "text": text} for (a, b), text in zip(spans, request.steps, strict=True)
    ]
    for described, role, weight in zip(steps, review.roles, review.weights, strict=False):
      described |= {"role": role, "weight": weight}
    for described, value in zip(steps, values_BxK[i].tolist(), strict=False):
      described |= {} if math.isnan(value) else {"value": value}
    yield Trajectory(
      id=request.id,
      problem=problem.id,
      prompt=problem.prompt,
      answer=problem.answer,
      tokens=rollout.samples.tokens_BxT[i, :length].tolist(),
      steps=steps,
      reward=outcome.reward,
      correct=outcome.correct,
      truncated=outcome.truncated,
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


def step_metrics(
  credit: CreditConfig,
  rollout: Rollout,
  continued: int,
  rewards_B,
  asked: list[bool],
  reviews,
  values_BxK,
  advantages: Advantages,
  stats,
  clock: Clock,
) -> dict[str, float]:
  samples, sampled = rollout.samples, rollout.sampled
  roles = [role for review in reviews for role in review.roles]
  counted = samples.lengths_B if credit.conserve == "tokens" else samples.tokens_BxT.shape[1]
  mass = advantages.completions_PxG.reshape(-1).astype(np.float64) * counted
  # 1 where all steps weigh the same, 0 where one has everything.
  weights = [np.array(r.weights) / sum(r.weights) for r in reviews if len(r.weights) > 1 and sum(r.weights) > 0]
  evenness = [-np.sum(w * np.log(np.where(w > 0, w, 1.0))) / np.log(len(w)) for w in weights]
  extra: dict[str, float] = {}
  if credit.scheme in ("uniform", "weighted", "signed"):  # The others keep sums of their own, or none.
    spread = np.abs(advantages.tokens_BxT.sum(1, dtype=np.float64) - mass)
    extra["credit/conservation_error"] = float((spread / np.maximum(1.0, np.abs(mass))).max())
  known = ~np.isnan(values_BxK)
  if known.any():
    extra["value/brier"] = float(np.square(values_BxK - rewards_B[:, None]).mean(where=known))
  total = sum(clock.seconds.values())
  group = len(rewards_B) // len(rollout.problems)
  return {
    "train/reward": float(np.mean([o.reward for o in sampled])),
    "train/accuracy": float(np.mean([o.correct for o in sampled])),
    "train/truncated": float(np.mean([o.truncated for o in sampled])),
    "train/length": float(samples.lengths_B.mean()),
    "train/completions": float(len(sampled)),
    "train/generated_tokens": float(rollout.generated + continued),
    "train/mixed_groups": float(np.mean([len(set(g)) > 1 for g in rewards_B.reshape(-1, group).tolist()])),
    "train/tokens_per_second": float(samples.lengths_B.sum() / total),
    "review/asked": float(np.mean(asked)),
    "review/ok": sum(review.status == "ok" for review in reviews) / max(1, sum(asked)),
    **({"review/weight_entropy": float(np.mean(evenness))} if evenness else {}),
    **{f"review/{role}": roles.count(role) / max(1, len(roles)) for role in ROLES},
    "credit/moved": float(np.abs(advantages.tokens_BxT).sum() / max(1e-9, np.abs(mass).sum())),
    **extra,
    **{key: float(value) for key, value in stats.items()},
    **{f"seconds/{key}": value for key, value in clock.seconds.items()},
    "seconds/step": total,
  }


def eval_metrics(scores: dict[str, Estimate]) -> dict[str, float]:
  flat: dict[str, float] = {}
  for name, e in scores.items():
    flat |= {f"eval/{name}": e.value, f"eval/{name}_low": e.low, f"eval/{name}_high": e.high}
  return flat
