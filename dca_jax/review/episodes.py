"""From episodes to reviews: who is worth a question, and what of the answers is usable."""

import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from dca_jax.episode import Episode, Review
from dca_jax.review.types import Request, Reviewer


class ReadsReviews(Protocol):
  """What matters here of a credit scheme."""

  idle_when_equal: ClassVar[bool]
  least_steps: ClassVar[int]


class Asked(NamedTuple):
  """Questions about some of a batch's episodes, and the answers to come."""

  requests: list[Request | None]
  """One for each episode; None where it is not asked about."""
  reviews: Future[list[Review]]


def ask(
  reviewer: Reviewer, episodes: Sequence[Episode], chosen: Sequence[bool], deadline: float
) -> Asked:
  """Hands the episodes that are `chosen` to the reviewer, and returns at once."""
  requests = [
    Request.of(episode) if ask else None for episode, ask in zip(episodes, chosen, strict=True)
  ]
  return Asked(requests, reviewer.submit([r for r in requests if r], deadline))


def worth_a_review(scheme: ReadsReviews, group: Sequence[Episode], share: float) -> list[bool]:
  """Which episodes of a group a review can matter to, and of these the `share` that is asked
  about."""
  idle = scheme.idle_when_equal and len({episode.outcome.reward for episode in group}) == 1
  chosen = []
  for g, episode in enumerate(group):
    short = len(episode.steps) < scheme.least_steps
    dice = np.random.default_rng([episode.problem.id, g])
    chosen.append(episode.trained and not idle and not short and dice.random() < share)
  return chosen


def wait_for_reviews(asked: Sequence[Asked], deadline: float) -> list[Review]:
  """A review for every episode; one that was not asked for is `skipped`."""
  end = time.monotonic() + deadline
  reviews = []
  for part in asked:
    sent = [request for request in part.requests if request]
    came = iter(usable(part.reviews, sent, max(0.0, end - time.monotonic())))
    reviews += [next(came) if request else Review("skipped") for request in part.requests]
  return reviews


def usable(
  reviews: Future[list[Review]], requests: Sequence[Request], deadline: float
) -> list[Review]:
  """The reviews when they have come; one that does not fit its episode is `invalid`."""
  came = [Review("timeout")] * len(requests)
  with contextlib.suppress(
    TimeoutError
  ):  # A client keeps its deadline; this is for one that does not.
    came = reviews.result(deadline + 1.0)
  return [
    review.checked(len(request.steps)) for review, request in zip(came, requests, strict=True)
  ]


class Canary(NamedTuple):
  """An episode whose labels are known, to see how good a reviewer is while it works."""

  request: Request
  labels: list[str]


def canary_accuracy(reviewer: Reviewer, canaries: Sequence[Canary], deadline: float) -> float:
  """Share of the canaries' steps whose role the reviewer knew; failed reviews know none."""
  requests = [canary.request for canary in canaries]
  reviews = usable(reviewer.submit(requests, deadline), requests, deadline)
  known = [
    role == true
    for review, canary in zip(reviews, canaries, strict=True)
    for role, true in zip(review.roles or [""] * len(canary.labels), canary.labels, strict=True)
  ]
  return sum(known) / len(known)
