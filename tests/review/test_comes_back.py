"""The client on a virtual clock: it comes back after every outage, and never stalls a step."""

import asyncio
import itertools
import math

import hypothesis
import pytest
import virtual
from hypothesis import strategies as st

from dca_jax.review import Share
from dca_jax.review.limits import Budget
from dca_jax.review.prices import Price
from dca_jax.review.transports import CallFailed, Reply

DOWN = CallFailed("server_error", "503", again=True)
KEY_REFUSED = CallFailed("client_error", "403: key", about="settings")
TEXT_REFUSED = CallFailed("client_error", "400: text", about="content")


def fails(*args, **kwargs):
  return lambda user: CallFailed(*args, **kwargs)


def never(user):
  return None


# The breaker.

ENDS_OF_A_PROBE = {
  "429": fails("rate_limited", "429", again=True, wait=0.5),
  "quota": fails("quota", "429: per day", again=True, wait=20.0),
  "unreadable": fails("malformed", "HTML", again=True, billed=True),
  "blocked": fails("blocked", "safety", about="content"),
  "down": lambda user: DOWN,
  "key": lambda user: KEY_REFUSED,
  "text": lambda user: TEXT_REFUSED,
  "no review": lambda user: Reply("?"),
  "hangs": never,
  "bug": lambda user: ZeroDivisionError(),
}


async def open_breaker(server, step):
  await step(1)  # The settings are known to work.
  server.mode = lambda user: DOWN
  statuses, _ = await step(60)
  assert set(statuses) == {"server_error", "circuit_open"}


@pytest.mark.parametrize("how", ENDS_OF_A_PROBE)
def test_whatever_becomes_of_a_probe_the_client_calls_again(how):
  server = virtual.Server()

  async def drive(step, sleep):
    await open_breaker(server, step)
    server.mode = ENDS_OF_A_PROBE[how]
    for _ in range(3):
      await step(4, 3.0)
      await sleep(1.0)
    server.mode = virtual.honest
    await sleep(20.0)  # What the quota asked for, and what a hanging call may take.
    await step(4, 3.0)
    await sleep(1.0)
    return await step(4, 3.0)

  with virtual.opened(server) as client:
    assert virtual.run(client, drive)[0] == {"ok": 4}
    assert client.problem() is None


def test_a_refused_budget_is_no_probe_and_more_money_is():
  server, budget = virtual.Server(), Budget(1.0, Share())

  async def drive(step, sleep):
    await open_breaker(server, step)
    server.mode, budget.cap = virtual.honest, 0.0
    await step(4)
    assert len(server.calls) == 49
    budget.cap = 1.0
    await step(4)
    await sleep(1.0)
    return await step(4)

  with virtual.opened(server, budget, price=Price(1.0, 1.0, 1.0), attempts=1) as client:
    assert virtual.run(client, drive)[0] == {"ok": 4}


def test_an_open_breaker_makes_nobody_wait_and_each_step_sends_one_probe():
  server = virtual.Server(latency=2.0)

  async def drive(step, sleep):
    await open_breaker(server, step)
    for k in range(5):
      assert await step(64, 60.0) == ({"circuit_open": 64}, 0.0)
      await sleep(3.0)
      assert len(server.calls) == 49 + k + 1
    server.mode = virtual.honest
    assert await step(64, 60.0) == ({"circuit_open": 64}, 0.0)
    await sleep(3.0)
    return await step(64, 60.0)

  with virtual.opened(server, attempts=1) as client:
    assert virtual.run(client, drive)[0] == {"ok": 64}


def test_the_first_probes_of_an_outage_do_not_wait_for_each_other():
  server = virtual.Server()

  async def drive(step, sleep):
    for _ in range(2):
      await open_breaker(server, step)
      server.mode = never
      for _ in range(3):
        await step(8)
        await sleep(0.01)
      server.mode = virtual.honest
      await step(8)
      await sleep(0.2)
      assert (await step(8))[0] == {"ok": 8}

  with virtual.opened(server, attempts=1, attempt_seconds=20.0) as client:
    virtual.run(client, drive)


