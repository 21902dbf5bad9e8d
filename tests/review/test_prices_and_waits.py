"""Money, and how long a server asks to wait."""

import datetime
import email.utils
import time

import pytest

from dca_jax.review.prices import PRICES, Price, dollars, price
from dca_jax.review.transports import asked_wait
from dca_jax.review.types import Usage


def test_dollars_by_hand():
  # A million fresh prompt tokens, a million cached ones and a million of output.
  assert dollars(Price(1.5, 0.15, 9.0), 2_000_000, 1_000_000, 1_000_000) == pytest.approx(
    1.5 + 0.15 + 9.0
  )
  assert dollars(Price(1.5, 0.15, 9.0), 0, 0, 0) == 0


def test_a_price_changes_on_its_day():
  before, after = (
    price("gemini-3.8-flash", datetime.date(*day)) for day in ((2026, 12, 31), (2027, 1, 1))
  )
  assert (before.prompt, before.output) == (0.75, 3.75)
  assert (after.prompt, after.output) == (1.5, 7.5)
  assert price("gemini-99", datetime.date(2026, 12, 1)) is None


def test_every_price_makes_sense():
  for rows in PRICES.values():
    assert [day for day, _ in rows] == sorted(day for day, _ in rows)
    assert all(0 < row.cached <= row.prompt < row.output for _, row in rows)


def test_usage_adds_up():
  assert Usage(1, 2, 3, 4, 5, 0.5) + Usage(1, 1, 1, 1, 1, 0.25) == Usage(2, 3, 4, 5, 6, 0.75)


def retry_info(delay):
  return {
    "error": {
      "details": [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}]
    }
  }


@pytest.mark.parametrize(
  ("headers", "details", "wait"),
  [
    ({}, retry_info("3s"), 3.0),
    ({}, retry_info("3.5s"), 3.5),
    ({"retry-after": "7"}, retry_info("3s"), 3.0),
    ({"retry-after": "7"}, None, 7.0),
    ({"Retry-After": "0.25"}, {"error": {"details": "?"}}, 0.25),
    ({"retry-after": "-3"}, None, 0.0),
    ({"retry-after": "999999"}, None, 999999.0),
    ({"retry-after": "1e300"}, None, None),
    ({}, {"error": None}, None),
    ({}, {"error": "busy"}, None),
    ({"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}, None, None),
    ({"retry-after": "soon"}, None, None),
    ({"retry-after": "nan"}, None, None),
    ({}, retry_info("soon"), None),
    ({}, {"error": {}}, None),
    ({}, ["?"], None),
    ({}, None, None),
  ],
)
def test_what_a_server_asks_for(headers, details, wait):
  assert asked_wait(headers, details) == wait


def test_a_date_to_wait_for():
  later = email.utils.formatdate(time.time() + 60, usegmt=True)
  assert 55 < asked_wait({"retry-after": later}, None) <= 60
  assert asked_wait({"retry-after": email.utils.formatdate(0, usegmt=True)}, None) == 0
