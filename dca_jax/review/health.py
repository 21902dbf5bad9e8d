"""What the end of a call means for those that follow, and what a run is told of its reviewer."""

import collections
import dataclasses
import sys
from collections.abc import Callable
from typing import NamedTuple

from dca_jax.review.transports import CallFailed
from dca_jax.review.types import Review

_WINDOW = 5  # steps


class Meaning(NamedTuple):
  """What one end of a call says."""

  server: str
  """`answered`, `failed`, or `cut`: a deadline came first, which alone says nothing
  of the server."""
  load: str = ""
  """`fine`; `too_many` calls at once; `shut`: nobody is to call for a while."""
  refused: str = ""
  """What was refused: this `content`, or the `settings`; `nothing` where the call was accepted."""
  charged: bool = True
  """Whether another try is paid from the purse."""


def meaning(failed: CallFailed | None) -> Meaning:
  """Of every end that a call can have; None is a reply."""
  if failed is None:
    return Meaning("answered", "fine", "nothing")
  if failed.about == "deadline":
    return Meaning("cut")
  if failed.about == "settings":
    return Meaning("failed", refused="settings")
  if failed.status == "rate_limited":
    return Meaning("answered", "too_many", charged=failed.wait is None)
  if failed.status == "quota":
    return Meaning("answered", "shut")
  if failed.about == "content":
    return Meaning("answered", "fine", "content" if failed.status == "client_error" else "nothing")
  return Meaning("failed")


class Refusals:
  """Tells refused texts from wrong settings, by all that came since a call was last accepted.

  Settings that never worked are wrong. Those that have worked are wrong after a minute and several
  steps without any call that was accepted, because gateways too have bad moments. A text is refused
  for what it says, so it takes many.
  """

  def __init__(self, clock: Callable[[], float]):
    self._clock, self._accepted = clock, False
    self._start_counting()

  def _start_counting(self) -> None:
    self._counts: collections.Counter[str] = collections.Counter()
    self._steps: set[float] = set()
    self._first = 0.0

  def accepted(self) -> None:
    self._accepted = True
    self._start_counting()

  def refused(self, what: str, step: float) -> bool:
    """`what` was refused in the step that began at `step`; whether the settings are wrong."""
    self._first = self._first or self._clock()
    self._counts[what] += 1
    self._steps.add(step)
    several, long = len(self._steps) >= 3, self._clock() - self._first >= 60
    settings = self._counts["settings"] >= 3 and (several or not self._accepted)
    contents = self._counts.total() >= 20 and several
    return (settings or contents) and (long or not self._accepted)


@dataclasses.dataclass(eq=False)
class Fared:
  """How a step has fared so far."""

  reviews: int = 0
  ok: int = 0
  asked: bool = False
  """Whether it is known if a call was made for its questions."""


class Health:
  """How the last steps fared, and what the run is told of it."""

  def __init__(self, min_ok_frac: float, strict: bool, where: str = "the server"):
    """`where` is the server, for people."""
    self._min_ok_frac, self._strict, self._where = min_ok_frac, strict, where
    self._reasons: dict[str, str] = {}
    self._steps: collections.deque[Fared] = collections.deque(maxlen=_WINDOW)
    self._told: set[str] = set()
    self._calls = self.uncalled_steps = 0
    """Steps in a row in which there was something to ask and no call was made."""

  def step(self, reviews: list[Review], asked: int, calls: int, step: Fared | None = None) -> None:
    """Hears of a step, or of a part of `step`; `asked` questions of it were new so far, and `calls`
    have been made in all."""
    step = step or Fared()
    if step not in self._steps:
      self._steps.append(step)
    step.reviews += len(reviews)
    step.ok += sum(review.status == "ok" for review in reviews)
    if asked and calls > self._calls:
      self.uncalled_steps, step.asked = 0, True
    elif asked and not step.asked:
      self.uncalled_steps, step.asked = self.uncalled_steps + 1, True
    self._calls = calls
    for status, n in collections.Counter(review.status for review in reviews).items():
      if why := self._reasons.get(status):
        self.warn(status, f"{n} of {len(reviews)} reviews failed at {self._where} ({why})")

  def failed(self, failed: CallFailed) -> None:
    """Remembers why, the last that failed so last; that a deadline of ours came says least."""
    if self._reasons and failed.about == "deadline":
      return
    self._reasons.pop(failed.status, None)
    self._reasons[failed.status] = f"{failed.status}: {failed}"

  def failures(self) -> str:
    """Who failed and how last; empty where nothing did."""
    last = next(reversed(self._reasons.values()), "")
    return f"{self._where} ({last})" if last else ""

  def problem(self) -> str | None:
    """Why a strict run should end; a run that is not is warned, once of each."""
    steps, uncalled = list(self._steps), self.uncalled_steps  # At once: the loop adds to them.
    asked = sum(step.reviews for step in steps)
    share = sum(step.ok for step in steps) / max(1, asked)
    if len(steps) == _WINDOW and asked and share < self._min_ok_frac:
      message = f"only {share:.0%} of the last {asked} reviews were usable"
      message += "; what failed gets uniform credit"
      message += f"; last failure: {last}" if (last := self.failures()) else ""
      if self._strict:
        return f"{message} (reviewer.client.min_ok_frac, strict)"
      self.warn("health", message)
    if uncalled >= _WINDOW:
      message = f"the reviewer was asked in each of the last {uncalled} steps, and made no call"
      if self._strict:
        return f"{message} (reviewer.client.strict)"
      self.warn("uncalled", message)
    return None

  def warn(self, kind: str, message: str) -> None:
    if kind not in self._told:
      print(f"warning: {message}", file=sys.stderr)
    self._told.add(kind)
