"""How good a policy is on held-out problems: greedy and sampled accuracy, pass@k and maj@k, with
intervals."""

import dataclasses
import math
import statistics
import typing
from collections.abc import Sequence

import numpy as np

from dca_jax.checks import at_least
from dca_jax.devices.processes import gather
from dca_jax.intervals import Estimate, share
from dca_jax.progress import progress
from dca_jax.rollout.engine import GREEDY
from dca_jax.rollout.sampler import Sampler
from dca_jax.rollout.turns import last_text, outcomes_of, play
from dca_jax.tasks.tokenizer import text_of


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  """The `evaluate` section."""

  problems: int = 256
  """Held-out problems."""
  samples: int = 8
  """Completions sampled for each, at rollout.temperature. With the greedy one they are drawn in
  groups of rollout.group, so one less than a multiple of that wastes nothing."""
  k: int = 4
  """For pass@k and maj@k."""
  every: int = 0
  """Training steps between evaluations; the first policy and the last are evaluated in any case."""

  @property
  def scores(self) -> list[str]:
    """The names that scores have in the metrics; without `maj@k` where a task's answers cannot be
    told apart."""
    names = ("greedy", "sampled", f"pass@{self.k}", f"maj@{self.k}", "length")
    return [f"eval/{name}{end}" for name in names for end in ("", "_low", "_high")]

  def check(self) -> dict[str, str]:
    bad = at_least(1, self, "problems", "samples", "k") | at_least(0, self, "every")
    return bad | (
      {"k": f"must not exceed evaluate.samples ({self.samples})"} if self.k > self.samples else {}
    )


class Answer(typing.NamedTuple):
  """What became of one completion."""

  correct: bool
  final: str | None
  length: int
  text: str = ""
  """Known to the process that sampled it, and to no other."""


Answers = dict[tuple[int, int], Answer]
"""By problem and number of the sample."""


def evaluate(config: EvaluateConfig, sampler: Sampler, params) -> dict[str, Estimate]:
  """Evaluates on problems 0 to `config.problems` of the held-out split; the noise is the same at
  every call."""
  answers = answer(config, sampler, params)
  return scores(config, answers, range(config.problems), bool(sampler.task.final_answer))


def scores(
  config: EvaluateConfig, answers: Answers, problems: Sequence[int], votes: bool
) -> dict[str, Estimate]:
  """Scores over some of the problems; `maj@k` where the task tells final answers apart, and so
  counts `votes`."""
  samples = range(config.samples)
  greedy = [answers[i, GREEDY].correct for i in problems]
  sampled = np.array([[answers[i, g].correct for g in samples] for i in problems])
  length = float(np.mean([answers[i, g].length for i in problems for g in samples]))
  found = {
    "greedy": share(greedy),
    "sampled": share(sampled.mean(1)),
    f"pass@{config.k}": share(
      [pass_at_k(config.samples, int(row.sum()), config.k) for row in sampled]
    ),
    "length": Estimate(length, length, length),
  }
  if votes:
    voted = [[answers[i, g] for g in range(config.k)] for i in problems]
    majority = [majority_correct([a.final for a in own], [a.correct for a in own]) for own in voted]
    found[f"maj@{config.k}"] = share(majority)
  return found


def answer(config: EvaluateConfig, sampler: Sampler, params) -> Answers:
  """The greedy answer and the sampled ones to every problem.

  They are drawn in batches of training's shape, by its program and in its memory.
  """
  rollout, task = sampler.config, sampler.task
  numbers = [GREEDY, *range(config.samples)]
  numbers += [GREEDY] * (-len(numbers) % rollout.group)
  groups = [(i, g) for i in range(config.problems) for g in range(0, len(numbers), rollout.group)]
  own: Answers = {}
  batches = range(0, len(groups), rollout.problems)
  total = len(batches) * len(sampler.own) * rollout.group
  with progress(total=total, desc="evaluation", unit="answer") as bar:
    for first in batches:
      # The last batch begins again, to be full.
      batch = [groups[(first + int(row)) % len(groups)] for row in sampler.own]
      problems = [task.problem("heldout", i) for i, _ in batch]
      ids = [i for i, _ in batch]
      wanted_PxG = np.array([numbers[g : g + rollout.group] for _, g in batch])
      new = {}
      prompts = sampler.encode(problems)
      for attempt in play(sampler, params, problems, prompts, ids, wanted_PxG, (0,)):
        bar.update()
        place = ids[attempt.row // rollout.group], int(wanted_PxG.flat[attempt.row])
        if place not in own:
          new[place] = problems[attempt.row // rollout.group], attempt
      outcomes = outcomes_of(sampler, *zip(*new.values(), strict=True)) if new else []
      for (place, (_, attempt)), outcome in zip(new.items(), outcomes, strict=True):
        final = task.final_answer(last_text(sampler, attempt)) if task.final_answer else None
        text = text_of(sampler.tokenizer, attempt.tokens)
        own[place] = Answer(outcome.correct, final, attempt.sampled, text)
  told = gather("evaluation", [[*place, *own[place][:-1]] for place in own])
  return {(i, number): Answer(*rest) for part in told for i, number, *rest in part} | own


def pass_at_k(n: int, correct: int, k: int) -> float:
  """Chance that k of the n samples, drawn without replacement, hold a correct one (Chen et al.
  2021, eq. 1)."""
  return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority_correct(answers: Sequence[str | None], correct: list[bool]) -> float:
  """Whether the most frequent answer is correct; among equally frequent ones, the share that is."""
  best = statistics.multimode(a for a in answers if a is not None)
  right = {a for a, ok in zip(answers, correct, strict=True) if ok}
  return sum(a in right for a in best) / max(1, len(best))
