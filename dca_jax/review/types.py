"""What goes to a reviewer and what comes back."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from dca_jax.roles import ROLES


@dataclasses.dataclass(frozen=True)
class Request:
  """One completion to review. `id` identifies the sample in its run and is the same after a resume."""

  id: str
  problem: str
  steps: tuple[str, ...]
  correct: bool
  truncated: bool


@dataclasses.dataclass(frozen=True)
class Review:
  """What a reviewer says of each step; where `status` is not `ok` nothing, and credit is uniform."""

  status: str
  roles: tuple[str, ...] = ()
  weights: tuple[float, ...] = ()
  values: tuple[float, ...] = ()
  """The chance of success before each step is written, told without a look at the rest; what `potential` credit reads.
  A reviewer gives roles with weights, or values, or both."""

  def checked(self, steps: int) -> "Review":
    """This review, or one of status `invalid` where it does not fit an answer of so many steps."""
    fits = {len(self.roles), len(self.values)} <= {0, steps} and len(self.weights) == len(self.roles)
    if self.status != "ok" or (fits and (self.roles or self.values) and set(self.roles) <= set(ROLES)):
      return self
    return Review("invalid")


class Reviewer(Protocol):
  def __call__(self, requests: Sequence[Request], deadline: float) -> list[Review]:
    """One review per request, in order, always, within `deadline` seconds; failure is a status, never an exception."""
    ...