def test_a_probe_that_hangs_makes_room_for_others_but_not_for_many():
  server = virtual.Server()

  async def drive(step, sleep):
    await open_breaker(server, step)
    server.mode = never
    for _ in range(100):
      await step(8)
      await sleep(0.5)
    assert server.most_in_flight == 48
    calls = len(server.calls)
    assert 49 + 12 <= calls <= 49 + 14  # Four at once, then one in five seconds.
    await sleep(5.0)
    server.mode = virtual.honest
    await step(8)
    await sleep(0.5)
    return await step(8)

  with virtual.opened(server, attempts=1, attempt_seconds=20.0) as client:
    assert virtual.run(client, drive)[0] == {"ok": 8}


def test_a_probe_that_hangs_takes_no_place_from_the_next():
  server = virtual.Server()

  async def drive(step, sleep):
    await step(1)
    server.mode = lambda user: DOWN
    await step(30)
    server.mode = never
    await step(4)
    await sleep(1.0)
    server.mode = virtual.honest
    await step(4)
    await sleep(1.0)
    return await step(4)

  with virtual.opened(server, attempts=1, concurrency=1) as client:
    assert virtual.run(client, drive)[0] == {"ok": 4}


def test_probes_that_cannot_begin_do_not_pile_up():
  server = virtual.Server()
  server.mode = never

  async def drive(step, sleep):
    for _ in range(20):
      client._breaker.failed()
    for _ in range(100):
      await step(4)
      await sleep(1.0)
    assert len(server.calls) < 4
    return len(asyncio.all_tasks())

  with virtual.opened(server, requests_per_minute=1, attempt_seconds=4.0) as client:
    assert virtual.run(client, drive) < 12


def test_a_probe_does_not_call_while_the_server_asks_for_a_pause():
  server = virtual.Server()

  async def drive(step, sleep):
    await open_breaker(server, step)
    server.mode = fails("rate_limited", "429", again=True, wait=100.0)
    await step(4)
    await sleep(1.0)
    calls = len(server.calls)
    for _ in range(9):
      await step(4)
      await sleep(10.0)
    assert len(server.calls) == calls

  with virtual.opened(server, attempts=1) as client:
    virtual.run(client, drive)


def test_calls_that_a_deadline_cuts_off_open_the_breaker_only_where_nobody_is_answered():
  server = virtual.Server(latency=2.0)

  async def drive(step, sleep):
    for _ in range(4):  # Of every step as many are answered as there is time for.
      statuses, waited = await step(96, 3.0)
      assert statuses == {"ok": 48, "timeout": 48}
      assert waited <= 3.2
      await sleep(1.0)
    server.mode = never
    assert (await step(96, 3.0))[0] == {"timeout": 96}
    assert await step(96, 3.0) == ({"circuit_open": 96}, 0.0)

  with virtual.opened(server) as client:
    virtual.run(client, drive)


@pytest.mark.parametrize(
  ("wait", "status", "waited"), [(9.5, "ok", 9.7), (9.85, "rate_limited", 0.1)]
)
def test_a_pause_is_waited_for_only_where_it_leaves_time_for_a_call(wait, status, waited):
  server, asked = virtual.Server(), CallFailed("rate_limited", "429", again=True, wait=wait)

  async def drive(step, sleep):
    assert (await step(1))[0] == {"ok": 1}
    end = server.calls[-1] + 5
    server.mode = lambda user: asked if server.calls[-1] < end else virtual.honest(user)
    return await step(4)

  with virtual.opened(server) as client:
    statuses, took = virtual.run(client, drive)
  assert statuses == {status: 4}
  assert took == pytest.approx(waited, abs=0.15)


