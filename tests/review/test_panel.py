"""Several reviewers as one."""

from concurrent.futures import Future

import pytest

from dca_jax.review import REVIEWERS, Request, Review, Reviewer, Truth, open_reviewer
from dca_jax.review.panel import Escalating, Panel, combine_reviews

A = Review("ok", ("error", "necessary"), (4.0, 2.0), model="a")
B = Review("ok", ("error", "redundant"), (2.0, 2.0), model="b")
C = Review("ok", ("necessary", "redundant"), (1.0, 4.0), model="c")


@pytest.mark.parametrize(
  ("how", "weights"), [("vote", (3.0, 3.0)), ("mean", (2.0, 2.0)), ("median", (2.0, 2.0))]
)
def test_three_opinions(how, weights):
  review, disagreed = combine_reviews([A, B, C], how)
  assert review.roles == ("error", "redundant")
  assert review.weights == pytest.approx(weights)
  assert disagreed == [1.0, 1.0]
  assert review.model == "a+b+c"


def test_a_tie_goes_to_the_first_named():
  assert combine_reviews([A, C], "vote")[0].roles == ("error", "necessary")
  assert combine_reviews([C, A], "vote")[0].roles == ("necessary", "redundant")


def test_equal_opinions_stay():
  review, disagreed = combine_reviews([A, A, A], "median")
  assert (review.roles, review.weights, disagreed) == (A.roles, A.weights, [0.0, 0.0])


def test_failures_are_left_out():
  review, _ = combine_reviews([Review("timeout"), A, Review("suspicious")], "mean")
  assert (review.status, review.roles, review.weights) == ("ok", A.roles, A.weights)
  assert combine_reviews([Review("timeout"), Review("budget")], "vote")[0].status == "timeout"


def test_values_are_combined_too():
  valued = [Review("ok", values=(v, v)) for v in (0.1, 0.2, 0.9)]
  assert combine_reviews(valued, "mean")[0].values == pytest.approx((0.4, 0.4))
  assert combine_reviews(valued, "median")[0].values == pytest.approx((0.2, 0.2))
  assert combine_reviews([A, *valued], "vote")[0].roles == A.roles


class Said(Reviewer):
  """A reviewer that says what it was made with, when it is told to."""

  def __init__(self, reviews):
    self.reviews, self.asked, self.closed, self.futures = reviews, [], False, []

  def submit(self, requests, deadline):
    self.asked.append(([r.id for r in requests], deadline))
    self.futures.append(Future())
    return self.futures[-1]

  def answer(self):
    self.futures[-1].set_result(self.reviews[: len(self.asked[-1][0])])

  def stats(self):
    return {"review/calls": float(len(self.asked))}

  def problem(self):
    return None

  def close(self):
    self.closed = True


REQUESTS = [Request(f"{i}", "p", ("a", "b"), True, False) for i in range(3)]


def test_a_panel_answers_when_its_slowest_member_has():
  members = [Said([A] * 3), Said([B] * 3)]
  panel = Panel(members, "vote")
  future = panel.submit(REQUESTS, 5.0)
  members[1].answer()
  assert not future.done()
  members[0].answer()
  assert [r.roles for r in future.result(1.0)] == [A.roles] * 3
  assert panel.stats() == {"review/calls": 1.0, "review/calls_2": 1.0, "review/disagreement": 0.5}
  panel.close()
  assert all(member.closed for member in members)


def test_only_what_the_first_is_unsure_of_goes_to_the_second():
  unsure = Review("ok", A.roles, A.weights, sure=False)
  first, second = Said([A, unsure, Review("timeout")]), Said([B])
  both = Escalating(first, second)
  future = both.submit(REQUESTS, 5.0)
  first.answer()
  assert second.asked[0][0] == ["1"]
  assert second.asked[0][1] <= 5.0
  second.answer()
  assert future.result(1.0) == [A, B, Review("timeout")]
  assert both.stats()["review/escalated"] == pytest.approx(1 / 3)


def test_where_the_second_fails_the_first_stands_and_time_can_run_out():
  unsure = Review("ok", A.roles, A.weights, sure=False)
  first, second = Said([unsure]), Said([Review("budget")])
  future = Escalating(first, second).submit(REQUESTS[:1], 5.0)
  first.answer()
  second.answer()
  assert future.result(1.0) == [unsure]
  late = Escalating(first, second).submit(REQUESTS[:1], -1.0)
  first.answer()
  assert late.result(1.0) == [unsure]
  assert len(second.asked) == 1


@pytest.mark.parametrize(
  "bad", [ZeroDivisionError(), [A], [A] * 4, [Review("ok", ("error",), (1.0,))] * 3]
)
def test_a_member_that_breaks_its_promise_harms_only_itself(bad):
  class Breaks(Said):
    def answer(self):
      if isinstance(bad, Exception):
        self.futures[-1].set_exception(bad)
      else:
        self.futures[-1].set_result(bad)

  unsure = Review("ok", A.roles, A.weights, sure=False)
  for kind, first, expected in [
    (Panel, [A] * 3, [A] * 3),
    (Escalating, [unsure] * 3, [unsure] * 3),
  ]:
    members = [Said(first), Breaks(None)]
    both = Panel(members, "vote") if kind is Panel else Escalating(*members)
    future = both.submit(REQUESTS, 5.0)
    for member in members:
      member.answer()
    assert [r.roles for r in future.result(1.0)] == [r.roles for r in expected]


def test_members_keep_their_numbers_where_a_second_opinion_is_asked_too():
  panel = Panel([Said([A] * 3), Said([B] * 3)], "vote")
  second = Said([C] * 3)
  both = Escalating(panel, second)
  for calls, member in enumerate([*panel._members, second], 1):
    member.asked = [None] * calls
  stats = both.stats()
  assert [stats[f"review/calls{end}"] for end in ("", "_2", "_3")] == [1.0, 2.0, 3.0]


def test_the_spending_of_several_is_that_of_the_run():
  class Spends(Said):
    def stats(self):
      return {"review/dollars": 1.0, "review/dollars_spent": 5.0}

  assert Panel([Said([]), Spends([]), Spends([])], "vote").stats() == {
    "review/calls": 0.0,
    "review/dollars_2": 1.0,
    "review/dollars_3": 1.0,
    "review/dollars_spent": 5.0,
  }


def test_what_a_member_has_to_say_is_said():
  class Complains(Said):
    def problem(self):
      return "no key"

  assert Panel([Said([]), Complains([])], "vote").problem() == "no key"
  assert Escalating(Said([]), Said([])).problem() is None


def test_a_panel_from_the_config():
  truth = Truth(
    lambda r: ["error", "necessary"], lambda p, completions: [[0.5, 0.5]] * len(completions)
  )
  config = REVIEWERS["panel"](panel=("oracle", "random", "silent"), combine="mean")
  reviewer = open_reviewer(config, truth, None)
  many = [Request(f"{i}", "p", ("a", "b"), True, False) for i in range(200)]
  assert {review.status for review in reviewer.submit(many, 1.0).result(1.0)} == {"ok"}
  assert 0.7 < reviewer.stats()["review/disagreement"] < 0.95  # Five of six by chance.
