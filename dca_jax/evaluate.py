"""How good a policy is on held-out problems: greedy and sampled accuracy, pass@k and maj@k, with intervals."""

import collections
import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np

from dca_jax.policy import Policy, Sampling
from dca_jax.rollout import RolloutConfig, cut_at_stops, encode_prompts, sample
from dca_jax.task import Task
from dca_jax.task.tokenizer import end_ids, text_of

_GREEDY = Sampling(top_k=1)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  """The `evaluate` section."""

  problems: int = 256
  """Held-out problems."""
  samples: int = 8
  """Completions sampled for each, at rollout.temperature."""
  k: int = 4
  """For pass@k and maj@k."""
  every: int = 0
  """Training steps between evaluations; the first policy and the last are evaluated in any case."""

  def check(self) -> dict[str, str]:
    bad = {key: "must be at least 1" for key in ("problems", "samples", "k") if getattr(self, key) < 1}
    if self.k > self.samples:
      bad["k"] = f"must not exceed evaluate.samples ({self.samples})"
    if self.every < 0:
      bad["every"] = "must not be negative"
    return bad


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean over problems with its 95 % interval."""

  value: float
  low: float
  high: float

  def __str__(self) -> str:
    return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def evaluate(
  config: EvaluateConfig, rollout: RolloutConfig, task: Task, tokenizer, policy: Policy, params
) -> dict[str, Estimate]:
  """Evaluates on problems 0 to `config.problems` of the held-out split; the noise is the same at every call."""
  problems = [task.problem("heldout", i) for i in range(config.problems)]
  prompts = encode_prompts(tokenizer, problems, rollout.max_prompt_tokens)
  ends = np.array(end_ids(tokenizer), np.int32)

  def outcomes(sampling: Sampling, count: int) -> tuple[np.ndarray, list[list[str]], float]:
    arrays = jax.device_put((*prompts, np.arange(len(problems), dtype=np.uint32), ends))
    key = jax.random.key(0)
    samples = jax.device_get(
      sample(policy, params, *arrays[:3], key, arrays[3], sampling=sampling, group=count, max_tokens=rollout.max_tokens)
    )
    samples = cut_at_stops(rollout.stop, tokenizer, samples)
    texts = [text_of(tokenizer, row[:n]) for row, n in zip(samples.tokens_BxT, samples.lengths_B, strict=True)]
    correct = [
      task.verify(problems[i // count], text, bool(samples.truncated_B[i])).correct for i, text in enumerate(texts)
    ]
    answers = [task.final_answer(text) for text in texts]
    shape = (len(problems), count)
    return (
      np.reshape(correct, shape),
      np.reshape(np.array(answers, object), shape).tolist(),
      float(samples.lengths_B.mean()),
    )

  greedy, _, _ = outcomes(_GREEDY, 1)
  sampled, answers, length = outcomes(rollout.sampling, config.samples)
  passed = [pass_at_k(config.samples, int(row.sum()), config.k) for row in sampled]
  majority = [
    majority_correct(row[: config.k], ok[: config.k].tolist()) for row, ok in zip(answers, sampled, strict=True)
  ]
  return {
    "greedy": interval(greedy[:, 0]),
    "sampled": interval(sampled.mean(1)),
    f"pass@{config.k}": interval(passed),
    f"maj@{config.k}": interval(majority),
    "length": Estimate(length, length, length),
  }


def pass_at_k(n: int, correct: int, k: int) -> float:
  """Chance that k of the n samples, drawn without replacement, hold a correct one (Chen et al. 2021, eq. 1)."""
  return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority_correct(answers: Sequence[str | None], correct: list[bool]) -> float:
  """Whether the most frequent answer is correct; among equally frequent ones, the share that is."""
  counts = collections.Counter(a for a in answers if a is not None)
  if not counts:
    return 0.0
  best = [a for a, n in counts.items() if n == max(counts.values())]
  right = {a for a, ok in zip(answers, correct, strict=True) if ok}
  return sum(a in right for a in best) / len(best)


def interval(per_problem) -> Estimate:
  """Wilson's 95 % interval for the mean of numbers in [0, 1], one per problem.

  Problems, not samples, are independent, so the sample size is the number of independent coin flips that would have the
  observed variance between problems (Korn and Graubard 1998). Unlike a bootstrap it has a width when all are right.
  """
  x = np.asarray(per_problem, float)
  n, p, z = len(x), float(x.mean()), 1.96
  variance = float(x.var(ddof=1)) if n > 1 else 0.0
  size = max(n, p * (1 - p) / (variance / n)) if variance > 0 else n
  centre, spread = p + z * z / (2 * size), z * math.sqrt(p * (1 - p) / size + z * z / (4 * size * size))
  scale = 1 + z * z / size
  return Estimate(p, max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale))
