"""What a client may do: how much at once, how often, for how much money, and when to leave a server alone.

All of it belongs to one event loop. Seconds are the loop's own clock.
"""

import asyncio
import collections
import contextlib
import time
from collections.abc import AsyncIterator


class Gate:
  """At most `most` calls at once; fewer after the server said that it is too much, and more again as calls succeed."""

  def __init__(self, most: int):
    self.most, self.allowed, self.busy = most, float(most), 0
    self._waiting: collections.deque[asyncio.Future[None]] = collections.deque()
    self._not_before = self._halved = 0.0

  @contextlib.asynccontextmanager
  async def enter(self) -> AsyncIterator[None]:
    while self.busy >= int(self.allowed):
      turn = asyncio.get_running_loop().create_future()
      self._waiting.append(turn)
      try:
        await turn
      except asyncio.CancelledError:
        self._let_in()  # It may have been this one's turn.
        raise
    self.busy += 1
    try:
      while (wait := self._not_before - time.monotonic()) > 0:
        await asyncio.sleep(wait)
      yield
    finally:
      self.busy -= 1
      self._let_in()

  def _let_in(self) -> None:
    """Wakes as many as there is room for, and no more: thousands may be waiting."""
    room = int(self.allowed) - self.busy
    while room > 0 and self._waiting:
      turn = self._waiting.popleft()
      if not turn.done():
        turn.set_result(None)
        room -= 1

  def too_many(self, wait: float) -> None:
    """The server is overloaded: halve, once for a burst of such replies, and let nobody begin for `wait` seconds."""
    now = time.monotonic()
    self._not_before = max(self._not_before, now + wait)
    if now >= self._halved:
      self.allowed, self._halved = max(1.0, self.allowed / 2), now + max(wait, 0.5)

  def succeeded(self) -> None:
    if self.allowed < self.most:
      self.allowed = min(float(self.most), self.allowed + 1 / self.allowed)
      self._let_in()


class Breaker:
  """After `patience` failures in a row nobody calls for `pause` seconds; then one probes for all."""

  def __init__(self, patience: int = 20, pause: float = 5.0):
    self._patience, self._pause = patience, pause
    self._failures, self._until, self._probing = 0, 0.0, False

  def wait(self) -> float:
    """Seconds until the caller may try; 0 lets it through."""
    if self._failures < self._patience:
      return 0.0
    if (left := self._until - time.monotonic()) > 0:
      return left
    if self._probing:
      return 0.1
    self._probing = True
    return 0.0

  def succeeded(self) -> None:
    self._failures, self._probing = 0, False

  def failed(self) -> None:
    self._failures, self._probing = self._failures + 1, False
    if self._failures >= self._patience:
      self._until = time.monotonic() + self._pause


class Budget:
  """A cap in dollars. The most that a call can cost is reserved before it is made, and settled afterwards."""

  def __init__(self, cap: float, spent: float):
    self.cap, self.spent = cap, spent
    self._reserved: list[float] = []
    self._settled = asyncio.Event()

  async def reserve(self, dollars: float) -> bool:
    """Waits while what others have reserved may come back; False where the cap leaves no room in any case."""
    while self.spent + sum(self._reserved) + dollars > self.cap:
      if self.spent + dollars > self.cap:
        return False
      await self._settled.wait()
    self._reserved.append(dollars)
    return True

  def settle(self, reserved: float, dollars: float) -> None:
    self._reserved.remove(reserved)
    self.spent += dollars
    self._settled.set()  # For those who wait now, not for those who come later.
    self._settled = asyncio.Event()