def test_a_server_that_is_down_for_longer_than_a_step_is_not_waited_for():
  server = virtual.Server()
  server.mode = fails("server_error", "503", again=True, wait=90.0)

  async def drive(step, sleep):
    statuses, waited = await step(8, 20.0)
    assert statuses == {"server_error": 8}
    assert waited < 1.0

  with virtual.opened(server) as client:
    virtual.run(client, drive)


def test_a_pause_is_told_also_to_those_whom_our_own_limit_holds_back():
  server = virtual.Server()
  server.mode = fails("rate_limited", "429", again=True, wait=900.0)

  async def drive(step, sleep):
    await step(8, 20.0)
    statuses, waited = await step(8, 20.0)
    assert statuses == {"rate_limited": 8}
    assert waited < 1.0

  with virtual.opened(server, requests_per_minute=8) as client:
    virtual.run(client, drive)


def test_a_moment_before_the_deadline_is_no_fair_chance():
  server = virtual.Server()

  async def drive(step, sleep):
    server.mode = fails("rate_limited", "429", again=True, wait=12.0)
    await step(60, 1.0)
    await sleep(1.0)
    server.mode = virtual.honest
    assert (await step(60, 11.05))[0] == {"timeout": 60}
    assert (await step(20))[0] == {"ok": 20}

  with virtual.opened(server) as client:
    virtual.run(client, drive)


def test_who_was_let_in_just_before_the_deadline_says_nothing_of_the_server():
  server = virtual.Server(latency=4.9)

  async def drive(step, sleep):
    for _ in range(3):
      assert (await step(60))[0] == {"ok": 40, "timeout": 20}
    server.mode = never  # All of the first twenty have a fair chance.
    assert (await step(60))[0] == {"timeout": 60}
    assert (await step(60))[0] == {"circuit_open": 60}

  with virtual.opened(server, concurrency=20) as client:
    virtual.run(client, drive)


# What belongs to a text and what to the settings.


def test_refused_texts_never_end_a_run_that_is_healthy():
  server, count = virtual.Server(), itertools.count(1)
  # Three in a hundred, all at the start of a batch; then a whole batch.
  server.mode = lambda user: TEXT_REFUSED if next(count) % 300 < 9 else virtual.honest(user)

  async def drive(step, sleep):
    for _ in range(100):
      await step(64, 60.0)
      await sleep(5.0)
    server.mode = lambda user: TEXT_REFUSED
    await step(64, 60.0)

  with virtual.opened(server) as client:
    virtual.run(client, drive)
    assert client.problem() is None


@pytest.mark.parametrize("refusal", [KEY_REFUSED, TEXT_REFUSED])
@pytest.mark.parametrize("before", [0, 1])
def test_settings_that_are_refused_end_the_run_but_a_moment_of_it_does_not(refusal, before):
  server = virtual.Server()
  problems = []

  async def drive(step, sleep):
    for _ in range(before):
      await step(8)
    server.mode = lambda user: refusal
    for _ in range(14):
      statuses, _ = await step(8)
      assert set(statuses) <= {"client_error", "circuit_open"}
      problems.append(bool(client.problem()))
      await sleep(5.0)
    return client.problem()

  with virtual.opened(server, min_ok_frac=0.0) as client:
    assert str(refusal) in virtual.run(client, drive)
  # A key that never worked is known at once, a text after three steps; what did work after a
  # minute.
  expected = (12, 13) if before else (0,) if refusal is KEY_REFUSED else (2,)
  assert problems.index(True) in expected


def test_a_gateway_that_refuses_for_half_a_minute_is_survived():
  server = virtual.Server()

  async def drive(step, sleep):
    await step(8)
    for refusal in (KEY_REFUSED, TEXT_REFUSED):
      server.mode = lambda user, refusal=refusal: refusal
      for _ in range(10):
        await step(8)
        await sleep(3.0)
      server.mode = virtual.honest
      await step(8)
      await sleep(1.0)
      assert (await step(8))[0] == {"ok": 8}

  with virtual.opened(server, min_ok_frac=0.0) as client:
    virtual.run(client, drive)
    assert client.problem() is None


