"""What a client may do: how much at once, how often, for how much money,
and when to leave a server alone.

Times are those of the `clock` that each is given. A budget belongs to all reviewers of a run,
everything else to one.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import threading
from collections.abc import AsyncIterator, Callable

from dca_jax.review.transports import CallFailed
from dca_jax.review.types import Share


class Gate:
  """At most `most` calls at once; fewer after the server said that it is too much, and more again
  as calls succeed."""

  def __init__(self, most: int, clock: Callable[[], float]):
    self.most, self.allowed, self.busy = most, float(most), 0
    self.opens, self._why = 0.0, ""
    self._clock, self._halved, self._since = clock, 0.0, 0
    self._waiting: collections.deque[tuple[float, asyncio.Future[None]]] = collections.deque()

  @contextlib.asynccontextmanager
  async def enter(self, end: float, beside: bool = False) -> AsyncIterator[None]:
    """Waits for a place; a call `beside` the others needs none.

    Raises:
      CallFailed: the server does not want to be called before `end`.
    """
    while self.busy >= int(self.allowed) and not beside:
      turn = asyncio.get_running_loop().create_future()
      try:
        self.check(end)
        self._waiting.append((end, turn))
        await turn
      except BaseException:
        self._let_in()  # It may have been this one's turn.
        raise
    self.busy += not beside
    try:
      while (wait := self.opens - self._clock()) > 0:
        self.check(end)
        await asyncio.sleep(wait)
      yield
    finally:
      self.busy -= not beside
      self._let_in()

  def check(self, end: float) -> None:
    """Raises CallFailed where nobody may begin before `end`."""
    if self.opens > max(end, self._clock()):
      raise CallFailed(self._why, "the server asked to wait until after the deadline")

  def _let_in(self) -> None:
    """Wakes as many as there is room for, and no more: thousands may be waiting."""
    room = int(self.allowed) - self.busy
    while room > 0 and self._waiting:
      _, turn = self._waiting.popleft()
      if not turn.done():
        turn.set_result(None)
        room -= 1

  def shut(self, wait: float, why: str) -> None:
    """Lets nobody begin for `wait` seconds, and tells those at once who cannot wait so long."""
    if (opens := self._clock() + wait) <= self.opens:
      return
    self.opens, self._why = opens, why
    for end, turn in self._waiting:
      if end < opens and not turn.done():
        turn.set_result(None)

  def too_many(self, wait: float) -> None:
    """The server is overloaded: halve, once for a burst of such replies, and shut for `wait`."""
    now = self._clock()
    self.shut(wait, "rate_limited")
    self._since = 0
    if now >= self._halved:
      self.allowed, self._halved = max(1.0, self.allowed / 2), now + max(wait, 0.5)

  def succeeded(self) -> None:
    """One more for every `allowed` successes; faster the longer nobody complains."""
    self._since += 1
    if self.allowed < self.most:
      self.allowed = min(float(self.most), self.allowed + (1 + self._since / 30) / self.allowed)
      self._let_in()


class Breaker:
  """Open after `patience` calls in a row that nobody answered, until one is answered.

  A call takes nothing from it that it would have to give back, so no end of a call can leave it
  open forever: who finds it open sends a probe now and then.
  """

  def __init__(self, clock: Callable[[], float], patience: int = 20):
    self._clock, self._patience, self._failures, self._answered = clock, patience, 0, -1.0
    self.probes = 0
    """Sent since somebody was answered."""

  @property
  def open(self) -> bool:
    return self._failures >= self._patience

  def answered(self) -> None:
    self._failures, self._answered, self.probes = 0, self._clock(), 0

  def failed(self) -> None:
    self._failures += 1

  def cut(self, began: float) -> None:
    """A call that a deadline cut off counts where nobody else was answered either since `began`."""
    if self._answered < began:
      self.failed()


class Purse:
  """Pays for further tries and is filled by successes: an outage does not multiply the calls."""

  def __init__(self) -> None:
    self._tries = 10.0

  def succeeded(self) -> None:
    self._tries = min(100.0, self._tries + 0.2)

  def pay(self) -> bool:
    enough = self._tries >= 1
    self._tries -= enough
    return enough


class Budget:
  """A cap in dollars on all reviewers of a run, each of which has a thread with a loop of its own.

  The most that a call can cost is reserved before it is made, and settled afterwards.
  """

  def __init__(self, most: float, share: Share):
    """Of `most`, and of what earlier processes have left of it, this one has its `share`."""
    self.cap, self.spent = most / share.processes, 0.0
    self._share, self._spenders = share, set[str]()
    self._reserved: list[float] = []
    self._lock = threading.Lock()
    self._waiting: list[concurrent.futures.Future[None]] = []

  def add_earlier(self, spender: str, dollars: float) -> None:
    """Counts what a reviewer has spent before; all processes must do so alike."""
    by_all = self._share.total(dollars)
    if spender not in self._spenders:
      self._spenders.add(spender)
      self.spent += dollars
      self.cap += dollars - by_all / self._share.processes

  async def reserve(self, dollars: float) -> bool:
    """Waits while what others have reserved may come back; False
    where the cap leaves no room in any case."""
    while True:
      with self._lock:
        if self.spent + dollars > self.cap:
          return False
        if self.spent + sum(self._reserved) + dollars <= self.cap:
          self._reserved.append(dollars)
          return True
        settled: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._waiting.append(settled)
      await asyncio.wrap_future(settled)

  def settle(self, reserved: float, dollars: float) -> float:
    """Books `dollars`, or what was reserved where that cannot be true; returns what it booked."""
    booked = dollars if 0 <= dollars <= reserved else reserved
    with self._lock:
      self._reserved.remove(reserved)
      self.spent += booked
      waiting, self._waiting = self._waiting, []
    for settled in waiting:
      if settled.set_running_or_notify_cancel():
        settled.set_result(None)
    return booked
