"""The client: runs a language model as a reviewer, so that training does not notice how it fails.

One background thread with one event loop owns every connection. A call to `submit` returns at once;
its result comes by the deadline, with a status for every request. What fails is counted and costs
credit its detail, never the run.
"""

import asyncio
import atexit
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import random
import statistics
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from aiolimiter import AsyncLimiter

from dca_jax.review.cache import Booking, Cache
from dca_jax.review.client_config import ClientConfig
from dca_jax.review.health import Fared, Health, Refusals, meaning
from dca_jax.review.limits import Breaker, Budget, Gate, Purse
from dca_jax.review.panel import combine_reviews
from dca_jax.review.prices import Price, dollars, usage
from dca_jax.review.prompt import MAX_STEPS, Form, Prompt, ask_about
from dca_jax.review.transports import CallFailed, Reply, Transport
from dca_jax.review.trial import CHANCE, PASSING, PLANTED, TRIES, found
from dca_jax.review.types import Request, Review, Submit, Trial, Usage, finished


class Wallet(NamedTuple):
  """What calls cost and what may be spent."""

  price: Callable[[], Price | None]
  """At the time of a call, because prices change; None for models that cost nothing."""
  budget: Budget


@dataclasses.dataclass
class _Step:
  """What is asked in one training step, in parts, or a probe of our own."""

  began: float
  seconds: float = 0.0
  """That its last part has."""
  end: float = 0.0
  """Later with every part: none has less time than if all were asked together with the last."""
  fared: Fared = dataclasses.field(default_factory=Fared)
  asked: int = 0
  """Questions that the cache did not answer."""
  probed: bool = False
  """Whether it has sent a probe."""
  is_probe: bool = False
  fresh: bool = False
  """Whether the cache is not asked."""


class _Answer(NamedTuple):
  """How a question ended."""

  status: str
  said: Any = None
  """What `Prompt.read` made of the reply; None where there is none."""
  model: str = ""
  cached: bool = False


