"""How good a policy is on the held-out problems of a task, problem by problem."""

import collections
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from dca_jax import config as config_lib
from dca_jax.api import SavedPolicy
from dca_jax.config import Config, ConfigError
from dca_jax.intervals import Estimate
from dca_jax.rollout import GREEDY
from dca_jax.rollout.evaluate import Answer, scores
from dca_jax.tasks import Problem

Scores = dict[str, dict[str, Estimate]]
"""By the group of problems, of which the first is `all`, and by the score's name."""


def settings(workdir: str, recipe: str, overrides: Sequence[str]) -> Config:
  """The config of a run or of a recipe, as the command line's `overrides` say."""
  if recipe:
    return config_lib.load(recipe, overrides)
  return config_lib.build(config_lib.read_saved(workdir), overrides)


def evaluate(
  config: Config, workdir: str, step: int | None, by: str, output: epath.Path | None
) -> Scores:
  """Scores of a run's checkpoint, or without a workdir of `policy.pretrained`.

  Args:
    by: a field of the data set's rows; problems that have the same there are scored together.
    output: gets a line of JSON for each problem.

  Raises:
    UserError: there is no such policy, or the task has fewer problems or no such field.
  """
  policy = SavedPolicy(config, workdir, step)
  count, there = config.evaluate.problems, policy.task.sizes.get("heldout")
  if there is not None and count > there:
    raise ConfigError(f"evaluate.problems: must not exceed the {there} held-out problems")
  problems = [policy.task.problem("heldout", i) for i in range(count)]
  groups = collections.defaultdict(list, all=[*range(count)])
  for i, problem in enumerate(problems if by else ()):
    if by not in problem.row:
      known = ", ".join(problem.row) or "none"
      raise ConfigError(f"--by={by}: problem {i} has no such field; there are {known}")
    groups[f"{by} {problem.row[by]}"].append(i)
  answers = policy.answers()
  if output:
    lines = (json.dumps(_line(problem, answers, config, by)) for problem in problems)
    output.write_text("".join(f"{line}\n" for line in lines))
  votes = policy.task.final_answer is not None
  return {name: scores(config.evaluate, answers, own, votes) for name, own in groups.items()}


def _line(
  problem: Problem, answers: dict[tuple[int, int], Answer], config: Config, by: str
) -> dict[str, Any]:
  """What becomes of a problem in the file."""
  told = {"problem": problem.id, "prompt": problem.prompt, "answer": problem.answer}
  told |= {by: problem.row[by]} if by else {}
  samples = [answers[problem.id, g]._asdict() for g in range(config.evaluate.samples)]
  return {**told, "greedy": answers[problem.id, GREEDY]._asdict(), "samples": samples}


def table(found: Scores) -> tuple[list[str], list[list[str]]]:
  """The header and the rows of a table of scores with their intervals."""

  def cell(e: Estimate) -> str:
    return f"{e.value:.1f}" if e.low == e.high else f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"

  names = [*found["all"]]
  return ["held-out", *names], [
    [group, *(cell(own[name]) for name in names)] for group, own in found.items()
  ]
