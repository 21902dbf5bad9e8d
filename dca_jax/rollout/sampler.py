"""The policy as it samples a task's problems."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dca_jax.rollout.config import RolloutConfig
from dca_jax.rollout.engine import Engine, Sample, Wanted
from dca_jax.rollout.prompts import encode_prompts
from dca_jax.tasks import Problem, Task


class Sampler(NamedTuple):
  """What sampling takes, but for parameters and problems."""

  engine: Engine
  config: RolloutConfig
  task: Task
  tokenizer: Any
  rows: int
  """Of the policy's embedding."""
  own: np.ndarray
  """Which problems of a batch this process has."""

  def encode(self, problems: Sequence[Problem]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts [P, S] and their lengths [P]; see `encode_prompts`."""
    return encode_prompts(self.tokenizer, problems, self.config.max_prompt_tokens, self.rows)

  def stream(
    self,
    params,
    prompts: tuple[np.ndarray, np.ndarray],
    ids: Sequence[int] | np.ndarray,
    numbers: np.ndarray,
    noise: Sequence[int],
  ) -> Iterator[Sample]:
    """Whole answers to prompts, as they end; see `Wanted` and `Engine.stream`.

    Args:
      ids: of the problems.
      numbers: of the samples of every problem [G], or of each [P, G].
    """
    return self.engine.stream(params, self.wanted(prompts, ids, numbers), noise)

  def wanted(
    self,
    prompts: tuple[np.ndarray, np.ndarray],
    ids: Sequence[int] | np.ndarray,
    numbers: np.ndarray,
  ) -> Wanted:
    """Whole answers to prompts; see `stream`."""
    problems = len(prompts[1])
    numbers_PxG = np.broadcast_to(numbers, (problems, numbers.shape[-1]))
    limits_P = np.full(problems, self.config.max_tokens)
    begun_P = np.zeros(problems, np.int32)
    return Wanted(*prompts, np.asarray(ids), numbers_PxG, limits_P, begun_P)


def in_order(samples: Iterator[Sample]) -> list[Sample]:
  """All samples, by row."""
  return sorted(samples, key=lambda sample: sample.row)
