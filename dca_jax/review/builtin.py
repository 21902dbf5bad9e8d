"""Reviewers that need no model: the task's own labels, and controls made from them."""

import dataclasses
import hashlib
import random
from collections.abc import Callable, Sequence

from dca_jax.review.types import Request, Review, Reviewer
from dca_jax.roles import ROLES

Labeler = Callable[[Request], Sequence[str]]

# What helps becomes wrong; what is wrong or needless becomes helpful.
_OPPOSITE = {
  "necessary": "error",
  "repair": "error",
  "inherits": "error",
  "error": "necessary",
  "redundant": "necessary",
  "irrelevant": "necessary",
}


@dataclasses.dataclass(frozen=True)
class ReviewerConfig:
  """The `reviewer` section."""

  name: str = "none"
  """`none`, `oracle` (the task's own labels), `noisy` (the oracle with labels flipped), or `random` (roles at
  random)."""
  flip: float = 0.3
  """`noisy`: chance that a step's label is turned into its opposite; at 0.5 it no longer tells right from wrong."""
  seed: int = 0
  """`noisy` and `random`: their dice; the same sample always gets the same review."""

  def check(self) -> dict[str, str]:
    bad = {}
    if self.name not in REVIEWERS:
      bad["name"] = f"must be one of {', '.join(REVIEWERS)}"
    if not 0 <= self.flip <= 1:
      bad["flip"] = "must be between 0 and 1"
    return bad

  def unused(self) -> dict[str, str]:
    reads = {"noisy": ("flip", "seed"), "random": ("seed",)}.get(self.name, ())
    return {key: f"reviewer.name is '{self.name}'" for key in ("flip", "seed") if key not in reads}


def make_reviewer(config: ReviewerConfig, labeler: Labeler) -> Reviewer:
  """The reviewer that `config` names; `labeler` gives the true roles of a request's steps."""
  review = REVIEWERS[config.name]

  def reviewer(requests: Sequence[Request], deadline: float) -> list[Review]:
    del deadline  # These answer in microseconds.
    return [review(config, labeler, request) for request in requests]

  return reviewer


def _none(config, labeler, request) -> Review:
  del config, labeler, request
  return Review("none")


def _oracle(config, labeler, request) -> Review:
  del config
  return _review(labeler(request))


def _random(config, labeler, request) -> Review:
  del labeler
  dice = _dice(config, request)
  return _review([dice.choice(ROLES) for _ in request.steps])


def _noisy(config, labeler, request) -> Review:
  dice = _dice(config, request)
  return _review([_OPPOSITE[role] if dice.random() < config.flip else role for role in labeler(request)])


def _review(roles: Sequence[str]) -> Review:
  return Review("ok", tuple(roles), (1.0,) * len(roles))


def _dice(config: ReviewerConfig, request: Request) -> random.Random:
  return random.Random(hashlib.sha256(f"{config.seed}/{request.id}".encode()).digest())


REVIEWERS = {"none": _none, "oracle": _oracle, "noisy": _noisy, "random": _random}
