"""What goes to a reviewer and what comes back."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol


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
  """A role and a weight for each step; where `status` is not `ok` both are empty and credit is uniform."""

  status: str
  roles: tuple[str, ...] = ()
  weights: tuple[float, ...] = ()


class Reviewer(Protocol):
  def __call__(self, requests: Sequence[Request], deadline: float) -> list[Review]:
    """One review per request, in order, always, within `deadline` seconds; failure is a status, never an exception."""
    ...
