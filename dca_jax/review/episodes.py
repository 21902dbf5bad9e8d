"""From episodes to reviews: who is worth a question, and what of the answers is usable."""

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from dca_jax.episode import Episode, Review
from dca_jax.review.audit import usable as has_roles
from dca_jax.review.faults import Labels, Pair, caught, plant
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


def worth_a_review(
  scheme: ReadsReviews, episodes: Sequence[Episode], group: int, share: float
) -> list[bool]:
  """Which episodes a review can matter to, and of these the `share` that is asked about."""
  chosen = []
  for i, episode in enumerate(episodes):
    first = i // group * group
    rewards = {other.outcome.reward for other in episodes[first : first + group]}
    idle = scheme.idle_when_equal and len(rewards) == 1
    short = len(episode.steps) < scheme.least_steps
    dice = np.random.default_rng([episode.problem.id, i % group])
    chosen.append(episode.trained and not idle and not short and dice.random() < share)
  return chosen


def wait_for_reviews(asked: Asked, deadline: float) -> list[Review]:
  """A review for every episode; one that was not asked for is `skipped`."""
  sent = [request for request in asked.requests if request]
  came = iter(usable(asked.reviews, sent, deadline))
  return [next(came) if request else Review("skipped") for request in asked.requests]


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


_EACH = 2
"""Faults of each kind and tier that an audit in training plants."""


def audited(
  reviewer: Reviewer, episodes: Sequence[Episode], labels: Labels | None, deadline: float
) -> dict[str, float]:
  """How the reviewer meets faults planted in the right answers among `episodes`, as metrics; see
  `faults.caught`. Empty where nothing could be planted, or no review of it is usable.

  Args:
    labels: true roles, where the task knows them.
  """
  planted = plant([Request.of(episode) for episode in episodes], _EACH, labels)
  both = [request for p in planted for request in (p.case.request, p.twin)]
  requests = [*dict.fromkeys(both)]
  came = usable(reviewer.submit(requests, deadline), requests, deadline)
  said = dict(zip(requests, came, strict=True))
  pairs = [Pair(p, said[p.case.request], said[p.twin]) for p in planted]
  told = [pair for pair in pairs if has_roles(pair.edited) and has_roles(pair.twin)]
  return {f"review/{name}": e.value for name, e in caught(told).items()}
