"""The client: runs a language model as a reviewer, so that training does not notice how it fails.

One background thread with one event loop owns every connection. A call to `submit` returns at once; its result comes by
the deadline, with a status for every request. What fails is counted and costs credit its detail, never the run.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import math
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence

from aiolimiter import AsyncLimiter

from dca_jax.checks import at_least, between, one_of, positive
from dca_jax.review.cache import Booking, Cache
from dca_jax.review.limits import Breaker, Budget, Gate
from dca_jax.review.prices import Price, dollars
from dca_jax.review.prompt import MAX_STEPS, Prompt, make_prompt, parse_reply, speaks_to_the_reviewer
from dca_jax.review.transports import SERVER_SECONDS, CallFailed, Reply, Transport
from dca_jax.review.types import Request, Review, Share, Usage, finished

_FATAL_AFTER = 3
_LONGEST_PAUSE = 30.0
_HEALTH_WINDOW = 5  # steps


@dataclasses.dataclass(frozen=True)
class ClientConfig:
  """The `reviewer.client` section: how a language model is called."""

  model: str = "gemini-3.5-flash-lite"
  thinking: str = ""
  """The model's level of thought (`minimal`, `low`, `medium`, `high`); empty leaves it to the model."""
  base_url: str = ""
  """The server's address: needed for `openai`, and for `gemini` that of a gateway."""
  vertex: bool = False
  """`gemini`: through Google Cloud, with ambient credentials and GOOGLE_CLOUD_PROJECT, instead of a key."""
  rubric: str = ""
  """A text file with your own description of roles and weights, in the place of ours."""
  whole_group: bool = False
  """One call for all completions of a problem: cheaper, but one answer can try to talk about another."""
  concurrency: int = 48
  """Calls at once; fewer while the server says that it is too much."""
  requests_per_minute: int = 0
  """0: no limit of our own."""
  tokens_per_minute: int = 0
  attempts: int = 4
  attempt_seconds: float = 20.0
  max_dollars: float = 10.0
  """Spending of the whole run, resumptions included, of each reviewer where there are several; 0 for servers that cost
  nothing."""
  on_budget: str = "degrade"
  """When the money is gone: `degrade` to uniform credit, or `stop` the run."""
  prompt_price: float = 0.0
  output_price: float = 0.0
  """Dollars per million tokens, for models that the price table does not know."""
  max_output_tokens: int = 0
  """Of one reply, thought included; 0: 2,048 and 40 for each step."""
  min_ok_frac: float = 0.5
  """Below this share of usable reviews, over five steps, there is a warning, and with `strict` an end."""
  strict: bool = False
  repeat_frac: float = 0.0
  """Share of reviews that are asked for a second time, to see how far the model agrees with itself."""

  def check(self) -> dict[str, str]:
    amounts = ("requests_per_minute", "tokens_per_minute", "max_dollars", "prompt_price", "output_price")
    bad = at_least(1, self, "concurrency", "attempts") | at_least(0, self, *amounts, "max_output_tokens")
    bad |= between(0, 1, self, "min_ok_frac", "repeat_frac") | positive(self, "attempt_seconds", most=SERVER_SECONDS)
    bad |= one_of(self, "thinking", "minimal", "low", "medium", "high", "")
    return bad | one_of(self, "on_budget", "degrade", "stop")

  def unused(self) -> dict[str, str]:
    keys = ("on_budget", "prompt_price", "output_price") if not self.max_dollars else ()
    return dict.fromkeys(keys, "reviewer.client.max_dollars is 0")


