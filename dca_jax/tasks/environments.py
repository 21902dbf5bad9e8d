"""Environments: what answers the policy between its turns, and ends the episode."""

import dataclasses
import math
from collections.abc import Awaitable
from typing import ClassVar, NamedTuple, Protocol

from dca_jax.checks import at_least, positive
from dca_jax.episode import Outcome, Problem
from dca_jax.errors import UserError
from dca_jax.tasks.types import Task, TaskConfig


class Turn(NamedTuple):
  """What an environment answers to what the policy said."""

  observation: str | None = None
  done: bool = False
  outcome: Outcome = Outcome(0.0, False, False)
  """What the episode has come to, if it ends here."""
  score: float = math.nan
  """How far the episode has come, in [0, 1], such as the chance of success from here."""
  error: bool = False
  """Whether the policy asked for something that cannot be done; only counted."""


class Environment(Protocol):
  """One for each episode. Its methods may be coroutines; then all run on one event loop, and
  otherwise in threads. What it raises, or says too late, is a failure: no wrong answer, the episode
  is left out and counted in `train/unjudged`."""

  def begin(self, problem: Problem) -> str | Awaitable[str | None] | None:
    """What the policy is told after the prompt."""

  def step(self, text: str) -> Turn | Awaitable[Turn]:
    """Answers to a turn of the policy, which ended with an end token or a string of
    `rollout.stop`."""

  def close(self) -> Awaitable[None] | None:
    """Called once, also after a failure."""


Frame = tuple[str, str]
"""What stands before and after an observation: a chat template's own words."""


class Acting(Task, Protocol):
  """A task that `offers` an environment."""

  max_turns: int
  turn_seconds: float
  at_once: int

  @property
  def opening(self) -> Frame:
    """That of what `begin` says, after the prompt."""

  @property
  def between(self) -> Frame:
    """That of what `step` says. It begins with the token that ends a turn, if it has one."""

  def environment(self, problem: Problem, seed: int) -> Environment:
    """A new one; `seed` is for what it draws, and the same after a resume. Must not take long, or
    reach for anything that may not be there."""


@dataclasses.dataclass(frozen=True)
class EnvironmentConfig(TaskConfig):
  """The `task` section of a task with environments."""

  max_turns: int = 8
  """Turns of the policy, after which an episode is truncated."""
  turn_seconds: float = 60.0
  """Seconds that an environment may take to begin, and for each answer."""
  at_once: int = 1
  """Environments that may work at the same time. With 1 sampling waits for them, so that episodes
  are sampled side by side in the same way in every run; with more, it goes on with others."""

  offers: ClassVar[tuple[str, ...]] = ("environment",)
  opening: ClassVar[Frame] = ("", "")
  between: ClassVar[Frame] = ("", "")

  def check(self) -> dict[str, str]:
    return at_least(1, self, "max_turns", "at_once") | positive(self, "turn_seconds")

  def verify(self, problem: Problem, completion: str, truncated: bool) -> Outcome:
    raise UserError("task.name: its environment alone says what an episode has come to")
