"""Reviewers that need no model: the task's own labels, and controls made from them."""

import collections
import dataclasses
import hashlib
import math
import random
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import ClassVar

from dca_jax.checks import between, one_of
from dca_jax.doors import door
from dca_jax.episode import ROLES
from dca_jax.review.panel import Panel
from dca_jax.review.reviewer import ReviewerConfig, Uses
from dca_jax.review.types import Request, Review, Reviewer, Truth, finished

# What helps becomes wrong; what is wrong or needless becomes helpful.
_HELPFUL = ("necessary", "repair", "inherits")
_OPPOSITE = dict.fromkeys(ROLES, "necessary") | dict.fromkeys(_HELPFUL, "error")
_CHECKING = re.compile(r"\b(check|verif|wait|again|confirm|make sure)", re.IGNORECASE)


class Instant(Reviewer):
  """A reviewer that answers in milliseconds and costs nothing."""

  def __init__(self, answer: Callable[[Sequence[Request]], list[Review]]):
    self._answer = answer

  def submit(self, requests: Sequence[Request], deadline: float) -> "Future[list[Review]]":
    return finished(self._answer(requests))


@dataclasses.dataclass(frozen=True)
class Nobody(ReviewerConfig):
  """No reviewer."""

  name: str = "none"

  gives: ClassVar[tuple[str, ...]] = ()

  def unused(self) -> dict[str, str]:
    keys = ("escalate", "sample_frac", "overlap", "audit_every", "audit_floor")
    return super().unused() | dict.fromkeys(keys, f"reviewer.name is '{self.name}'")

  def open(self, uses: Uses) -> Reviewer:
    return Instant(lambda requests: [Review("none")] * len(requests))


@dataclasses.dataclass(frozen=True)
class _Control(ReviewerConfig):
  """Reads the episode and no truth."""

  gives: ClassVar[tuple[str, ...]] = ("roles", "values")

  def open(self, uses: Uses) -> Reviewer:
    return Instant(lambda requests: [self.review(request) for request in requests])


@dataclasses.dataclass(frozen=True)
class Random(_Control):
  """Draws roles and values."""

  name: str = "random"
  seed: int = 0
  """Its dice; the same sample always gets the same review."""

  def review(self, request: Request) -> Review:
    rng = dice(self.seed, request.id)
    return _review(
      [rng.choice(ROLES) for _ in request.steps], [rng.random() for _ in request.steps]
    )


@dataclasses.dataclass(frozen=True)
class Lexical(_Control):
  """Applauds a check: a step with a word for it, or one
  that says again what an earlier step said."""

  name: str = "lexical"

  def review(self, request: Request) -> Review:
    steps = request.steps
    checks = [bool(_CHECKING.search(s)) or s in steps[:k] for k, s in enumerate(steps)]
    plain = "necessary" if request.correct else "error"
    roles = tuple("necessary" if check else plain for check in checks)
    weights = tuple(3.0 if check else 1.0 for check in checks)
    values = tuple(min(1.0, 0.5 + 0.15 * sum(checks[:k])) for k in range(len(checks)))
    return Review("ok", roles, weights, values)


@dataclasses.dataclass(frozen=True)
class Thief(_Control):
  """Gives all to one step."""

  name: str = "thief"
  step: int = -1
  """The step that gets everything; negative numbers count from the end."""

  def review(self, request: Request) -> Review:
    n = len(request.steps)
    chosen = max(0, n + self.step) if self.step < 0 else min(self.step, n - 1)
    role = "necessary" if request.correct else "error"
    # No table pays or blames what only inherits.
    roles = [role if k == chosen else "inherits" for k in range(n)]
    return _review(roles, [float(k > chosen) for k in range(n)])


@dataclasses.dataclass(frozen=True)
class Suffix(_Control):
  """Changes its mind about a step with what follows it."""

  name: str = "suffix"
  seed: int = 0
  """Its dice."""

  def review(self, request: Request) -> Review:
    rngs = [dice(self.seed, "".join(request.steps[k:])) for k in range(len(request.steps))]
    return _review([rng.choice(ROLES) for rng in rngs], [rng.random() for rng in rngs])


@dataclasses.dataclass(frozen=True)
class Silent(_Control):
  """Never answers in time."""

  name: str = "silent"

  def review(self, request: Request) -> Review:
    return Review("timeout")


@dataclasses.dataclass(frozen=True)
class Oracle(ReviewerConfig):
  """The task's own labels and, where it has them, prefix values."""

  name: str = "oracle"

  reads_truth: ClassVar[tuple[str, ...]] = ("labels", "values")
  gives: ClassVar[tuple[str, ...]] = ("roles", "values")

  def open(self, uses: Uses) -> Reviewer:
    return Instant(lambda requests: self.distorted(requests, true_reviews(uses.truth, requests)))

  @property
  def is_truth(self) -> bool:
    return type(self) is Oracle

  def distorted(self, requests: Sequence[Request], reviews: list[Review]) -> list[Review]:
    """What it says, knowing the true reviews."""
    return [self.distort(*pair) for pair in zip(requests, reviews, strict=True)]

  def distort(self, request: Request, review: Review) -> Review:
    return review


