"""A Python function as a reviewer, whatever it does."""

import contextlib
import dataclasses
import sys
import threading

import pytest

from dca_jax.review import Request, Review, ReviewerConfig, Truth, open_reviewer


@contextlib.contextmanager
def opened(function):
  @dataclasses.dataclass(frozen=True)
  class Mine(ReviewerConfig):
    name: str = "mine"

    def review(self, request):
      return function(request)

  with contextlib.closing(open_reviewer(Mine(), Truth(None, None), None)) as reviewer:
    yield reviewer


def requests(count):
  return [Request(f"{i}", "p", ("a", "b"), True, False) for i in range(count)]


def test_reviews_come_in_order_and_each_step_weighs_one():
  with opened(lambda r: Review("ok", ("necessary", "error"), model=r.id)) as reviewer:
    reviews = reviewer.submit(requests(50), 60.0).result(60.0)
    assert reviewer.submit([], 60.0).result(60.0) == []
    assert reviewer.stats() == {"review/status_ok": 1.0}
  assert [review.model for review in reviews] == [str(i) for i in range(50)]
  assert {review.weights for review in reviews} == {(1.0, 1.0)}


@pytest.mark.parametrize(
  "bad",
  [
    lambda r: 1 / 0,
    lambda r: sys.exit(3),
    lambda r: None,
    lambda r: Review("ok", roles=None),
    lambda r: Review("ok", ("error",) * 2, ("heavy", "light")),
  ],
)
def test_what_it_raises_is_a_failed_review_told_once(bad, capsys):
  with opened(bad) as reviewer:
    for _ in range(2):
      assert {r.status for r in reviewer.submit(requests(5), 60.0).result(60.0)} == {"client_error"}
    assert reviewer.failures().startswith("mine: ")
  assert capsys.readouterr().err.count("warning: reviewer mine") == 1


@pytest.mark.parametrize(
  ("review", "why"),
  [
    (Review("ok", ("error",)), "1 role for 2 steps; such reviews count as failed (invalid)"),
    (
      Review("ok", ("neccessary", "error")),
      "'neccessary' is no role (necessary, redundant, irrelevant, error, inherits, repair);"
      " did you mean necessary? Such reviews count as failed (invalid)",
    ),
    (Review("ok", ("x", "error")), "repair); such reviews count as failed (invalid)"),
    (Review("ok", ("error",) * 2, (1.0,)), "1 weight for 2 roles"),
    (Review("ok", values=(0.5,) * 3), "3 values for 2 steps"),
    (Review("ok", ("error",) * 2, reasons=("so",)), "1 reason for 2 steps"),
    (Review("ok"), "it says nothing"),
  ],
)
def test_a_review_that_does_not_fit_is_invalid_and_told_once(review, why, capsys):
  with opened(lambda r: review) as reviewer:
    for _ in range(2):
      assert {r.status for r in reviewer.submit(requests(5), 60.0).result(60.0)} == {"invalid"}
    assert reviewer.failures().startswith("mine: ")
  (said,) = capsys.readouterr().err.splitlines()
  assert said.startswith("warning: reviewer mine: ")
  assert why in said


def test_roles_behind_another_status_than_ok_are_told_once(capsys):
  with opened(lambda r: Review("OK", ("error",) * 2)) as reviewer:
    assert {r.status for r in reviewer.submit(requests(5), 60.0).result(60.0)} == {"OK"}
  (said,) = capsys.readouterr().err.splitlines()
  assert "the status is 'OK' and not 'ok'" in said


def test_each_kind_of_failure_is_told(capsys):
  said = iter([lambda: 1 / 0, lambda: Review("ok"), lambda: Review("timeout")])
  with opened(lambda r: next(said)()) as reviewer:
    came = [reviewer.submit(requests(1), 60.0).result(60.0)[0].status for _ in range(3)]
  assert came == ["client_error", "invalid", "timeout"]
  assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_call_that_never_returns_is_late_and_the_others_count():
  hang = threading.Event()

  def slow(request):
    if request.id == "0":
      hang.wait(60)
    return Review("ok", ("error", "error"))

  with opened(slow) as reviewer:
    reviews = reviewer.submit(requests(3), 2.0).result(60.0)
    hang.set()
  assert reviews[0].status == "timeout"
  assert {review.status for review in reviews[1:]} == {"ok"}
