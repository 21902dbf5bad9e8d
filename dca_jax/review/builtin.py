"""Reviewers that need no model: the task's own labels, and controls made from them."""

import hashlib
import math
import random
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from dca_jax.review.types import Request, Review
from dca_jax.roles import ROLES

# What helps becomes wrong; what is wrong or needless becomes helpful.
_OPPOSITE = {
  "necessary": "error",
  "repair": "error",
  "inherits": "error",
  "error": "necessary",
  "redundant": "necessary",
  "irrelevant": "necessary",
}
_CHECKING = re.compile(r"\b(check|verif|wait|again|confirm|make sure)", re.IGNORECASE)


class Truth(NamedTuple):
  """What a task knows."""

  labels: Callable[[Request], Sequence[str]]
  """The true roles of a request's steps."""
  values: Callable[[str, Sequence[Sequence[str]]], Sequence[Sequence[float]]]
  """From a prompt and the steps of its completions to the values of their prefixes (see `task.Task.prefix_values`)."""


class Builtin:
  """A reviewer (see `types.Reviewer`) that answers in milliseconds and costs nothing."""

  def __init__(self, name: str, dice: "Dice", truth: Truth):
    self._name, self._dice, self._truth = name, dice, truth

  def submit(self, requests: Sequence[Request], deadline: float) -> "Future[list[Review]]":
    del deadline
    done: Future[list[Review]] = Future()
    done.set_result(REVIEWERS[self._name](self._dice, self._truth, requests))
    return done

  def stats(self) -> dict[str, float]:
    return {}

  def problem(self) -> None:
    return None

  def close(self) -> None:
    pass


class Dice(NamedTuple):
  """The settings of controls; see `ReviewerConfig`."""

  flip: float
  step: int
  seed: int


def _none(config, truth, requests) -> list[Review]:
  del config, truth
  return [Review("none")] * len(requests)


def _oracle(config, truth: Truth, requests: Sequence[Request]) -> list[Review]:
  del config
  by_problem: dict[str, list[int]] = {}
  for i, request in enumerate(requests):
    by_problem.setdefault(request.problem, []).append(i)
  values: list[Sequence[float]] = [()] * len(requests)
  for problem, rows in by_problem.items():
    for i, own in zip(rows, truth.values(problem, [requests[i].steps for i in rows]), strict=True):
      values[i] = own
  return [_review(truth.labels(request), own) for request, own in zip(requests, values, strict=True)]


def _noisy(config, truth, requests) -> list[Review]:
  reviews = []
  for request, review in zip(requests, _oracle(config, truth, requests), strict=True):
    dice = _dice(config, request.id)
    roles = [_OPPOSITE[role] if dice.random() < config.flip else role for role in review.roles]
    reviews.append(_review(roles, [1 - v if dice.random() < config.flip else v for v in review.values]))
  return reviews


def _random(config, truth, requests) -> list[Review]:
  del truth
  reviews = []
  for request in requests:
    dice = _dice(config, request.id)
    roles = [dice.choice(ROLES) for _ in request.steps]
    reviews.append(_review(roles, [dice.random() for _ in request.steps]))
  return reviews


def _lexical(config, truth, requests) -> list[Review]:
  """A check is a step with a word for it, or one that says again what an earlier step said."""
  del config, truth
  reviews = []
  for request in requests:
    checks = [bool(_CHECKING.search(s)) or s in request.steps[:k] for k, s in enumerate(request.steps)]
    plain = "necessary" if request.correct else "error"
    roles = tuple("necessary" if check else plain for check in checks)
    weights = tuple(3.0 if check else 1.0 for check in checks)
    values = tuple(min(1.0, 0.5 + 0.15 * sum(checks[:k])) for k in range(len(checks)))
    reviews.append(Review("ok", roles, weights, values))
  return reviews


def _thief(config, truth, requests) -> list[Review]:
  del truth
  reviews = []
  for request in requests:
    n = len(request.steps)
    chosen = max(0, n + config.step) if config.step < 0 else min(config.step, n - 1)
    role = "necessary" if request.correct else "error"
    roles = [role if k == chosen else "inherits" for k in range(n)]  # No table pays or blames what only inherits.
    reviews.append(_review(roles, [float(k > chosen) for k in range(n)]))
  return reviews


def _suffix(config, truth, requests) -> list[Review]:
  del truth
  reviews = []
  for request in requests:
    dice = [_dice(config, "".join(request.steps[k:])) for k in range(len(request.steps))]
    reviews.append(_review([d.choice(ROLES) for d in dice], [d.random() for d in dice]))
  return reviews


def _stale(config, truth, requests) -> list[Review]:
  reviews = _oracle(config, truth, requests)
  return [*reviews[-1:], *reviews[:-1]]


def _nan(config, truth, requests) -> list[Review]:
  reviews = []
  for request, review in zip(requests, _oracle(config, truth, requests), strict=True):
    lost = _dice(config, request.id).randrange(max(1, len(request.steps)))
    weights, values = (
      tuple(math.nan if k == lost else x for k, x in enumerate(xs)) for xs in (review.weights, review.values)
    )
    reviews.append(Review("ok", review.roles, weights, values))
  return reviews


def _silent(config, truth, requests) -> list[Review]:
  del config, truth
  return [Review("timeout")] * len(requests)


def _review(roles: Sequence[str], values: Sequence[float]) -> Review:
  return Review("ok", tuple(roles), (1.0,) * len(roles), tuple(values))


def _dice(config: Dice, name: str) -> random.Random:
  return random.Random(hashlib.sha256(f"{config.seed}/{name}".encode()).digest())


LABELLED = ("oracle", "noisy", "stale", "nan")  # They read a task's own labels.
REVIEWERS = {
  "none": _none,
  "oracle": _oracle,
  "noisy": _noisy,
  "random": _random,
  "lexical": _lexical,
  "thief": _thief,
  "suffix": _suffix,
  "stale": _stale,
  "nan": _nan,
  "silent": _silent,
}
