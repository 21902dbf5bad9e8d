"""Gate, breaker, purse, budget, refusals and health, each by itself on a clock of the test's."""

import asyncio
import itertools
import math

import hypothesis
import pytest
import virtual
from hypothesis import strategies as st

from dca_jax.review import Review, Share
from dca_jax.review.health import Fared, Health, Meaning, Refusals, meaning
from dca_jax.review.limits import Breaker, Budget, Gate, Purse
from dca_jax.review.prices import Price, usage
from dca_jax.review.transports import CallFailed, Reply
from dca_jax.review.types import Usage


class Clock:
  def __init__(self):
    self.now = 1000.0

  def __call__(self):
    return self.now


def on_virtual_time(coroutine):
  loop = virtual.Loop()
  try:
    return loop.run_until_complete(coroutine(loop.time))
  finally:
    loop.close()


# What each end of a call means.


@pytest.mark.parametrize(
  ("failed", "means"),
  [
    (None, Meaning("answered", "fine", "nothing", True)),
    (CallFailed("timeout", "", about="deadline"), Meaning("cut")),
    (CallFailed("timeout", ""), Meaning("failed")),
    (CallFailed("connection", ""), Meaning("failed")),
    (CallFailed("server_error", "", wait=3.0), Meaning("failed")),
    (CallFailed("malformed", ""), Meaning("failed")),
    (CallFailed("client_error", ""), Meaning("failed")),
    (CallFailed("malformed", "", about="content"), Meaning("answered", "fine", "nothing")),
    (CallFailed("blocked", "", about="content"), Meaning("answered", "fine", "nothing")),
    (CallFailed("truncated", "", about="content"), Meaning("answered", "fine", "nothing")),
    (CallFailed("client_error", "", about="content"), Meaning("answered", "fine", "content")),
    (CallFailed("client_error", "", about="settings"), Meaning("failed", "", "settings")),
    (CallFailed("quota", "", about="settings"), Meaning("failed", "", "settings")),
    (CallFailed("quota", "", wait=9.0), Meaning("answered", "shut")),
    (CallFailed("rate_limited", ""), Meaning("answered", "too_many")),
    (CallFailed("rate_limited", "", wait=0.0), Meaning("answered", "too_many", charged=False)),
  ],
)
def test_what_an_end_means(failed, means):
  assert meaning(failed) == means


# The breaker and the purse.


def test_the_breaker_opens_after_its_patience_and_any_answer_closes_it():
  clock = Clock()
  breaker = Breaker(clock, patience=3)
  for _ in range(2):
    breaker.failed()
  assert not breaker.open
  breaker.answered()
  for _ in range(2):
    breaker.failed()
  assert not breaker.open
  breaker.failed()
  assert breaker.open
  breaker.failed()
  breaker.answered()
  assert not breaker.open


def test_a_call_that_was_cut_off_counts_where_nobody_was_answered_meanwhile():
  clock = Clock()
  breaker = Breaker(clock, patience=1)
  breaker.answered()
  breaker.cut(began=1000.0)
  assert not breaker.open
  breaker.cut(began=1000.5)
  assert breaker.open


def test_a_new_breaker_counts_what_is_cut_off():
  breaker = Breaker(Clock(), patience=1)
  breaker.cut(began=0.0)
  assert breaker.open


def test_ten_further_tries_and_one_more_for_five_successes_up_to_a_hundred():
  purse = Purse()
  assert [purse.pay() for _ in range(12)] == [True] * 10 + [False] * 2
  for _ in range(5):
    assert not purse.pay()
    purse.succeeded()
  purse.succeeded()  # 0.2 is no exact number.
  assert purse.pay()
  assert not purse.pay()
  for _ in range(10_000):
    purse.succeeded()
  assert sum(purse.pay() for _ in range(200)) == 100


# The gate.