class Client:
  """A reviewer; see `types.Reviewer`. Opened once in a run, and closed at its end."""

  def __init__(
    self,
    config: ClientConfig,
    open_transport: Callable[[], Transport],
    name: str,
    form: Form,
    wallet: Wallet,
    cache: Cache,
    processes: int,
  ):
    """`name` tells models and servers apart; of the limits each of `processes` has its part."""
    self._config, self._form, self._wallet, self._cache = config, form, wallet, cache
    self._spender = f"{name}/{config.model}"
    self._name = f"{self._spender}/{config.thinking}/{config.max_output_tokens}"
    self._start_counting()
    self._broke = self._closed = False
    self._refused, self._calls = "", 0
    self._dice = random.Random(0)
    self._flying: dict[str, asyncio.Future[_Answer]] = {}
    self._transport = open_transport()
    if remember := getattr(self._transport, "remember", None):
      remember(cache)
    self._loop = asyncio.new_event_loop()
    clock = self._loop.time
    self._gate, self._breaker = Gate(-(-config.concurrency // processes), clock), Breaker(clock)
    self._purse, self._refusals = Purse(), Refusals(clock)
    wallet.budget.add_earlier(self._spender, cache.spent(self._spender))
    self._health = Health(config.min_ok_frac, config.strict, config.where)
    self._probe_task: asyncio.Task[_Answer] | None = None
    self._probe_began = self._answer_seconds = 0.0
    self._per_minute = _limiter(config.requests_per_minute / processes)
    self._tokens = _limiter(config.tokens_per_minute / processes)
    self._thread = threading.Thread(target=self._run, name="reviewer", daemon=True)
    self._thread.start()
    atexit.register(self.close)  # Connections that outlive their loop complain.

  def _start_counting(self) -> None:
    self._statuses: collections.Counter[str] = collections.Counter()
    self._usage, self._cached, self._suspicious = Usage(), 0, 0
    self._seconds: list[float] = []
    self._agreed: list[float] = []

  def _run(self) -> None:
    self._loop.run_forever()
    self._loop.close()

  # What the training thread calls.

  def submit(
    self, requests: Sequence[Request], deadline: float
  ) -> "concurrent.futures.Future[list[Review]]":
    return self.begin_step()(requests, deadline)

  def begin_step(self, step: int = 0) -> Submit:
    return functools.partial(self._submit, _Step(self._loop.time()))

  def _submit(
    self, step: _Step, requests: Sequence[Request], deadline: float
  ) -> "concurrent.futures.Future[list[Review]]":
    if self._closed:
      return finished([Review("closed")] * len(requests))
    reviewing = self._review(list(requests), step, self._loop.time(), deadline)
    return asyncio.run_coroutine_threadsafe(reviewing, self._loop)

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
    out |= {
      "review/cached": self._cached / asked,
      "review/concurrency": float(int(self._gate.allowed)),
    }
    out["review/suspicious"] = self._suspicious / asked
    out["review/uncalled_steps"] = float(self._health.uncalled_steps)
    out["review/dollars_spent"] = self._wallet.budget.spent
    if self._seconds:
      out["review/call_seconds_median"] = statistics.median(self._seconds)
      out["review/call_seconds_95"] = sorted(self._seconds)[int(0.95 * len(self._seconds))]
    if self._agreed:
      out["review/repeat_agreement"] = statistics.fmean(self._agreed)
    self._start_counting()
    return out

  def problem(self) -> str | None:
    if self._refused:
      hint = "correct the reviewer section or the key"
      return f"the reviewer refuses every call ({self._refused}); {hint}"
    if self._broke and self._config.on_budget == "stop":
      return f"reviewer.client.max_dollars: ${self._config.max_dollars:g} are spent"
    return self._health.problem()

  def trial(self, seconds: float) -> Trial:
    if self._closed or not self._config.at_once:
      return Trial()
    seconds += max(0.0, self._config.attempt_seconds - 60.0)  # For a server that is known as slow.
    return asyncio.run_coroutine_threadsafe(
      self._trial(self._loop.time() + seconds), self._loop
    ).result()

  def failures(self) -> str:
    return self._health.failures()

  def close(self) -> None:
    """Ends what is under way, at once; what was sent counts as spent."""
    if self._closed:
      return
    self._closed = True
    atexit.unregister(self.close)

    async def end():
      await _cancel(asyncio.all_tasks() - {asyncio.current_task()}, 0.2)
      try:
        await asyncio.wait_for(self._transport.close(), 2.0)
      finally:
        self._loop.stop()

    asyncio.run_coroutine_threadsafe(end(), self._loop)
    self._thread.join(3.0)
    self._cache.close()

  # In the loop.

  async def _review(
    self, requests: list[Request], step: _Step, began: float, seconds: float
  ) -> list[Review]:
    step.seconds, step.end = seconds, began + seconds
    reviews = [Review("timeout")] * len(requests)
    calls: dict[str | int, list[int]] = collections.defaultdict(
      list
    )  # The requests that share a call.
    for i, request in enumerate(requests):
      together = self._config.whole_group and len(request.steps) <= MAX_STEPS
      calls[request.problem if together else i].append(i)
    jobs = {
      asyncio.create_task(self._sampled([requests[i] for i in own], step)): own
      for own in calls.values()
    }
    repeats = {
      i: asyncio.create_task(self._job([requests[i]], step, again=self._config.samples))
      for i in sorted(itertools.chain(*calls.values()))
      if _fraction(requests[i].id) < self._config.repeat_frac
    }
    tasks = [*jobs, *repeats.values()]
    with contextlib.suppress(asyncio.CancelledError):  # The client is being closed.
      await self._until_end(step, tasks)
    await _cancel([task for task in tasks if not task.done()], 0.1)
    for task, own in jobs.items():
      for i, review in zip(own, _outcome(task, len(own)), strict=True):
        reviews[i] = review
    for i, task in repeats.items():
      again = _outcome(task, 1)[0]
      if again.status == reviews[i].status == "ok" and again.roles:
        self._agreed.append(
          statistics.fmean(a == b for a, b in zip(again.roles, reviews[i].roles, strict=True))
        )
    self._statuses.update(review.status for review in reviews)
    self._cached += sum(review.cached for review in reviews)
    self._suspicious += sum(review.suspicious for review in reviews)
    if not self._closed:  # What closing cuts off is no failure.
      self._health.step(reviews, step.asked, self._calls, step.fared)
    return reviews

  async def _until_end(self, step: _Step, tasks) -> None:
    """Waits for all of them, until a step's end, which may move meanwhile."""
    while tasks and (left := step.end - self._loop.time()) > 0:
      _, tasks = await asyncio.wait(tasks, timeout=left)

  async def _sampled(self, requests: list[Request], step: _Step) -> list[Review]:
    """Asks as often as is wanted; several reviews are combined as those of a panel are."""
    samples = range(self._config.samples)
    each = await asyncio.gather(*(self._job(requests, step, again) for again in samples))
    return [
      combine_reviews(own, "vote")[0] if own[1:] else own[0] for own in zip(*each, strict=True)
    ]

  async def _job(self, requests: list[Request], step: _Step, again: int = 0) -> list[Review]:
    """The reviews of answers that share their calls."""
    asking, answers = ask_about(self._form, requests), list[_Answer]()
    prompts = next(asking)
    while prompts:
      now = await asyncio.gather(*(self._answer(prompt, step, again) for prompt in prompts))
      if all(answer.said is None for answer in now):
        return [Review(now[0].status)] * len(requests)
      answers += now
      try:
        prompts = asking.send([answer.said for answer in now])
      except StopIteration as end:
        model = next(a.model for a in answers if a.status == "ok")
        cached = all(answer.cached for answer in answers)
        return [dataclasses.replace(review, model=model, cached=cached) for review in end.value]
    return [Review("skipped")] * len(requests)  # There is no step.

  async def _answer(self, prompt: Prompt, step: _Step, again: int) -> _Answer:
    """That of the cache, of whoever is asking the same, or of the model."""
    key = hashlib.sha256(f"{self._name}/{again}/{prompt.key}".encode()).hexdigest()
    if key in self._flying:
      return await asyncio.shield(self._flying[key])
    self._flying[key] = flying = self._loop.create_future()
    answer = _Answer("timeout")
    try:
      kept = None if step.fresh else await self._kept(prompt, key)
      answer = kept or await self._call(prompt, key, step, again)
      return answer
    finally:
      del self._flying[key]
      flying.set_result(answer)

  async def _kept(self, prompt: Prompt, key: str) -> _Answer | None:
    """What a reply that was paid for before says; None where there is no such reply."""
    if (kept := await self._cache.get(key)) is not None:
      with contextlib.suppress(ValueError):  # A damaged row is asked for again.
        return _Answer("ok", prompt.read(str(kept[1])), str(kept[0]), cached=True)
    return None

  async def _trial(self, end: float) -> Trial:
    """Asks until there is a review, the time is up, or another try would not help."""
    began, spent = self._loop.time(), self._usage.dollars
    where, chances = self._config.where, 0
    for again in itertools.count():
      step = _Step(began, end - began, end, is_probe=True, fresh=True)
      (review,) = await self._job([PLANTED], step, again)
      if review.status in ("ok", "suspicious"):
        seconds, cost = self._loop.time() - began, self._usage.dollars - spent
        return Trial(
          f"{review.model or self._config.model} at {where} reviewed a planted answer in"
          f" {seconds:.1f} s for ${cost:.4f}: {found(review)}"
        )
      chances += review.status in CHANCE
      hopeful = review.status in PASSING or (review.status in CHANCE and chances < TRIES)
      if not hopeful or (left := end - self._loop.time()) <= 0:
        break
      await asyncio.sleep(min(left, 0.1 * 2 ** min(again, 5)))
    if (
      review.status == "budget"
    ):  # No fault of the server: the run goes on without reviews, or ends.
      return Trial(f"{where} was not asked: reviewer.client.max_dollars are spent")
    return Trial(wrong=self._health.failures())

  def _probe(self, prompt: Prompt, key: str, step: _Step) -> None:
    """Asks one of the questions of a step, which does not wait for it: is the server back?

    The first few of an outage do not wait for each other, because the server may come back while
    one hangs; later ones leave each other a quarter of the time that a call may take.
    """
    now, most = self._loop.time(), self._config.attempt_seconds
    under_way = self._probe_task is not None and not self._probe_task.done()
    wait = under_way and self._breaker.probes >= 4 and now < self._probe_began + most / 4
    if wait or step.probed:
      return
    step.probed, self._probe_began = True, now
    self._breaker.probes += 1
    own = _Step(now, most, now + most, is_probe=True)
    self._probe_task = asyncio.create_task(self._call(prompt, key, own, 0))
    self._loop.call_later(most, self._probe_task.cancel)

  async def _call(self, prompt: Prompt, key: str, step: _Step, again: int) -> _Answer:
    step.asked += 1
    if self._breaker.open and not (step.is_probe or self._refused):
      self._probe(prompt, key, step)
      return _Answer("circuit_open")
    status, malformed = "timeout", 0
    for attempt in range(1 if step.is_probe else self._config.attempts):
      if attempt and self._breaker.open:
        break
      try:
        reply = await self._attempt(prompt, step, attempt + 10 * again)
        try:
          said = prompt.read(reply.text or "")
        except ValueError as error:
          raise CallFailed("malformed", str(error), again=True, about="content") from None
        self._cache.put(key, reply.model, reply.text or "")
        self._purse.succeeded()
        return _Answer("ok", said, reply.model)
      except CallFailed as failed:
        status, means = failed.status, meaning(failed)
        self._health.failed(failed)
        malformed += status == "malformed"
        if not failed.again or malformed == 2 or (means.charged and not self._purse.pay()):
          break
        if means.server == "failed":  # Where it answered, the next attempt waits at the gate.
          wait = self._backoff(attempt) if failed.wait is None else failed.wait
          if self._loop.time() + wait > step.end:
            break
          await asyncio.sleep(wait)
    return _Answer(status)

  async def _attempt(self, prompt: Prompt, step: _Step, attempt: int) -> Reply:
    """One call, within every limit."""
    # No token is shorter than a byte. English has four in one, digits and escapes one or two.
    sent = (prompt.system, prompt.user(), json.dumps(prompt.schema))
    most_output = self._config.max_output_tokens or prompt.tokens
    most = sum(len(text.encode()) for text in sent), most_output
    last = step.end - self._answer_seconds  # Who begins later will hardly be answered.
    self._gate.check(last)
    if self._per_minute:
      await self._per_minute.acquire()
    if self._tokens:
      await self._tokens.acquire(min(most[0] // 3, self._tokens.max_rate))
    async with self._gate.enter(last, beside=step.is_probe):
      if self._refused:
        raise CallFailed("client_error", self._refused)
      if self._breaker.open and not step.is_probe:
        raise CallFailed("circuit_open", "the server does not answer")
      price = self._wallet.price()
      reserved = dollars(price, most[0], 0, most[1]) if price else 0.0
      if not await self._wallet.budget.reserve(reserved):
        self._broke = True
        raise CallFailed("budget", "the spending cap is reached")
      booking, began = Booking(self._spender), self._loop.time()
      end: Reply | CallFailed | None = None
      try:
        if not await self._cache.book(booking, reserved):
          raise CallFailed("unbooked", "what it costs cannot be booked")
        # What nobody waits for any more may have been billed.
        end = CallFailed("timeout", "cut off", billed=True, about="deadline")
        # A step's questions are cut off at its end, which may move.
        left = step.end - began if step.is_probe else math.inf
        end = await self._ask(prompt, most[1], attempt, left)
      finally:
        used = Usage()
        if end is not None:
          failed, stated = (end, end.usage) if isinstance(end, CallFailed) else (None, end)
          used = usage(price, stated, most, failed is None or failed.billed)
          self._learn(failed, step, began)
        booked = self._wallet.budget.settle(reserved, used.dollars)
        self._cache.settle(booking, booked)
        self._usage += dataclasses.replace(used, dollars=booked)
        self._seconds.append(self._loop.time() - began)
    if isinstance(end, CallFailed):
      raise end
    return end

  async def _ask(self, prompt: Prompt, most: int, seed: int, left: float) -> Reply | CallFailed:
    self._calls += 1
    try:
      async with asyncio.timeout(max(0.0, min(left, self._config.attempt_seconds))):
        return await self._transport(prompt.system, prompt.user(seed), prompt.schema, most, seed)
    except TimeoutError:
      about = "deadline" if left < self._config.attempt_seconds else "server"
      return CallFailed("timeout", "no answer in time", again=True, billed=True, about=about)
    except CallFailed as failed:
      return failed
    except Exception as error:
      return CallFailed("client_error", f"{type(error).__name__}: {error}"[:200], about="settings")

  def _learn(self, failed: CallFailed | None, step: _Step, began: float) -> None:
    """Hears how a call ended, however it did."""
    means, took = meaning(failed), self._loop.time() - began
    if means.server == "answered":
      self._breaker.answered()
    elif means.server == "failed":
      self._breaker.failed()
    elif 2 * took >= min(self._config.attempt_seconds, step.seconds):
      self._breaker.cut(step.began)  # It had a fair chance.
    if failed and means.server == "cut":  # Nobody is there any more to say why.
      self._health.failed(failed)
    if means.load == "fine":
      self._answer_seconds = took
      self._gate.succeeded()
    elif failed and means.load == "too_many":
      self._gate.too_many(self._backoff(0) if failed.wait is None else failed.wait)
    elif failed and means.load == "shut" and failed.wait:
      self._gate.shut(failed.wait, failed.status)
      message = f"the reviewer's quota is used up ({failed}); uniform credit until it refills"
      self._health.warn("quota", message)
    if means.refused == "nothing":
      self._refusals.accepted()
    elif failed and means.refused and self._refusals.refused(means.refused, step.began):
      self._refused = str(failed)

  def _backoff(self, attempt: int) -> float:
    return self._dice.uniform(0, min(8.0, 0.25 * 2**attempt))


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
