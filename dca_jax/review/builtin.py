"""Reviewers that need no model: the task's own labels, and controls made from them."""

import dataclasses
import hashlib
import math
import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dca_jax.review.types import Request, Review, Reviewer
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


@dataclasses.dataclass(frozen=True)
class ReviewerConfig:
  """The `reviewer` section."""

  name: str = "none"
  """`none`; `oracle`, the task's own labels and prefix values; `noisy`, the oracle with labels flipped. And controls:
  `random`; `lexical` applauds whatever looks like a check; `thief` gives all to one step; `suffix` changes its mind
  about a step with what follows it; `stale` answers with the review of the completion before; `nan` gives the oracle's
  review with a number missing; `silent` never answers in time."""
  flip: float = 0.3
  """`noisy`: chance that a step's label is turned into its opposite; at 0.5 it no longer tells right from wrong. As
  likely a value becomes one minus itself."""
  step: int = -1
  """`thief`: the step that gets everything; negative numbers count from the end."""
  seed: int = 0
  """`noisy`, `random`, `suffix` and `nan`: their dice; the same sample always gets the same review."""

  def check(self) -> dict[str, str]:
    bad = {}
    if self.name not in REVIEWERS:
      bad["name"] = f"must be one of {', '.join(REVIEWERS)}"
    if not 0 <= self.flip <= 1:
      bad["flip"] = "must be between 0 and 1"
    return bad

  def unused(self) -> dict[str, str]:
    dice = ("seed",)
    reads = {"noisy": ("flip", "seed"), "random": dice, "suffix": dice, "nan": dice, "thief": ("step",)}
    keys = [key for key in ("flip", "step", "seed") if key not in reads.get(self.name, ())]
    return {key: f"reviewer.name is '{self.name}'" for key in keys}


def make_reviewer(config: ReviewerConfig, truth: Truth) -> Reviewer:
  """The reviewer that `config` names."""

  def reviewer(requests: Sequence[Request], deadline: float) -> list[Review]:
    del deadline  # These answer in milliseconds.
    return REVIEWERS[config.name](config, truth, requests)

  return reviewer


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


def _dice(config: ReviewerConfig, name: str) -> random.Random:
  return random.Random(hashlib.sha256(f"{config.seed}/{name}".encode()).digest())


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
