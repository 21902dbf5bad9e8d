"""From episodes to reviews: who is worth a question, and what of the answers is usable."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from dca_jax.episode import Episode, Review
from dca_jax.review.audit import usable as has_roles
from dca_jax.review.faults import Labels, Pair, caught, plant
from dca_jax.review.types import Request, Reviewer, Submit


class ReadsReviews(Protocol):
  """What matters here of a credit scheme."""

  idle_when_equal: ClassVar[bool]
  least_steps: ClassVar[int]


class Asked(NamedTuple):
  """Questions about some of a group's episodes, and the answers to come."""

  requests: list[Request | None]
  """One for each episode; None where it is not asked about."""
  reviews: Future[list[Review]]


def ask(
  submit: Submit, episodes: Sequence[Episode], chosen: Sequence[bool], deadline: float
) -> Asked:
  """Hands the episodes that are `chosen` to a reviewer, and returns at once."""
  requests = [
    Request.of(episode) if ask else None for episode, ask in zip(episodes, chosen, strict=True)
  ]
  return Asked(requests, submit([r for r in requests if r], deadline))


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
  """A review for every episode of all groups; one that was not asked for is `skipped`."""
  reviews, end = [], time.monotonic() + deadline + _SPARE
  for group in asked:
    sent = [request for request in group.requests if request]
    came = iter(usable(group.reviews, sent, max(0.0, end - time.monotonic())))
    reviews += [next(came) if request else Review("skipped") for request in group.requests]
  return reviews


_SPARE = 1.0
"""Seconds: a client keeps its deadline, and is waited for no longer if it does not."""


def usable(
  reviews: Future[list[Review]], requests: Sequence[Request], seconds: float
) -> list[Review]:
  """The reviews when they have come, in `seconds`; one that does not fit its episode is
  `invalid`."""
  came = [Review("timeout")] * len(requests)
  with contextlib.suppress(TimeoutError):
    came = reviews.result(seconds)
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
  came = usable(reviewer.submit(requests, deadline), requests, deadline + _SPARE)
  said = dict(zip(requests, came, strict=True))
  pairs = [Pair(p, said[p.case.request], said[p.twin]) for p in planted]
  told = [pair for pair in pairs if has_roles(pair.edited) and has_roles(pair.twin)]
  return {f"review/{name}": e.value for name, e in caught(told).items()}


def too_blind(metrics: Mapping[str, float], floor: float) -> str | None:
  """Why the run should end where an audit has found less than `floor` of what was planted."""
  found = metrics.get("review/planted_found", 1.0)
  if found >= floor:
    return None
  return f"the reviewer found {found:.0%} of the planted faults (reviewer.audit_floor is {floor:g})"
