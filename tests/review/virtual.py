"""A client whose clock is virtual: hours of a bad server pass in a moment,
on a loaded machine too."""

import asyncio
import collections
import contextlib
import itertools
import json
import math
import selectors
from unittest import mock

from fake_server import asked_for, honest_reply

from dca_jax.review import Request, Share
from dca_jax.review.client import Client, Wallet
from dca_jax.review.client_config import ClientConfig
from dca_jax.review.limits import Budget
from dca_jax.review.prompt import Form
from dca_jax.review.transports import Reply


class _Selector(selectors.DefaultSelector):
  """Passes the time to the next timer instead of waiting for it."""

  now = 1000.0

  def select(self, timeout=None):
    if timeout:
      self.now += timeout
    return super().select(None if timeout is None else 0)


class Loop(asyncio.SelectorEventLoop):
  def __init__(self):
    self.virtual = _Selector()
    super().__init__(self.virtual)

  def time(self):
    return self.virtual.now


class Kept:
  """A cache that only remembers what is booked."""

  def __init__(self):
    self.booked = 0.0

  async def get(self, key):
    return None

  async def book(self, booking, dollars):
    booking.dollars = dollars
    self.booked += dollars
    return True

  def settle(self, booking, dollars):
    self.booked += dollars - booking.dollars

  def put(self, key, model, text): ...

  def spent(self, reviewer):
    return 0.0

  def close(self): ...


class Server:
  """A transport that answers `mode` after `latency` seconds: a Reply, an error,
  or None for never."""

  def __init__(self, latency=0.1):
    self.mode, self.latency = honest, latency
    self.calls: list[float] = []
    self.in_flight = self.most_in_flight = 0

  async def __call__(self, system, user, schema, max_tokens, seed):
    self.calls.append(asyncio.get_running_loop().time())
    self.in_flight += 1
    self.most_in_flight = max(self.most_in_flight, self.in_flight)
    try:
      answer = self.mode(user)
      await asyncio.sleep(self.latency)
      if answer is None:
        await asyncio.sleep(math.inf)
      if isinstance(answer, Exception):
        raise answer
      return answer
    finally:
      self.in_flight -= 1

  async def close(self): ...


def honest(user, prompt=500, cached=0, output=100, thought=0):
  return Reply(json.dumps(honest_reply(asked_for(user))), prompt, cached, output, thought, "fake")


@contextlib.contextmanager
def opened(server, budget=None, cache=None, price=None, **settings):
  """A client of `server` on a virtual clock; drive it with `run`."""
  wallet = Wallet(lambda: price, budget or Budget(math.inf, Share()))
  with mock.patch("asyncio.new_event_loop", Loop):
    client = Client(
      ClientConfig(**settings), lambda: server, "fake", Form(""), wallet, cache or Kept(), 1
    )
  with contextlib.closing(client):
    yield client


def run(client, drive):
  """Awaits `drive(step, sleep)` in the client's loop, where time passes only as it is waited for.

  `await step(count, deadline)` asks for new reviews; it returns their statuses, counted, and the
  seconds that it waited. With `submit`, of `begin_step`, they are a part of that step.
  """
  loop, numbers = client._loop, itertools.count()

  async def step(count, deadline=10.0, submit=client.submit):
    own = itertools.islice(numbers, count)
    asked = [Request(f"1/{i}", f"problem {i}", ("a;", "b"), True, False) for i in own]
    began = loop.time()
    reviews = await asyncio.wrap_future(submit(asked, deadline))
    assert len(reviews) == count
    return collections.Counter(review.status for review in reviews), loop.time() - began

  return asyncio.run_coroutine_threadsafe(drive(step, asyncio.sleep), loop).result(60)