# Too many requests.


def per_minute(server, most):
  """Accepts `most` calls in a minute, and tells the others when the next minute begins."""
  minute, used = 0, 0

  def mode(user):
    nonlocal minute, used
    now = server.calls[-1]
    if now // 60 > minute:
      minute, used = now // 60, 0
    used += 1
    if used <= most:
      return virtual.honest(user)
    return CallFailed("rate_limited", "429", again=True, wait=60 * (minute + 1) - now)

  return mode


def test_a_quota_per_minute_loses_no_review_that_can_wait():
  server = virtual.Server()
  server.mode = per_minute(server, 30)

  async def drive(step, sleep):
    return await step(100, 600.0)

  with virtual.opened(server) as client:
    statuses, waited = virtual.run(client, drive)
  assert statuses == {"ok": 100}
  assert waited < 300
  assert len(server.calls) < 100 + 80


def test_what_cannot_wait_as_long_as_the_server_asks_is_answered_at_once():
  server = virtual.Server()
  server.mode = fails("rate_limited", "429", again=True, wait=90.0)

  async def drive(step, sleep):
    for _ in range(4):
      statuses, waited = await step(100, 20.0)
      assert statuses == {"rate_limited": 100}
      assert waited < 1.0
    assert len(server.calls) == 48
    await sleep(89.0)
    server.mode = virtual.honest
    return await step(100, 20.0)

  with virtual.opened(server) as client:
    statuses, waited = virtual.run(client, drive)
  assert statuses == {"ok": 100}
  assert 0.5 < waited < 5


def test_waiting_as_asked_is_free_and_other_tries_are_not():
  server, count = virtual.Server(), itertools.count()

  def tries(failed):
    # Each question fails twice and then works.
    server.mode = lambda user: failed if next(count) % 3 < 2 else virtual.honest(user)

    async def drive(step, sleep):
      return sum([(await step(1))[0]["ok"] for _ in range(40)])

    with virtual.opened(server, concurrency=1) as client:
      return virtual.run(client, drive)

  assert tries(CallFailed("rate_limited", "429", again=True, wait=0.01)) == 40
  assert tries(CallFailed("rate_limited", "429", again=True)) < 20
  assert tries(DOWN) < 20


def test_a_quota_per_day_is_waited_for_and_said(capsys):
  server = virtual.Server()
  server.mode = fails("quota", "429: GenerateRequestsPerDay", again=True, wait=7200.0)

  async def drive(step, sleep):
    for _ in range(7):
      statuses, waited = await step(8, 60.0)
      assert statuses == {"quota": 8}
      assert waited < 1
    assert len(server.calls) == 8
    assert "made no call" in client.problem()
    server.mode = virtual.honest
    await sleep(7200.0)
    assert (await step(8, 60.0))[0] == {"ok": 8}
    return client.problem()

  with virtual.opened(server, strict=True, min_ok_frac=0.0) as client:
    assert virtual.run(client, drive) is None
    assert client.stats()["review/concurrency"] == 48
  assert capsys.readouterr().err.count("GenerateRequestsPerDay") == 1


def test_concurrency_recovers_within_a_few_steps():
  server = virtual.Server()

  async def drive(step, sleep):
    server.mode = fails("rate_limited", "429", again=True)
    while client._gate.allowed > 1:
      await step(24, 60.0)
    server.mode = virtual.honest
    for _ in range(12):
      assert (await step(24, 60.0))[0] == {"ok": 24}

  with virtual.opened(server) as client:
    virtual.run(client, drive)
    assert client.stats()["review/concurrency"] == 48


# Nothing is called.


@pytest.mark.parametrize("strict", [False, True])
def test_a_client_that_does_not_call_says_so(strict, capsys):
  async def drive(step, sleep):
    for _ in range(5):
      assert client.problem() is None
      await step(4)
    return client.problem()

  budget = Budget(1e-9, Share())
  with virtual.opened(
    virtual.Server(), budget, price=Price(1.0, 1.0, 1.0), strict=strict, min_ok_frac=0.0
  ) as client:
    problem = virtual.run(client, drive)
    assert client.stats()["review/uncalled_steps"] == 5
  said = problem if strict else capsys.readouterr().err
  assert "made no call" in said
  assert (problem is None) != strict