class Client:
  """A reviewer; see `types.Reviewer`. Opened once in a run, and closed at its end."""

  def __init__(
    self,
    config: ClientConfig,
    open_transport: Callable[[], Transport],
    name: str,
    rubric: str,
    price: Price | None,
    cache: Cache,
    share: Share,
  ):
    """`name` tells models and servers apart in the cache; `price` None is for those that cost nothing.

    Of the limits and of what is left of the money this process has its `share`.
    """
    self._config, self._rubric, self._price, self._cache = config, rubric, price, cache
    self._name = f"{name}/{config.model}/{config.thinking}/{config.max_output_tokens}"
    self._start_counting()
    self._health: collections.deque[tuple[int, int]] = collections.deque(maxlen=_HEALTH_WINDOW)
    self._refusals, self._refused = 0, ""
    self._warned = self._broke = self._closed = False
    self._dice = random.Random(0)
    self._purse = 10.0  # Pays for further tries and is filled by successes, so that an outage does not multiply calls.
    self._flying: dict[str, asyncio.Future[list[Review]]] = {}
    self._transport, n = open_transport(), share.processes
    self._gate, self._breaker = Gate(-(-config.concurrency // n)), Breaker()
    spent = cache.spent(self._name)
    cap = spent + (config.max_dollars - share.total(spent)) / n
    self._budget = Budget(cap if price else math.inf, spent)
    self._per_minute = _limiter(config.requests_per_minute / n)
    self._tokens = _limiter(config.tokens_per_minute / n)
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever, name="reviewer", daemon=True)
    self._thread.start()

  def _start_counting(self) -> None:
    self._statuses: collections.Counter[str] = collections.Counter()
    self._usage, self._cached = Usage(), 0
    self._seconds: list[float] = []
    self._agreed: list[float] = []

  # What the training thread calls.

  def submit(self, requests: Sequence[Request], deadline: float) -> "concurrent.futures.Future[list[Review]]":
    if self._closed:
      return finished([Review("closed")] * len(requests))
    return asyncio.run_coroutine_threadsafe(self._review(list(requests), time.monotonic() + deadline), self._loop)

  def stats(self) -> dict[str, float]:
    """Shares of statuses, what was spent, and how long calls took, since the last call."""
    if self._closed:
      return {}
    # In the loop, which goes on counting while another batch is being reviewed.
    return asyncio.run_coroutine_threadsafe(self._take_stats(), self._loop).result()

  async def _take_stats(self) -> dict[str, float]:
    asked = max(1, sum(self._statuses.values()))
    out = {f"review/status_{status}": n / asked for status, n in sorted(self._statuses.items())}
    out |= {f"review/{k}": float(v) for k, v in dataclasses.asdict(self._usage).items()}
    out |= {"review/cached": self._cached / asked, "review/concurrency": float(int(self._gate.allowed))}
    out["review/dollars_spent"] = self._budget.spent
    if self._seconds:
      out["review/call_seconds_median"] = statistics.median(self._seconds)
      out["review/call_seconds_95"] = sorted(self._seconds)[int(0.95 * len(self._seconds))]
    if self._agreed:
      out["review/repeat_agreement"] = statistics.fmean(self._agreed)
    self._start_counting()
    return out

  def problem(self) -> str | None:
    if self._refused:
      return f"the reviewer refuses every call ({self._refused}); correct the reviewer section or the key"
    if self._broke and self._config.on_budget == "stop":
      return f"reviewer.client.max_dollars: ${self._config.max_dollars:g} are spent"
    health = list(self._health)  # At once: the loop adds to it.
    asked = sum(n for n, _ in health)
    share = sum(ok for _, ok in health) / max(1, asked)
    if len(health) == _HEALTH_WINDOW and asked and share < self._config.min_ok_frac:
      message = f"only {share:.0%} of the last {asked} reviews were usable; what failed gets uniform credit"
      if self._config.strict:
        return f"{message} (reviewer.client.min_ok_frac, strict)"
      if not self._warned:
        print(f"warning: {message}", file=sys.stderr)
      self._warned = True
    return None

  def close(self) -> None:
    """Ends what is under way, at once; what was sent counts as spent."""
    if self._closed:
      return
    self._closed = True

    async def end():
      await _cancel(asyncio.all_tasks() - {asyncio.current_task()}, 0.2)
      try:
        await asyncio.wait_for(self._transport.close(), 0.2)
      finally:
        self._loop.stop()

    asyncio.run_coroutine_threadsafe(end(), self._loop)
    self._thread.join(1.0)
    self._cache.close()

  # In the loop.

  async def _review(self, requests: list[Request], end: float) -> list[Review]:
    reviews = [Review("timeout")] * len(requests)
    calls: dict[str | int, list[int]] = collections.defaultdict(list)  # The requests that share a call.
    for i, request in enumerate(requests):
      if speaks_to_the_reviewer(request):  # Such text is not put before it.
        reviews[i] = Review("suspicious")
      else:
        calls[request.problem if self._config.whole_group else i].append(i)
    jobs = {asyncio.create_task(self._job([requests[i] for i in own], end)): own for own in calls.values()}
    repeats = {
      i: asyncio.create_task(self._job([requests[i]], end, again=1))
      for i in sorted(itertools.chain(*calls.values()))
      if _fraction(requests[i].id) < self._config.repeat_frac
    }
    if tasks := [*jobs, *repeats.values()]:
      with contextlib.suppress(asyncio.CancelledError):  # The client is being closed.
        await asyncio.wait(tasks, timeout=max(0.0, end - time.monotonic()))
      await _cancel([task for task in tasks if not task.done()], 0.1)
    for task, own in jobs.items():
      for i, review in zip(own, _outcome(task, len(own)), strict=True):
        reviews[i] = review
    for i, task in repeats.items():
      again = _outcome(task, 1)[0]
      if again.status == reviews[i].status == "ok":
        self._agreed.append(statistics.fmean(a == b for a, b in zip(again.roles, reviews[i].roles, strict=True)))
    self._statuses.update(review.status for review in reviews)
    self._cached += sum(review.cached for review in reviews)
    self._health.append((len(reviews), sum(review.status == "ok" for review in reviews)))
    return reviews

  async def _job(self, requests: list[Request], end: float, again: int = 0) -> list[Review]:
    """The reviews of answers that share one call."""
    prompt = make_prompt(self._rubric, requests)
    key = hashlib.sha256(f"{self._name}/{again}/{prompt.key}".encode()).hexdigest()
    if key in self._flying:
      return await asyncio.shield(self._flying[key])
    self._flying[key] = flying = self._loop.create_future()
    reviews = [Review("timeout")] * len(requests)
    try:
      reviews = await self._kept(requests, prompt, key) or await self._call(requests, prompt, key, end, again)
      return reviews
    finally:
      del self._flying[key]
      flying.set_result(reviews)

  async def _kept(self, requests: list[Request], prompt: Prompt, key: str) -> list[Review]:
    """The reviews of a reply that was paid for before; none where there is no such reply."""
    if (kept := await self._cache.get(key)) is not None:
      with contextlib.suppress(CallFailed):  # A damaged row is asked for anew.
        return _reviews(requests, prompt, str(kept[1]), str(kept[0]), cached=True)
    return []

  async def _call(self, requests, prompt: Prompt, key: str, end: float, again: int) -> list[Review]:
    status, malformed = "timeout", 0
    for attempt in range(self._config.attempts):
      if self._refused:
        status = "client_error"
        break
      if attempt and self._purse < 1:
        break
      self._purse -= attempt > 0
      while (wait := self._breaker.wait()) > 0:
        if time.monotonic() + wait > end:
          return [Review("circuit_open")] * len(requests)
        await asyncio.sleep(wait)
      try:
        reply = await self._attempt(requests, prompt, end, attempt + 10 * again)
        self._breaker.succeeded()
        self._purse += 0.2
        self._gate.succeeded()
        self._refusals = 0
        reviews = _reviews(requests, prompt, reply.text or "", reply.model)
        self._cache.put(key, reply.model, reply.text or "")
        return reviews
      except CallFailed as failed:
        status = failed.status
        if status == "client_error":
          self._refusals += 1
          if self._refusals >= _FATAL_AFTER:
            self._refused = str(failed)
        if status in ("server_error", "connection", "timeout"):
          self._breaker.failed()
        malformed += status == "malformed"
        if not failed.again or malformed == 2:
          break
        if status == "rate_limited":
          self._gate.too_many(min(failed.wait if failed.wait is not None else self._backoff(attempt), _LONGEST_PAUSE))
        elif status != "malformed":
          await asyncio.sleep(min(failed.wait or self._backoff(attempt), _LONGEST_PAUSE))
    return [Review(status)] * len(requests)

  async def _attempt(self, requests, prompt: Prompt, end: float, attempt: int) -> Reply:
    """One call, within every limit; books what it cost, also where nobody waits for it any more."""
    most_output = self._config.max_output_tokens or 2048 + 40 * sum(prompt.counts)
    # No token is shorter than a character. English has four in one, digits and escapes one or two.
    most_prompt = len(prompt.system) + len(prompt.user)
    most = dollars(self._price, most_prompt, 0, most_output) if self._price else 0.0
    if self._per_minute:
      await self._per_minute.acquire()
    if self._tokens:
      await self._tokens.acquire(min(most_prompt // 3, self._tokens.max_rate))
    async with self._gate.enter():
      if self._refused:
        raise CallFailed("client_error", self._refused)
      if not await self._budget.reserve(most):
        self._broke = True
        raise CallFailed("budget", "the spending cap is reached")
      booking, began = Booking(self._name), time.monotonic()
      cost, sent, reply = 0.0, 0, None
      try:
        if not await self._cache.book(booking, most):
          raise CallFailed("unbooked", "what it costs cannot be booked")
        cost, sent = most, 1  # A call without an answer may have been billed.
        if attempt:
          prompt = make_prompt(self._rubric, requests, attempt)
        async with asyncio.timeout(max(0.0, min(self._config.attempt_seconds, end - began))):
          reply = await self._transport(prompt.system, prompt.user, prompt.schema, most_output, attempt)
      except TimeoutError:
        raise CallFailed("timeout", "no answer in time", again=True, billed=True) from None
      except CallFailed as failed:
        reply, cost = failed.usage, most if failed.billed else 0.0
        raise
      except Exception as error:
        raise CallFailed("client_error", f"{type(error).__name__}: {error}"[:200]) from error
      finally:
        used = self._used(reply, most) if reply else Usage(calls=sent, dollars=cost)
        self._seconds.append(time.monotonic() - began)
        self._usage += used
        self._budget.settle(most, used.dollars)
        self._cache.settle(booking, used.dollars)
    return reply

  def _used(self, reply: Reply, most: float) -> Usage:
    known = reply.prompt_tokens is not None and reply.output_tokens is not None
    prompt, output = reply.prompt_tokens or 0, reply.output_tokens or 0
    cost = dollars(self._price, prompt, reply.cached_tokens, output) if self._price and known else most
    return Usage(1, prompt, reply.cached_tokens, output, reply.thought_tokens, cost)

  def _backoff(self, attempt: int) -> float:
    return self._dice.uniform(0, min(8.0, 0.25 * 2**attempt))


def _reviews(requests, prompt: Prompt, text: str, model: str, cached: bool = False) -> list[Review]:
  """Raises CallFailed where the text is no review of these answers."""
  try:
    verdicts = parse_reply(text, prompt.counts)
  except ValueError as error:
    raise CallFailed("malformed", str(error), again=True) from None
  reviews = []
  for request, verdict in zip(requests, verdicts, strict=True):
    if verdict.suspicious:
      reviews.append(Review("suspicious", model=model, cached=cached))
      continue
    merged = max(0, len(request.steps) - MAX_STEPS)  # The last verdict holds for all that were shown as one.
    roles, weights = verdict.roles + verdict.roles[-1:] * merged, verdict.weights + verdict.weights[-1:] * merged
    reviews.append(Review("ok", roles, weights, sure=verdict.sure, model=model, cached=cached))
  return reviews


def _limiter(per_minute: float) -> AsyncLimiter | None:
  # It cannot hold less than the one that is asked for at once.
  return AsyncLimiter(max(1.0, per_minute), 60 * max(1.0, 1 / per_minute)) if per_minute else None


async def _cancel(tasks, seconds: float) -> None:
  for task in tasks:
    task.cancel()
  if tasks:
    await asyncio.wait(tasks, timeout=seconds)


def _outcome(task: "asyncio.Task[list[Review]]", count: int) -> list[Review]:
  if not task.done() or task.cancelled():
    return [Review("timeout")] * count
  return [Review("client_error")] * count if task.exception() else task.result()


def _fraction(name: str) -> float:
  """A number in [0, 1) that belongs to a name."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6]) / 2**48