def test_as_many_as_are_allowed_go_in_and_the_others_in_their_order():
  async def drive(clock):
    gate, entered = Gate(3, clock), []

    async def call(i):
      async with gate.enter(clock() + 100):
        entered.append((i, clock() - 1000))
        assert gate.busy <= 3
        await asyncio.sleep(1)

    await asyncio.gather(*map(call, range(7)))
    assert entered == [(i, i // 3) for i in range(7)]
    assert gate.busy == 0

  on_virtual_time(drive)


def test_nobody_is_woken_in_vain():
  async def drive(clock):
    gate = Gate(2, clock)

    async def call(seconds):
      async with gate.enter(2000):
        await asyncio.sleep(seconds)

    tasks = [asyncio.create_task(call(seconds)) for seconds in (1, 10, 10, 10, 10)]
    await asyncio.sleep(0.5)
    waiting = list(gate._waiting)
    await asyncio.sleep(4.5)
    assert gate.busy == 2
    assert list(gate._waiting) == waiting[1:]
    await asyncio.gather(*tasks)

  on_virtual_time(drive)


def test_who_goes_in_beside_the_others_needs_no_place_and_takes_none():
  async def drive(clock):
    gate = Gate(1, clock)
    async with gate.enter(2000), gate.enter(2000, beside=True):
      assert gate.busy == 1
    async with gate.enter(2000, beside=True), asyncio.timeout(1), gate.enter(2000):
      pass
    assert gate.busy == 0
    gate.shut(60, "quota")
    with pytest.raises(CallFailed):
      await gate.enter(1010, beside=True).__aenter__()

  on_virtual_time(drive)


def test_a_gate_that_is_shut_tells_those_who_cannot_wait_at_once():
  async def drive(clock):
    gate, ended = Gate(2, clock), {}

    async def call(name, end, seconds=0.0):
      try:
        async with gate.enter(end):
          await asyncio.sleep(seconds)
          ended[name] = ("in", clock() - 1000)
      except CallFailed as failed:
        ended[name] = (failed.status, clock() - 1000)

    tasks = [
      asyncio.create_task(call(*each))
      for each in [("a", 1100, 50), ("b", 1100, 50), ("short", 1060), ("long", 1100)]
    ]
    await asyncio.sleep(10)
    gate.shut(60, "quota")
    gate.shut(20, "rate_limited")  # The longer one holds.
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert ended == {"short": ("quota", 10)}
    tasks.append(asyncio.create_task(call("late", 1069)))
    tasks.append(asyncio.create_task(call("exact", 1070)))
    await asyncio.gather(*tasks)
    assert ended["late"] == ("quota", 10)
    assert ended["a"] == ("in", 50)
    assert ended["long"] == ended["exact"] == ("in", 70)
    assert gate.opens == 1070
    gate.check(0)  # It is open again.

  on_virtual_time(drive)


def test_a_burst_of_complaints_halves_once_and_the_next_one_again():
  clock = Clock()
  gate = Gate(48, clock)
  for _ in range(10):
    gate.too_many(2.0)
  assert (gate.allowed, gate.opens) == (24, 1002)
  clock.now += 1.9
  gate.too_many(0.1)
  assert gate.allowed == 24
  clock.now += 0.1
  gate.too_many(0.1)
  assert gate.allowed == 12
  clock.now += 0.4  # A burst lasts half a second at least.
  gate.too_many(0.1)
  assert gate.allowed == 12
  for _ in range(20):
    clock.now += 1
    gate.too_many(0.1)
  assert gate.allowed == 1


def test_it_recovers_slowly_at_first_and_never_beyond_its_most():
  gate = Gate(48, Clock())
  gate.allowed = 1.0
  grown = []
  for _ in range(300):
    gate.succeeded()
    grown.append(gate.allowed)
  assert 4.0 < grown[5] < 4.1
  assert 18 < grown[99] < 24
  assert grown[219] < 48
  assert grown[259] == grown[-1] == 48
  gate.too_many(0.0)
  gate.succeeded()
  assert gate.allowed == 24 + (1 + 1 / 30) / 24


calls = st.tuples(
  st.floats(0, 20),  # when it comes
  st.floats(0.1, 10),  # how long it takes
  st.floats(0, 40),  # how long it can wait
  st.one_of(st.none(), st.none(), st.floats(0, 30)),  # what the server asks for
  st.booleans(),  # whether it is cancelled in the middle
)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.lists(calls, max_size=30), st.integers(1, 4))
def test_no_call_is_forgotten_at_the_gate(calls, most):
  async def drive(clock):
    gate, inside = Gate(most, clock), 0

    async def call(comes, takes, patience, asked, cancelled):
      nonlocal inside
      await asyncio.sleep(comes)
      end = clock() + patience
      try:
        async with gate.enter(end):
          assert clock() >= gate.opens
          inside += 1
          assert inside <= most
          try:
            await asyncio.sleep(takes)
          finally:
            inside -= 1
          gate.succeeded() if asked is None else gate.too_many(asked)
      except CallFailed:
        assert gate.opens > end

    tasks = [asyncio.create_task(call(*each)) for each in calls]
    for task, each in zip(tasks, calls, strict=True):
      if each[-1]:
        asyncio.get_running_loop().call_later(each[0] + each[1] / 2, task.cancel)
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(end is None or isinstance(end, asyncio.CancelledError) for end in done)
    assert gate.busy == inside == 0
    assert 1 <= gate.allowed <= most
    async with asyncio.timeout(40), gate.enter(math.inf):
      pass

  on_virtual_time(drive)


# Money.


def test_what_is_reserved_is_waited_for_and_what_never_fits_is_refused():
  async def drive(clock):
    budget = Budget(10.0, Share())
    assert await budget.reserve(6.0)
    waiting = asyncio.create_task(budget.reserve(6.0))
    other = asyncio.create_task(budget.reserve(5.0))
    await asyncio.sleep(1)
    assert not waiting.done()
    assert budget.settle(6.0, 4.5) == 4.5
    assert not await waiting
    assert await other
    assert budget.settle(5.0, 5.0) == 5.0
    assert budget.spent == 9.5
    assert await budget.reserve(0.5)
    assert not await budget.reserve(0.6)

  on_virtual_time(drive)


@pytest.mark.parametrize("stated", [-1.0, 2.5, math.inf, math.nan])
def test_what_cannot_be_true_is_booked_as_it_was_reserved(stated):
  async def drive(clock):
    budget = Budget(10.0, Share())
    await budget.reserve(2.0)
    assert budget.settle(2.0, stated) == 2.0
    assert budget.spent == 2.0

  on_virtual_time(drive)


def test_what_earlier_processes_spent_counts_once_for_each_reviewer():
  # Of two processes this one had spent 1 and 2 with two reviewers, the other 3 and 0.
  theirs = iter([3.0, 0.0, 3.0])
  budget = Budget(10.0, Share(2, lambda own: own + next(theirs)))
  budget.add_earlier("a", 1.0)
  budget.add_earlier("b", 2.0)
  budget.add_earlier("a", 1.0)
  assert budget.spent == 3.0
  assert budget.cap == 3.0 + (10.0 - 6.0) / 2


def test_reviewers_in_threads_of_their_own_share_a_budget():
  budget, most = Budget(1.0, Share()), 0.01

  async def spend(seed):
    booked = 0
    for i in range(40):
      if await budget.reserve(most):
        await asyncio.sleep(0)
        booked += budget.settle(most, most * ((seed + i) % 3) / 2) > 0
      assert budget.spent <= budget.cap
    return booked

  async def many():
    return await asyncio.gather(*(asyncio.to_thread(asyncio.run, spend(i)) for i in range(5)))

  asyncio.run(many())
  assert 0.95 < budget.spent <= 1.0
  assert not budget._reserved


PRICE = Price(1.0, 0.1, 10.0)
MOST = (1000, 200)
FULL = (1000 * 1.0 + 200 * 10.0) / 1e6


@pytest.mark.parametrize(
  ("stated", "took"),
  [
    (Reply("r", 500, 0, 100, 40), Usage(1, 500, 0, 100, 40, (500 + 1000) / 1e6)),
    (Reply("r", 500, 200, 100), Usage(1, 500, 200, 100, 0, (300 + 20 + 1000) / 1e6)),
    (Reply("r", 500, 500, 100), Usage(1, 500, 500, 100, 0, (50 + 1000) / 1e6)),
    (Reply("r", 500, 501, 100), Usage(1, 500, 0, 100, 0, (500 + 1000) / 1e6)),
    (Reply("r", 500, -1, 100, 101), Usage(1, 500, 0, 100, 0, (500 + 1000) / 1e6)),
    (Reply("r", 500, "?", 100, []), Usage(1, 500, 0, 100, 0, (500 + 1000) / 1e6)),
    (Reply("r", 500.0, 0, 100.0), Usage(1, 500, 0, 100, 0, (500 + 1000) / 1e6)),
    (Reply("r", 10**18, 0, 10**18), Usage(1, 1000, 0, 200, 0, FULL)),
    *[
      (Reply("r", *pair), Usage(1, dollars=FULL))
      for bad in (None, -1, 0.5, math.nan, math.inf, "500", True, [500], {})
      for pair in ((bad, 0, 100), (500, 0, bad))
    ],
    (Reply("r", 0, 0, 100), Usage(1, dollars=FULL)),
    (Reply("r", 500, 0, 0), Usage(1, dollars=FULL)),
    # A reply without text may have cost no output.
    (Reply(None, 500, 0, 0), Usage(1, 500, 0, 0, 0, 500 / 1e6)),
    (Reply(None, 500, 0, None), Usage(1, 500, 0, 0, 0, 500 / 1e6)),
    (Reply(None), Usage(1, dollars=FULL)),
  ],
)
def test_what_a_server_states_is_booked_as_far_as_it_can_be_true(stated, took):
  assert usage(PRICE, stated, MOST, billed=False) == took
  free = usage(None, stated, MOST, billed=True)
  assert free.dollars == 0
  assert free.prompt_tokens == took.prompt_tokens


def test_where_nothing_is_stated_it_depends_on_whether_it_may_be_billed():
  assert usage(PRICE, None, MOST, billed=True) == Usage(1, dollars=FULL)
  assert usage(PRICE, None, MOST, billed=False) == Usage(1)
  assert usage(None, None, MOST, billed=True) == Usage(1)


# Refusals.


def refusals(accepted, seconds, steps, settings=0, contents=0):
  """Whether the settings are known to be wrong after so many refusals,
  evenly over steps and time."""
  clock = Clock()
  refusals = Refusals(clock)
  if accepted:
    refusals.refused("settings", -1.0)
    refusals.accepted()
  whats = ["settings"] * settings + ["content"] * contents
  wrong = False
  for i, what in enumerate(whats):
    share = i / max(1, len(whats) - 1)
    clock.now = 1000 + seconds * share
    wrong = refusals.refused(what, float(round(share * (steps - 1))))
  return wrong


@pytest.mark.parametrize(
  ("wrong", "case"),
  [
    (True, (False, 0, 1, 3, 0)),
    (False, (False, 0, 1, 2, 0)),
    (True, (False, 0, 3, 0, 20)),
    (False, (False, 0, 3, 0, 19)),
    (False, (False, 99, 2, 0, 200)),
    (False, (True, 59, 9, 9, 0)),
    (True, (True, 60, 3, 3, 0)),
    (False, (True, 60, 3, 2, 17)),
    (True, (True, 60, 3, 2, 18)),
    (False, (True, 60, 2, 90, 0)),
    (True, (True, 60, 3, 0, 20)),
    (False, (True, 60, 3, 0, 19)),
    (False, (True, 59, 3, 0, 200)),
    (False, (True, 60, 2, 0, 200)),
  ],
)
def test_refusals(wrong, case):
  assert refusals(*case) == wrong


# Health.


def steps_of(health, *oks, asked=0):
  for i, ok in enumerate(oks):
    health.step([Review("ok")] * ok + [Review("timeout")] * (10 - ok), asked, calls=i + 1)


def test_five_bad_steps_are_said_once_and_with_strict_end_the_run(capsys):
  health = Health(0.5, strict=False)
  steps_of(health, 0, 0, 0, 0)
  assert health.problem() is None
  steps_of(health, 0)
  assert health.problem() is None
  assert capsys.readouterr().err == (
    "warning: only 0% of the last 50 reviews were usable; what failed gets uniform credit\n"
  )
  health.problem()
  assert not capsys.readouterr().err
  strict = Health(0.5, strict=True)
  steps_of(strict, 0, 10, 5, 5, 5)
  assert strict.problem() is None
  steps_of(strict, 0)
  assert strict.problem() is None
  steps_of(strict, 4)
  assert "only 38% of the last 50 reviews" in strict.problem()


def test_steps_in_which_nothing_is_new_are_no_silence():
  health = Health(0.0, strict=True)
  for calls, asked, uncalled in [(1, 3, 0), (1, 3, 1), (1, 0, 1), (1, 2, 2), (4, 2, 0), (4, 2, 1)]:
    health.step([], asked, calls)
    assert health.uncalled_steps == uncalled
  for _ in range(3):
    health.step([], 1, 4)
  assert health.problem() is None
  health.step([], 1, 4)
  assert "last 5 steps" in health.problem()


def test_parts_of_a_step_count_as_one():
  health = Health(0.5, strict=True)
  for n in range(5):
    step = Fared()
    assert health.problem() is None
    for part, calls in enumerate((n // 2, n // 2 + n % 2), 1):  # Every other step makes no call.
      health.step([Review("ok" if part == 1 else "timeout")] * part, part, calls, step)
    assert health.uncalled_steps == (n + 1) % 2
  assert "only 33% of the last 15 reviews" in health.problem()


def test_a_step_without_requests_says_nothing_of_health():
  health = Health(0.5, strict=True)
  for _ in itertools.repeat(None, 9):
    health.step([], 0, 0)
  assert health.problem() is None
