"""A plain Python function as a reviewer: called in threads, kept to the deadline, never trusted."""

import collections
import operator
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from dca_jax.review.types import Request, Review, Reviewer


class Calls(Reviewer):
  """Asks a function about each episode. What it raises, and what is no review, is a failed one."""

  def __init__(self, review: Callable[[Request], Review], name: str, threads: int):
    self._review, self._name, self._error = review, name, ""
    self._told: set[str] = set()
    self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
    self._lock = threading.Lock()
    self._statuses: collections.Counter[str] = collections.Counter()
    # Daemons: a call that never returns does not keep the program from ending.
    self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
    for thread in self._threads:
      thread.start()

  def submit(self, requests: Sequence[Request], deadline: float) -> "Future[list[Review]]":
    requests, end = list(requests), time.monotonic() + deadline
    reviews = [Review("timeout")] * len(requests)
    result: Future[list[Review]] = Future()
    missing = set(range(len(requests)))

    def finish(i: int | None) -> None:
      with self._lock:
        missing.discard(-1 if i is None else i)
        if (
          result.done() or (missing and i is not None) or not result.set_running_or_notify_cancel()
        ):
          return
        said = list(reviews)
        self._statuses.update(review.status for review in said)
      result.set_result(said)

    def job(i: int) -> Callable[[], None]:
      def call() -> None:
        if time.monotonic() < end:
          reviews[i] = self._ask(requests[i])
        finish(i)

      return call

    timer = threading.Timer(deadline, finish, [None])
    timer.daemon = True
    timer.start()
    result.add_done_callback(lambda _: timer.cancel())
    for i in range(len(requests)):
      self._jobs.put(job(i))
    if not requests:
      finish(None)
    return result

  def _work(self) -> None:
    while (job := self._jobs.get()) is not None:
      job()

  def _ask(self, request: Request) -> Review:
    try:
      review = _plain(self._review(request))
    except BaseException as error:  # Also SystemExit, which would end the thread.
      self._failed("client_error", f"{type(error).__name__}: {error}"[:300])
      return Review("client_error")
    if review.status == "ok" and (why := review.misfit(len(request.steps))):
      self._failed("invalid", why[:300])
    elif review.status != "ok" and (review.roles or review.values):
      self._failed(review.status, f"the status is {review.status!r} and not 'ok'")
    return review.checked(len(request.steps))

  def _failed(self, kind: str, why: str) -> None:
    """Says so once of each kind."""
    with self._lock:
      new, self._error = kind not in self._told, f"{self._name}: {why}"
      self._told.add(kind)
    if new:
      then = " Such" if why.endswith("?") else "; such"
      said = f"warning: reviewer {self._name}: {why}{then} reviews count as failed ({kind})"
      print(said, file=sys.stderr)

  def stats(self) -> dict[str, float]:
    with self._lock:
      counted, self._statuses = self._statuses, collections.Counter()
    asked = max(1, sum(counted.values()))
    return {f"review/status_{status}": n / asked for status, n in sorted(counted.items())}

  def failures(self) -> str:
    return self._error

  def close(self) -> None:
    for _ in self._threads:
      self._jobs.put(None)


def _plain(review: Review) -> Review:
  """A review of plain numbers; without weights, each step weighs 1."""
  if not isinstance(review, Review):
    raise TypeError(f"a reviewer returns a Review, not {review!r}")
  roles = tuple(map(str, review.roles))
  weights = tuple(map(float, review.weights)) or (1.0,) * len(roles)
  values = tuple(map(float, review.values))
  return Review(
    str(review.status),
    roles,
    weights,
    values,
    bool(review.sure),
    bool(review.suspicious),
    str(review.model),
    reasons=tuple(map(str, review.reasons)),
    rewrite=review.rewrite and (operator.index(review.rewrite[0]), str(review.rewrite[1])),
  )
