"""How good a policy is on held-out problems: greedy and sampled accuracy, pass@k and maj@k, with intervals."""

import dataclasses
import math
import statistics
import typing
from collections.abc import Sequence

import jax
import numpy as np

from dca_jax.checks import at_least
from dca_jax.policy import Sampling
from dca_jax.processes import gather, put
from dca_jax.rollout import Sampler, cut_at_stops, encode_prompts
from dca_jax.rollout.verify import attempts, verify
from dca_jax.task import Task

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
    bad = at_least(1, self, "problems", "samples", "k") | at_least(0, self, "every")
    return bad | ({"k": f"must not exceed evaluate.samples ({self.samples})"} if self.k > self.samples else {})


class Estimate(typing.NamedTuple):
  """A mean over problems with its 95 % interval."""

  value: float
  low: float
  high: float


def evaluate(config: EvaluateConfig, sampler: Sampler, task: Task, tokenizer, params) -> dict[str, Estimate]:
  """Evaluates on problems 0 to `config.problems` of the held-out split; the noise is the same at every call."""
  n = config.problems
  key = jax.jit(jax.random.key)(put(np.uint32(0), sampler.end_ids_E.sharding))
  # The last rows may be there only so that every device has as many.
  shards = sampler.rows.num_devices // sampler.rows.mesh.shape["tensor"]
  ids = sampler.own(-(-n // shards) * shards)
  problems = [task.problem("heldout", int(i) % n) for i in ids]
  prompts = encode_prompts(tokenizer, problems, sampler.config.max_prompt_tokens, sampler.policy.rows)

  def outcomes(sampling: Sampling, count: int):
    """Of each problem's completions which are correct, their final answers and lengths: [problems, count] each."""
    samples = cut_at_stops(sampler.config.stop, tokenizer, sampler(params, *prompts, ids, key, count, sampling))
    made = attempts(tokenizer, problems, samples)
    verified = zip(made, verify(task, made), samples.lengths_B, strict=True)
    by_problem: dict[int, list] = {}
    for row, ((_, text, _), outcome, length) in enumerate(verified):
      answer = task.final_answer(text) if task.final_answer else None
      by_problem.setdefault(int(ids[row // count]), []).append((outcome.correct, answer, int(length)))
    everyone = {int(i): own for part in gather("evaluation", by_problem) for i, own in part.items()}
    return zip(*(zip(*everyone[i], strict=True) for i in range(n)), strict=True)

  greedy = np.array(next(outcomes(_GREEDY, 1)), float)
  correct, answers, lengths = (list(x) for x in outcomes(sampler.config.sampling, config.samples))
  sampled = np.array(correct, bool)
  length = float(np.mean(lengths))
  passed = [pass_at_k(config.samples, int(row.sum()), config.k) for row in sampled]
  scores = {
    "greedy": interval(greedy[:, 0]),
    "sampled": interval(sampled.mean(1)),
    f"pass@{config.k}": interval(passed),
    "length": Estimate(length, length, length),
  }
  if task.final_answer:
    votes = zip(answers, sampled, strict=True)
    majority = [majority_correct(given[: config.k], right[: config.k].tolist()) for given, right in votes]
    scores[f"maj@{config.k}"] = interval(majority)
  return scores


def pass_at_k(n: int, correct: int, k: int) -> float:
  """Chance that k of the n samples, drawn without replacement, hold a correct one (Chen et al. 2021, eq. 1)."""
  return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority_correct(answers: Sequence[str | None], correct: list[bool]) -> float:
  """Whether the most frequent answer is correct; among equally frequent ones, the share that is."""
  best = statistics.multimode(a for a in answers if a is not None)
  right = {a for a, ok in zip(answers, correct, strict=True) if ok}
  return sum(a in right for a in best) / max(1, len(best))


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
