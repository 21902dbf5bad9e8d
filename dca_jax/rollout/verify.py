"""Verifying completions: the one place where a task's verifier is called."""

import dataclasses
import os
import statistics
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from dca_jax.errors import UserError, reason
from dca_jax.tasks import Outcome, Problem, Task


def verify(task: Task, attempts: Sequence[tuple[Problem, str, bool]]) -> list[Outcome]:
  """The outcome of each attempt: a problem, a completion, and whether that was truncated.

  Raises:
    UserError: an attempt cannot be verified; the message names the problem.
  """
  if task.concurrency == 1:
    return [_verified(task, *attempt) for attempt in attempts]
  pool = ThreadPoolExecutor(task.concurrency)
  try:
    return list(pool.map(lambda attempt: _verified(task, *attempt), attempts))
  finally:
    pool.shutdown(cancel_futures=True)


def _verified(task: Task, problem: Problem, completion: str, truncated: bool) -> Outcome:
  try:
    outcome = task.verify(problem, completion, truncated)
  except UserError:
    raise
  except Exception as error:
    if type(task).__module__.startswith("dca_jax."):
      raise  # A mistake of ours, of which the traceback is wanted.
    why = f"{_place(task, error)}: {type(error).__name__}: {reason(error)}"
    raise UserError(f"verify of {why}, on problem {problem.id}; {_MEND}") from error
  if not isinstance(outcome, Outcome):
    why = f"{_place(task)}: it returned {outcome!r:.60}, which is no Outcome"
    raise UserError(f"verify of {why}, on problem {problem.id}; {_MEND}")
  return outcome


_MEND = "mend it, then run again to go on"


def _place(task: Task, error: Exception | None = None) -> str:
  """The file and the line of a task's `verify`; of an error the last line there that led to it, or
  the one that raised it."""
  code = getattr(task.verify, "__code__", None)
  file, line = (code.co_filename, code.co_firstlineno) if code else (type(task).__module__, 0)
  frames = traceback.extract_tb(error.__traceback__)[1:] if error else []
  if frames:
    last = [frame for frame in frames if frame.filename == file][-1:] or frames[-1:]
    file, line = last[0].filename, last[0].lineno or 0
  inside = os.path.relpath(file) if os.path.isabs(file) else file
  return f"{file if inside.startswith('..') else inside}, line {line}"


def neutral(group: list[Outcome]) -> list[Outcome]:
  """A group in which completions without a verdict have the mean reward of the others."""
  rewards = [outcome.reward for outcome in group if outcome.judged]
  mean = statistics.fmean(rewards) if rewards else 0.0
  return [o if o.judged else dataclasses.replace(o, reward=mean) for o in group]
