"""The one place where a task's verifier is called: what it raises is told with its place."""

import pytest

from dca_jax.episode import Outcome, Problem
from dca_jax.errors import UserError
from dca_jax.rollout.verify import verify


class Task:
  """Raises what it is made with, in a function that `verify` calls."""

  def __init__(self, error=None, concurrency=1):
    self.error, self.concurrency = error, concurrency

  def _fail(self):
    raise self.error

  def verify(self, problem, completion, truncated):
    if problem.id == 12:
      self._fail()
    return Outcome(1.0, True, truncated)


ATTEMPTS = [(Problem(i, "p", "a"), "c", False) for i in (11, 12)]


@pytest.mark.parametrize("concurrency", [1, 2])
def test_an_error_has_its_place_and_its_problem_and_is_chained(concurrency):
  error = IndexError("out of range")
  place = r"verify of \S*test_verify\.py, line 17: IndexError: out of range, on problem 12;"
  with pytest.raises(UserError, match=place) as raised:
    verify(Task(error, concurrency), ATTEMPTS)
  assert raised.value.__cause__ is error


def test_what_the_user_can_mend_is_left_as_it_is():
  with pytest.raises(UserError, match=r"^mend this$"):
    verify(Task(UserError("mend this")), ATTEMPTS)


def test_a_stop_is_no_error():
  with pytest.raises(KeyboardInterrupt):
    verify(Task(KeyboardInterrupt()), ATTEMPTS)


def test_a_mistake_of_the_package_keeps_its_traceback(monkeypatch):
  monkeypatch.setattr(Task, "__module__", "dca_jax.tasks.chains")
  with pytest.raises(IndexError):
    verify(Task(IndexError("ours")), ATTEMPTS)
