"""Verifying completions: the one place where a task's verifier is called."""

import dataclasses
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from dca_jax.tasks import Outcome, Problem, Task


def verify(task: Task, attempts: Sequence[tuple[Problem, str, bool]]) -> list[Outcome]:
  """The outcome of each attempt: a problem, a completion, and whether that was truncated."""
  if task.concurrency == 1:
    return [task.verify(*attempt) for attempt in attempts]
  pool = ThreadPoolExecutor(task.concurrency)
  try:
    return list(pool.map(lambda attempt: task.verify(*attempt), attempts))
  finally:
    pool.shutdown(cancel_futures=True)


def neutral(group: list[Outcome]) -> list[Outcome]:
  """A group in which completions without a verdict have the mean reward of the others."""
  rewards = [outcome.reward for outcome in group if outcome.judged]
  mean = statistics.fmean(rewards) if rewards else 0.0
  return [o if o.judged else dataclasses.replace(o, reward=mean) for o in group]
