"""Problems that a user types, and a policy's answers as they are written, step by step."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from textwrap import shorten
from typing import Any

from dca_jax.api import SavedPolicy
from dca_jax.commands.evaluate import settings
from dca_jax.commands.review import reviewer_config
from dca_jax.config import read_saved
from dca_jax.episode import Outcome, Problem
from dca_jax.errors import UserError
from dca_jax.review import Request, Reviewer, Truth, open_reviewer
from dca_jax.rollout.steps import cut, step_texts
from dca_jax.rollout.verify import verify
from dca_jax.tasks.tokenizer import token_bytes

_SECONDS = 600.0
"""For a review."""


def chat(workdir: str, step: int | None, member: str, overrides: Sequence[str]) -> None:
  """Answers the lines of the standard input until it ends.

  A line is a problem, or `PROBLEM => ANSWER`, whose outcome is then said and reviewed; an empty one
  is the next held-out problem.

  Args:
    member: NAME or NAME:MODEL of the reviewer that reads answers; empty for none.
    overrides: settings of the run, or with a reviewer its own.
  """
  own = [said for said in overrides if said.startswith("--config.reviewer.")]
  changes = [said for said in overrides if said not in own]
  policy = SavedPolicy(settings(workdir, "", changes), workdir, step)
  with contextlib.ExitStack() as stack:
    reviewer = None
    if member:
      section = reviewer_config(member, own, read_saved(workdir)["task"]).reviewer
      opened = open_reviewer(section, Truth.of(policy.task), None)
      reviewer = stack.enter_context(contextlib.closing(opened))
    like = " ".join(policy.task.problem("heldout", 0).prompt.split())
    print(f"A problem such as {shorten(like, 300, placeholder=' ...')}")
    print("or PROBLEM => ANSWER, or an empty line for a held-out one; Ctrl-D ends.")
    for i, problem in enumerate(_problems(policy)):
      try:
        steps, truncated = _answered(policy, problem, i)
      except UserError as error:  # The policy cannot read it.
        print(f"  not asked: {error}")
        continue
      if problem.answer:
        (outcome,) = verify(policy.task, [(problem, "".join(steps), truncated)])
        _judged(problem, steps, outcome, reviewer)


def _problems(policy: SavedPolicy) -> Iterator[Problem]:
  number = 0
  while True:
    print("> ", end="", flush=True)
    if not (line := sys.stdin.readline()):
      print()
      return
    prompt, _, answer = (part.strip() for part in line.partition("=>"))
    if prompt:
      yield Problem(0, prompt, answer, policy.task.render(prompt))
    else:
      problem = policy.task.problem("heldout", number)
      number += 1
      print(problem.prompt)
      yield problem


def _answered(policy: SavedPolicy, problem: Problem, seed: int) -> tuple[list[str], bool]:
  """Prints an answer, a step a line as each ends; returns the steps, and whether it was cut off."""
  tokens: list[int] = []
  shown = 0
  whole = False
  for new, whole in policy.stream(problem, seed):  # noqa: B007 (read after the last)
    tokens += new
    steps = _steps(policy.task, policy.tokenizer, tokens)
    for step in steps[shown:-1]:
      print(f"  {step.rstrip()}", flush=True)
    shown = max(shown, len(steps) - 1)
  print(f"  {steps[-1].rstrip()}" + ("" if whole else "  (cut off)"), flush=True)
  return steps, not whole


def _steps(task: Any, tokenizer: Any, tokens: Sequence[int]) -> list[str]:
  pieces = token_bytes(tokenizer, tokens)
  return [*step_texts(pieces, cut(pieces, task.step_end, *task.step_limits))]


def _judged(
  problem: Problem, steps: Sequence[str], outcome: Outcome, reviewer: Reviewer | None
) -> None:
  print(f"  {'right' if outcome.correct else 'wrong'}; the answer is {problem.answer}")
  if reviewer is None:
    return
  request = Request("chat", problem.prompt, tuple(steps), outcome.correct, outcome.truncated)
  (review,) = reviewer.submit([request], _SECONDS).result()
  review = review.checked(len(steps))
  if not review.roles:
    print(f"  no review ({review.status})")
  for step, role, weight in zip(steps, review.roles, review.weights, strict=False):
    print(f"  {role:>10} x {weight:<4.3g} {step.rstrip()}")
