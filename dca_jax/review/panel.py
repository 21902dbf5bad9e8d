"""Several reviewers as one: all of them asked at once, or a second one
where the first is unsure."""

import functools
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import Future

from dca_jax.review.types import Request, Review, Reviewer, Submit, Trial


class _Several:
  def __init__(self, members: Sequence[Reviewer]):
    self._members = members
    self.size: int = sum(getattr(member, "size", 1) for member in members)
    """Reviewers in it, those of a panel in it too."""

  def submit(self, requests: Sequence[Request], deadline: float) -> "Future[list[Review]]":
    return self.begin_step()(requests, deadline)

  def begin_step(self, step: int = 0) -> Submit:
    return functools.partial(self._submit, [member.begin_step(step) for member in self._members])

  def _submit(self, members: Sequence[Submit], requests, deadline) -> "Future[list[Review]]":
    """Asks the members."""
    raise NotImplementedError

  def problem(self) -> str | None:
    return next((problem for member in self._members if (problem := member.problem())), None)

  def trial(self, seconds: float) -> Trial:
    trials = [member.trial(seconds) for member in self._members]
    return Trial(*("; ".join(filter(None, texts)) for texts in zip(*trials, strict=True)))

  def failures(self) -> str:
    return "; ".join(filter(None, (member.failures() for member in self._members)))

  def close(self) -> None:
    for member in self._members:
      member.close()

  def _member_stats(self) -> dict[str, float]:
    """Of the first member under plain names, of others with their number; the budget is shared."""
    out: dict[str, float] = {}
    number = 1
    for member in self._members:
      for key, value in member.stats().items():
        plain = number == 1 or key == "review/dollars_spent"
        out[key if plain else f"{key}_{number}"] = value
      number += getattr(member, "size", 1)
    return out


class Panel(_Several):
  """Asks every member and combines what they say; see `combine_reviews`."""

  def __init__(self, members: Sequence[Reviewer], how: str):
    super().__init__(members)
    self._how = how
    self._disagreed: list[float] = []

  def _submit(self, members: Sequence[Submit], requests, deadline) -> "Future[list[Review]]":
    asked = [submit(requests, deadline) for submit in members]
    result: Future[list[Review]] = Future()

    def wait_for(k: int) -> None:
      if k < len(asked):
        asked[k].add_done_callback(lambda _: wait_for(k + 1))
      else:
        result.set_result(self._combine([_said(future, requests) for future in asked]))

    wait_for(0)
    return result

  def _combine(self, by_member: list[list[Review]]) -> list[Review]:
    combined = [combine_reviews(reviews, self._how) for reviews in zip(*by_member, strict=True)]
    self._disagreed += [step for _, disagreed in combined for step in disagreed]
    return [review for review, _ in combined]

  def stats(self) -> dict[str, float]:
    out = self._member_stats()
    if self._disagreed:
      out["review/disagreement"] = statistics.fmean(self._disagreed)
    self._disagreed = []
    return out


def _said(done: "Future[list[Review]]", requests: Sequence[Request]) -> list[Review]:
  """What a member said, as far as it fits what it was asked; a bad one harms only itself."""
  try:
    reviews = done.result()
  except Exception:  # A member may raise anything.
    reviews = []
  if len(reviews) != len(requests):
    return [Review("client_error")] * len(requests)
  return [review.checked(len(r.steps)) for review, r in zip(reviews, requests, strict=True)]


def combine_reviews(reviews: Sequence[Review], how: str) -> tuple[Review, list[float]]:
  """One review of several of the same completion,
  and for each step whether the reviewers differed (0 or 1).

  A step's role is the most frequent one, ties going to the reviewer named first. Its weight is,
  with `vote`, the mean of those who gave that role; with `mean` and `median` that of all, who gave
  another role counting as 0. Values are means or, with `median`, medians. Reviews that failed are
  left out; where all did, the first one's failure stands. A step's reason is that of the first who
  gave the role.
  """
  good = [review for review in reviews if review.status == "ok"]
  if not good:
    return reviews[0], []
  middle = statistics.median if how == "median" else statistics.fmean
  named = [review for review in good if review.roles]
  roles, weights, disagreed, reasons = [], [], [], []
  for k in range(len(named[0].roles) if named else 0):
    said = [(review.roles[k], review.weights[k]) for review in named]
    role = statistics.mode(r for r, _ in said)
    for_it = [w for r, w in said if r == role]
    weights.append(
      float(middle(for_it if how == "vote" else [w if r == role else 0.0 for r, w in said]))
    )
    roles.append(role)
    why = (review.reasons[k] for review in named if review.reasons and review.roles[k] == role)
    reasons.append(next(why, ""))
    disagreed.append(float(len(for_it) < len(said)))
  valued = [review.values for review in good if review.values]
  values = tuple(float(middle(v)) for v in zip(*valued, strict=True))
  model = "+".join(dict.fromkeys(review.model for review in good if review.model))
  cached = all(review.cached for review in good)
  sure = all(review.sure for review in good)
  suspicious = any(review.suspicious for review in good)
  flags = sure, suspicious, model, cached
  whys = tuple(reasons) if any(reasons) else ()
  return Review("ok", tuple(roles), tuple(weights), values, *flags, whys), disagreed


class Escalating(_Several):
  """Asks the second reviewer about the completions of which the first was not sure,
  in the time that is left."""

  def __init__(self, first: Reviewer, second: Reviewer):
    super().__init__([first, second])
    self._asked = self._escalated = 0

  def _submit(self, members: Sequence[Submit], requests, deadline) -> "Future[list[Review]]":
    ask_first, ask_second = members
    end, result = time.monotonic() + deadline, Future()  # type: tuple[float, Future[list[Review]]]

    def first_answered(done) -> None:
      reviews = _said(done, requests)
      unsure = [i for i, review in enumerate(reviews) if review.status == "ok" and not review.sure]
      self._asked, self._escalated = self._asked + len(reviews), self._escalated + len(unsure)
      left = end - time.monotonic()
      if not unsure or left <= 0:
        result.set_result(reviews)
        return

      def second_answered(done) -> None:
        for i, review in zip(unsure, _said(done, again), strict=True):
          reviews[i] = review if review.status == "ok" else reviews[i]
        result.set_result(reviews)

      again = [requests[i] for i in unsure]
      ask_second(again, left).add_done_callback(second_answered)

    ask_first(requests, deadline).add_done_callback(first_answered)
    return result

  def stats(self) -> dict[str, float]:
    out = self._member_stats() | {"review/escalated": self._escalated / max(1, self._asked)}
    self._asked = self._escalated = 0
    return out
