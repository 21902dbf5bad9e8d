"""A reviewer that was trained for the task; see `dca_jax.reader`."""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from dca_jax.checks import at_least
from dca_jax.doors import local
from dca_jax.errors import UserError, reason
from dca_jax.review.reviewer import ReviewerConfig, Uses
from dca_jax.review.types import Request, Review, Reviewer, Submit

VERSION = 1
"""Of the folder."""
FILE = "reader.json"


def describe(folder: str) -> dict[str, Any]:
  """What the folder of a trained reviewer says of it.

  Raises:
    UserError: there is none, or it is of another version.
  """
  path = pathlib.Path(folder).expanduser() / FILE
  try:
    said: dict[str, Any] = json.loads(path.read_text())
    found = said["version"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f"{folder!r} holds no trained reviewer ({reason(error)}); `dca-jax fit-reviewer` makes one"
    ) from error
  if found != VERSION:
    raise UserError(f"{path} is of version {found}, and this is {VERSION}; fit it again")
  return said


@dataclasses.dataclass(frozen=True)
class Trained(ReviewerConfig):
  """A reviewer that `dca-jax fit-reviewer` has made. It reads on the devices of the run, beside
  sampling."""

  name: str = "trained"
  path: str = local()
  """The folder that `fit-reviewer` has written."""
  refit_every: int = 0
  """Steps after which it learns anew, from where `path` stands, from all spot checks of the run so
  far; 0 never. For a reviewer from spot checks: others would hear nothing of it."""

  @property
  def gives(self) -> tuple[str, ...]:  # type: ignore[override]
    """What it was trained on."""
    try:
      known = describe(self.path)["gives"]
    except UserError:  # `check` says so.
      return "roles", "values"
    return tuple(what for what, sources in _SOURCES.items() if not sources.isdisjoint(known))

  def check(self) -> dict[str, str]:
    bad = super().check() | at_least(0, self, "refit_every")
    try:
      known = describe(self.path)["gives"]
    except UserError as error:
      return bad | {"path": f"is not usable: {error}"}
    if self.refit_every and "effects" not in known:
      bad["refit_every"] = f"must be 0: {self.path} was not made from spot checks"
    return bad

  @property
  def reads_checks(self) -> bool:
    return self.refit_every > 0

  @property
  def device_bytes(self) -> int:
    """Of its parameters, on each device."""
    from dca_jax import reader

    return reader.bytes_of(self.path)

  def open(self, uses: Uses) -> Reviewer:
    from dca_jax import reader

    made = reader.load(self.path)

    def after(step: int) -> Answer:
      return reader.refit(made, uses.trajectories, step).reviews if step else made.reviews

    return InOneThread(after, self.refit_every, self.overlap)


Answer = Callable[[Sequence[Request]], list[Review]]
_SOURCES = {"roles": {"roles", "effects"}, "values": {"values"}}


class InOneThread(Reviewer):
  """Asks a function about all requests of a call at once, one call after the other."""

  def __init__(self, after: Callable[[int], Answer], every: int = 0, behind: int = 0):
    """`after` makes the function, from what is known after so many steps.

    Args:
      every: steps between two functions; 0 keeps the first.
      behind: how many steps before its update a batch is reviewed.
    """
    self._after, self._every, self._behind = after, every, behind
    self._known, self._answer, self._failed = 0, after(0), ""
    self._pool = ThreadPoolExecutor(1, "trained reviewer")

  def begin_step(self, step: int = 0) -> Submit:
    # What all processes have written when this step's first question is asked, resumed or not.
    complete = max(0, step - 1 - self._behind)
    known = complete // self._every * self._every if self._every else 0
    if known != self._known:
      self._known, self._answer = known, self._after(known)
    return self.submit

  def submit(self, requests: Sequence[Request], deadline: float) -> "Future[list[Review]]":
    requests, end, answer = list(requests), time.monotonic() + deadline, self._answer

    def work() -> list[Review]:
      if time.monotonic() >= end:
        return [Review("timeout")] * len(requests)
      try:
        return answer(requests)
      except Exception as error:
        if not self._failed:
          self._failed = f"trained: {reason(error)}"
          print(f"warning: reviewer {self._failed}; such reviews count as failed", file=sys.stderr)
        return [Review("client_error")] * len(requests)

    return self._pool.submit(work)

  def failures(self) -> str:
    return self._failed

  def close(self) -> None:
    self._pool.shutdown(cancel_futures=True)
