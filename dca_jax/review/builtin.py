"""Reviewers that need no model: the task's own labels, and controls made from them."""

import dataclasses
import hashlib
import random
from collections.abc import Callable, Sequence

from dca_jax.review.types import Request, Review, Reviewer
from dca_jax.roles import ROLES

Labeler = Callable[[Request], Sequence[str]]


@dataclasses.dataclass(frozen=True)
class ReviewerConfig:
  """The `reviewer` section."""

  name: str = "none"
  """`none`, `oracle` (the task's own labels), `noisy` (the oracle with flipped judgements), or `random` (roles at
  random)."""
  flip: float = 0.3
  """`noisy`: chance that a judgement is flipped; 0.5 leaves no information."""
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
  """Two judgements for each step, is it wrong and is it needless, each flipped with probability `flip`."""
  dice = _dice(config, request)
  roles = []
  for role in labeler(request):
    wrong = (role == "error") != (dice.random() < config.flip)
    needless = (role in ("redundant", "irrelevant")) != (dice.random() < config.flip)
    if wrong:
      roles.append("error")
    elif needless:
      roles.append(role if role in ("redundant", "irrelevant") else "redundant")
    else:
      roles.append(role if role in ("necessary", "inherits", "repair") else "necessary")
  return _review(roles)


def _review(roles: Sequence[str]) -> Review:
  return Review("ok", tuple(roles), (1.0,) * len(roles))


def _dice(config: ReviewerConfig, request: Request) -> random.Random:
  return random.Random(hashlib.sha256(f"{config.seed}/{request.id}".encode()).digest())


REVIEWERS = {"none": _none, "oracle": _oracle, "noisy": _noisy, "random": _random}