@dataclasses.dataclass(frozen=True)
class Noisy(Oracle):
  """The oracle with labels flipped."""

  name: str = "noisy"
  flip: float = 0.3
  """Chance that a step's label is turned into its opposite; at 0.5 it no longer tells right from
  wrong. As likely a value becomes one minus itself."""
  seed: int = 0
  """Its dice; the same sample always gets the same review."""

  def check(self) -> dict[str, str]:
    return super().check() | between(0, 1, self, "flip")

  def distort(self, request: Request, review: Review) -> Review:
    rng = dice(self.seed, request.id)
    roles = [_OPPOSITE[role] if rng.random() < self.flip else role for role in review.roles]
    return _review(roles, [1 - v if rng.random() < self.flip else v for v in review.values])


@dataclasses.dataclass(frozen=True)
class Fooled(Oracle):
  """The oracle, fooled by one thing: a step that says again what an earlier one said."""

  name: str = "fooled"

  def distort(self, request: Request, review: Review) -> Review:
    repeats = [step in request.steps[:k] for k, step in enumerate(request.steps)]
    said = zip(repeats, review.roles, strict=True)
    roles = tuple("necessary" if repeat else role for repeat, role in said)
    weights = tuple(3.0 if repeat else 1.0 for repeat in repeats)
    values = (min(1.0, v + 0.15 * sum(repeats[:k])) for k, v in enumerate(review.values))
    return Review("ok", roles, weights, tuple(values))


@dataclasses.dataclass(frozen=True)
class Stale(Oracle):
  """The review of the completion before, of those that it is asked about together."""

  name: str = "stale"

  def distorted(self, requests: Sequence[Request], reviews: list[Review]) -> list[Review]:
    return [*reviews[-1:], *reviews[:-1]]


@dataclasses.dataclass(frozen=True)
class NaN(Oracle):
  """The oracle's review with a number missing."""

  name: str = "nan"
  seed: int = 0
  """Its dice."""

  def distort(self, request: Request, review: Review) -> Review:
    lost = dice(self.seed, request.id).randrange(max(1, len(request.steps)))
    weights, values = (
      tuple(math.nan if k == lost else x for k, x in enumerate(xs))
      for xs in (review.weights, review.values)
    )
    return Review("ok", review.roles, weights, values)


@dataclasses.dataclass(frozen=True)
class PanelConfig(ReviewerConfig):
  """Several at once. Its members get those of its settings that they have too."""

  name: str = "panel"
  panel: tuple[str, ...] = door(())
  """Its members, each NAME or NAME:MODEL."""
  combine: str = "vote"
  """`vote`, `mean` or `median`."""
  flip: float = Noisy.flip
  """Of a member `noisy`: the chance that a label or a value is turned into its opposite."""
  step: int = Thief.step
  """Of a member `thief`: the step that gets everything; negative numbers count from the end."""
  seed: int = 0
  """The dice of all members that have any."""

  @property
  def first(self) -> tuple[ReviewerConfig, ...]:
    return self._found(self.panel)

  def check(self) -> dict[str, str]:
    bad = super().check() | one_of(self, "combine", "vote", "mean", "median")
    if not self.panel:
      bad["panel"] = "must name at least one reviewer"
    return bad | self._check_members("panel", self.panel)

  def unused(self) -> dict[str, str]:
    keys = [k for k in ("flip", "step", "seed") if not any(hasattr(m, k) for m in self.members)]
    return super().unused() | dict.fromkeys(keys, "none of the panel's members reads it")

  def open(self, uses: Uses) -> Reviewer:
    return Panel([member.open(uses) for member in self.first], self.combine)


def true_reviews(truth: Truth, requests: Sequence[Request]) -> list[Review]:
  """What the task itself says of every step."""
  rows_of: dict[str, list[int]] = collections.defaultdict(list)
  for i, request in enumerate(requests):
    rows_of[request.problem].append(i)
  values: list[Sequence[float]] = [()] * len(requests)
  for problem, rows in rows_of.items():
    for i, own in zip(rows, truth.values(problem, [requests[i].steps for i in rows]), strict=True):
      values[i] = own
  return [_review(truth.labels(r), own) for r, own in zip(requests, values, strict=True)]


def _review(roles: Sequence[str], values: Sequence[float]) -> Review:
  return Review("ok", tuple(roles), (1.0,) * len(roles), tuple(values))


def dice(seed: int, name: str) -> random.Random:
  """The same for the same name, in every process."""
  return random.Random(hashlib.sha256(f"{seed}/{name}".encode()).digest())
