"""Reviewers that need no model: the task's own labels, and controls made from them."""

import collections
import hashlib
import math
import random
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from dca_jax.episode import ROLES
from dca_jax.review.types import Request, Review, Reviewer, finished

# What helps becomes wrong; what is wrong or needless becomes helpful.
_OPPOSITE = dict.fromkeys(ROLES, "necessary") | dict.fromkeys(("necessary", "repair", "inherits"), "error")
_CHECKING = re.compile(r"\b(check|verif|wait|again|confirm|make sure)", re.IGNORECASE)


class Truth(NamedTuple):
  """What a task knows."""

  labels: Callable[[Request], Sequence[str]]
  """The true roles of a request's steps."""
  values: Callable[[str, Sequence[Sequence[str]]], Sequence[Sequence[float]]]
  """From a prompt and the steps of its completions to the values of their prefixes (see `task.Task.prefix_values`)."""

  @classmethod
  def of(cls, task: Any) -> "Truth":
    """That of a task which offers labels and values; asked of another one, it fails."""
    return cls(
      lambda request: task.label_steps(request.problem, request.steps, request.truncated),
      lambda problem, completions: task.prefix_values(problem, completions),
    )


class Dice(NamedTuple):
  """The settings of controls; see `ReviewerConfig`."""

  flip: float
  step: int
  seed: int


class Builtin(Reviewer):
  """A reviewer that answers in milliseconds and costs nothing."""

  def __init__(self, name: str, dice: Dice, truth: Truth):
    self._name, self._dice, self._truth = name, dice, truth

  def submit(self, requests: Sequence[Request], deadline: float) -> "Future[list[Review]]":
    return finished(REVIEWERS[self._name](self._dice, self._truth, requests))


def _oracle(dice: Dice, truth: Truth, requests: Sequence[Request]) -> list[Review]:
  rows_of: dict[str, list[int]] = collections.defaultdict(list)
  for i, request in enumerate(requests):
    rows_of[request.problem].append(i)
  values: list[Sequence[float]] = [()] * len(requests)
  for problem, rows in rows_of.items():
    for i, own in zip(rows, truth.values(problem, [requests[i].steps for i in rows]), strict=True):
      values[i] = own
  return [_review(truth.labels(request), own) for request, own in zip(requests, values, strict=True)]


def _noisy(dice: Dice, truth: Truth, requests: Sequence[Request]) -> list[Review]:
  def noisy(request: Request, review: Review) -> Review:
    rng = _rng(dice, request.id)
    roles = [_OPPOSITE[role] if rng.random() < dice.flip else role for role in review.roles]
    return _review(roles, [1 - v if rng.random() < dice.flip else v for v in review.values])

  return list(map(noisy, requests, _oracle(dice, truth, requests)))


def _applauds_repeats(dice: Dice, truth: Truth, requests: Sequence[Request]) -> list[Review]:
  """The oracle, fooled by one thing: a step that says again what an earlier one said."""

  def fooled(request: Request, review: Review) -> Review:
    repeats = [step in request.steps[:k] for k, step in enumerate(request.steps)]
    said = zip(repeats, review.roles, strict=True)
    roles = tuple("necessary" if repeat else role for repeat, role in said)
    weights = tuple(3.0 if repeat else 1.0 for repeat in repeats)
    values = (min(1.0, v + 0.15 * sum(repeats[:k])) for k, v in enumerate(review.values))
    return Review("ok", roles, weights, tuple(values))

  return list(map(fooled, requests, _oracle(dice, truth, requests)))


def _random(dice: Dice, request: Request) -> Review:
  rng = _rng(dice, request.id)
  return _review([rng.choice(ROLES) for _ in request.steps], [rng.random() for _ in request.steps])


def _lexical(dice: Dice, request: Request) -> Review:
  """A check is a step with a word for it, or one that says again what an earlier step said."""
  checks = [bool(_CHECKING.search(s)) or s in request.steps[:k] for k, s in enumerate(request.steps)]
  plain = "necessary" if request.correct else "error"
  roles = tuple("necessary" if check else plain for check in checks)
  weights = tuple(3.0 if check else 1.0 for check in checks)
  return Review("ok", roles, weights, tuple(min(1.0, 0.5 + 0.15 * sum(checks[:k])) for k in range(len(checks))))


def _thief(dice: Dice, request: Request) -> Review:
  n = len(request.steps)
  chosen = max(0, n + dice.step) if dice.step < 0 else min(dice.step, n - 1)
  role = "necessary" if request.correct else "error"
  # No table pays or blames what only inherits.
  return _review([role if k == chosen else "inherits" for k in range(n)], [float(k > chosen) for k in range(n)])


def _suffix(dice: Dice, request: Request) -> Review:
  rngs = [_rng(dice, "".join(request.steps[k:])) for k in range(len(request.steps))]
  return _review([rng.choice(ROLES) for rng in rngs], [rng.random() for rng in rngs])


def _stale(dice: Dice, truth: Truth, requests: Sequence[Request]) -> list[Review]:
  reviews = _oracle(dice, truth, requests)
  return [*reviews[-1:], *reviews[:-1]]


def _nan(dice: Dice, truth: Truth, requests: Sequence[Request]) -> list[Review]:
  def punched(request: Request, review: Review) -> Review:
    lost = _rng(dice, request.id).randrange(max(1, len(request.steps)))
    weights, values = (
      tuple(math.nan if k == lost else x for k, x in enumerate(xs)) for xs in (review.weights, review.values)
    )
    return Review("ok", review.roles, weights, values)

  return list(map(punched, requests, _oracle(dice, truth, requests)))


def _each(review: Callable[[Dice, Request], Review]):
  """The reviewer of a batch that reads every completion by itself, and no truth."""
  return lambda dice, truth, requests: [review(dice, request) for request in requests]


def _review(roles: Sequence[str], values: Sequence[float]) -> Review:
  return Review("ok", tuple(roles), (1.0,) * len(roles), tuple(values))


def _rng(dice: Dice, name: str) -> random.Random:
  return random.Random(hashlib.sha256(f"{dice.seed}/{name}".encode()).digest())


LABELLED = ("oracle", "noisy", "applauds_repeats", "stale", "nan")  # They read a task's own labels.
REVIEWERS = {
  "none": _each(lambda dice, request: Review("none")),
  "oracle": _oracle,
  "noisy": _noisy,
  "applauds_repeats": _applauds_repeats,
  "random": _each(_random),
  "lexical": _each(_lexical),
  "thief": _each(_thief),
  "suffix": _each(_suffix),
  "stale": _stale,
  "nan": _nan,
  "silent": _each(lambda dice, request: Review("timeout")),
}
