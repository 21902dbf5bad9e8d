"""An environment: a number is to be found, and every guess is told where it lies."""

import dataclasses

import numpy as np

from dca_jax.checks import at_least
from dca_jax.tasks import (
  SPLITS,
  EnvironmentConfig,
  Outcome,
  Problem,
  Turn,
  character_tokenizer,
)


@dataclasses.dataclass(frozen=True)
class Guess(EnvironmentConfig):
  """`0-9>` may go on as `5$up;8$down;7$`, where `$` ends a turn of the policy."""

  most: int = 9

  step_end = r"\$"

  def check(self):
    return super().check() | at_least(1, self, "most")

  def tokenizer(self):
    return character_tokenizer("0123456789->;updown", end="$")

  def problem(self, split, index):
    rng = np.random.default_rng([SPLITS.index(split), index])
    return Problem(index, f"0-{self.most}>", str(rng.integers(self.most + 1)))

  def environment(self, problem, seed):
    return Keeper(int(problem.answer), self.most)


class Keeper:
  def __init__(self, number, most):
    self.number, self.most = number, most

  def begin(self, problem):
    return None  # The prompt says it all.

  def step(self, text):
    said = text.removesuffix("$")
    if not said.isascii() or not said.isdigit():
      return Turn("?;", error=True)
    away = abs(int(said) - self.number)
    score = max(0.0, 1 - away / self.most)
    if away == 0:
      return Turn(done=True, outcome=Outcome(1.0, True, False))
    return Turn("up;" if int(said) < self.number else "down;", score=score)

  def close(self):
    pass
