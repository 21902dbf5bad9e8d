"""The reviewers that need no model."""

import subprocess
import sys

import pytest

from dca_jax.review import REVIEWERS, Request, ReviewerConfig, make_reviewer
from dca_jax.roles import ROLES
from dca_jax.task import Chains, ChainsConfig

TASK = Chains(ChainsConfig(lines=4))
PROMPT = "+3a*2b-4c+1d?cm7n3;"
STEPS = ("a1;", "c7;", "b6;", "b6;", "a0;", "c6;", "m7;", "#6$")


def _labels(request):
  return TASK.label_steps(request.problem, request.steps, request.truncated)


def _requests(count, steps=STEPS):
  return [Request(f"7/{i}", PROMPT, steps, correct=True, truncated=False) for i in range(count)]


def _reviews(requests, labeler=_labels, **config):
  return make_reviewer(ReviewerConfig(**config), labeler)(requests, 1.0)


def test_oracle_gives_the_labels_of_the_task():
  requests = [
    *_requests(1),
    Request("8/0", PROMPT, ("a0;", "c"), correct=False, truncated=True),
    Request("8/1", PROMPT, (), correct=False, truncated=True),
  ]
  for request, review in zip(requests, _reviews(requests, name="oracle"), strict=True):
    assert review.status == "ok"
    assert list(review.roles) == TASK.label_steps(request.problem, request.steps, request.truncated)
    assert review.weights == (1.0,) * len(request.steps)


@pytest.mark.parametrize("name", REVIEWERS)
def test_one_review_for_each_request_in_order(name):
  requests = [Request(f"{i}", PROMPT, STEPS[:i], correct=False, truncated=False) for i in range(len(STEPS))]
  reviews = _reviews(requests, name=name)
  assert [len(review.roles) for review in reviews] == ([0] * len(STEPS) if name == "none" else list(range(len(STEPS))))
  assert [len(review.weights) for review in reviews] == [len(review.roles) for review in reviews]
  # One at a time and backwards: a review depends on its own request only.
  assert [_reviews([request], name=name)[0] for request in reversed(requests)] == reviews[::-1]
  assert _reviews([], name=name) == []


def test_none_says_so():
  assert {(r.status, r.roles, r.weights) for r in _reviews(_requests(3), name="none")} == {("none", (), ())}


@pytest.mark.parametrize("name", ["noisy", "random"])
def test_the_dice_are_the_samples_own(name):
  requests = _requests(40)
  reviews = _reviews(requests, name=name)
  assert reviews == _reviews(requests, name=name)
  # The text does not enter: the same sample meets the same dice.
  assert _reviews(requests, lambda _: ["necessary"] * 8, name=name) == _reviews(
    _requests(40, ("x",) * 8), lambda _: ["necessary"] * 8, name=name
  )
  assert len(set(reviews)) > 30
  assert reviews != _reviews(requests, name=name, seed=1)


def test_random_draws_every_role_equally_often():
  roles = [role for review in _reviews(_requests(1000), name="random") for role in review.roles]
  assert all(abs(roles.count(role) / len(roles) - 1 / 6) < 0.03 for role in ROLES)


def test_noisy_without_noise_is_the_oracle():
  requests = _requests(1)
  assert _reviews(requests, name="noisy", flip=0.0) == _reviews(requests, name="oracle")
  for role in ROLES:
    (review,) = _reviews(requests, lambda _, role=role: [role] * 8, name="noisy", flip=0.0)
    assert review.roles == (role,) * 8


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("flip", [0.1, 0.3, 0.5, 1.0])
def test_noisy_turns_labels_into_their_opposite_at_the_asked_rate(role, flip):
  reviews = _reviews(_requests(750), lambda _: [role] * 8, name="noisy", flip=flip)
  roles = [r for review in reviews for r in review.roles]  # 6,000: a standard error of at most 0.7 %
  opposite = "necessary" if role in ("error", "redundant", "irrelevant") else "error"
  assert abs(_rate([r == opposite for r in roles]) - flip) < 0.03
  assert set(roles) <= {role, opposite}


def test_noisy_flips_are_independent():
  first, second = zip(
    *(review.roles[:2] for review in _reviews(_requests(4000), lambda _: ["inherits"] * 8, name="noisy")), strict=True
  )
  both = [a == b == "error" for a, b in zip(first, second, strict=True)]
  assert abs(_rate(both) - 0.09) < 0.03


def test_reviewing_needs_no_jax():
  """So that a reviewer can run on a host without an accelerator, and starts fast."""
  code = "import sys, dca_jax.review; assert not {'jax', 'jaxlib', 'flax'} & set(sys.modules)"
  subprocess.run([sys.executable, "-c", code], check=True)


def _rate(flags):
  return sum(flags) / len(flags)