# Everything at once.

counts = st.one_of(
  st.none(),
  st.integers(-(10**20), 10**20),
  st.integers(0, 600),
  st.floats(),
  st.booleans(),
  st.text(max_size=3),
  st.lists(st.integers(), max_size=2),
)
replies = st.builds(
  Reply, st.one_of(st.none(), st.text(max_size=5)), counts, counts, counts, counts
)
failures = st.builds(
  CallFailed,
  st.sampled_from(
    ["rate_limited", "quota", "server_error", "connection", "timeout", "malformed", "client_error"]
  ),
  st.just("told to"),
  again=st.booleans(),
  wait=st.one_of(st.none(), st.floats(0, 30)),
  billed=st.booleans(),
  usage=st.one_of(st.none(), replies),
  about=st.sampled_from(["server", "server", "content", "settings"]),
)
phases = st.tuples(
  st.one_of(st.just("hang"), st.just("honest"), st.builds(lambda r: r, replies), failures),
  st.integers(1, 3),
  st.sampled_from([0.01, 1.0, 6.0]),
)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.lists(phases, max_size=12), st.booleans())
def test_no_step_stalls_no_cap_breaks_and_health_is_noticed(script, poor):
  server, kept = virtual.Server(), virtual.Kept()
  budget, spent = Budget(0.05 if poor else 50.0, Share()), [0.0]

  def watched():
    assert spent[-1] <= budget.spent <= budget.cap + 1e-12
    spent.append(budget.spent)

  async def drive(step, sleep):
    await step(4)  # The settings have worked.
    for answer, steps, latency in script:
      modes = {"hang": never, "honest": virtual.honest}
      server.mode = modes[answer] if isinstance(answer, str) else lambda user, answer=answer: answer
      server.latency = latency
      for _ in range(steps):
        _, waited = await step(24, 4.0)
        assert waited <= 4.2
        watched()
        await sleep(1.0)
    server.mode, server.latency = virtual.honest, 0.1
    await sleep(30.0)  # The longest that a server has asked for.
    await step(24, 20.0)
    await sleep(1.0)
    statuses, _ = await step(24, 20.0)
    watched()
    if client.problem() is None:
      gone = {"budget", "circuit_open"} if client._broke else set()  # No money for a probe either.
      assert set(statuses) <= {"ok"} | gone
    await sleep(30.0)

  with virtual.opened(
    server, budget, kept, Price(1.0, 0.1, 2.0), attempt_seconds=4.0, min_ok_frac=0.0
  ) as client:
    virtual.run(client, drive)
    assert client._gate.busy == 0
    assert not budget._reserved
    assert kept.booked == pytest.approx(budget.spent)
    assert math.isfinite(budget.spent)


def test_a_server_that_is_known_as_slow_has_time_for_the_first_question():
  for attempt_seconds, is_answered in ((20.0, False), (100.0, True)):
    with virtual.opened(virtual.Server(latency=90.0), attempt_seconds=attempt_seconds) as client:
      trial = client.trial(60.0)
    assert bool(trial.said) == is_answered != bool(trial.wrong)


# Parts of a step.


def test_what_is_asked_early_has_until_the_steps_own_deadline():
  async def drive(step, sleep):
    submit = client.begin_step()
    early = asyncio.create_task(step(2, 10.0, submit))
    await sleep(8.0)
    late = await step(2, 10.0, submit)
    return await early, late

  with virtual.opened(virtual.Server(latency=15.0), attempt_seconds=30.0) as client:
    early, late = virtual.run(client, drive)
    assert early == ({"ok": 2}, 15.0)
    assert late[0] == {"timeout": 2}
