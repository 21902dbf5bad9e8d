"""The reviewers that need no model."""

import subprocess
import sys

import pytest

from dca_jax.episode import ROLES
from dca_jax.review import REVIEWERS, LanguageModel, Request, Review, Truth, open_reviewer
from dca_jax.tasks import Chains, ChainsConfig

TASK = Chains(ChainsConfig(lines=4))
PROMPT = "+3a*2b-4c+1d?cm7n3;"
STEPS = ("a1;", "c7;", "b6;", "b6;", "a0;", "c6;", "m7;", "#6$")


def _labels(request):
  return TASK.label_steps(request.problem, request.steps, request.truncated)


def _requests(count, steps=STEPS):
  return [Request(f"7/{i}", PROMPT, steps, correct=True, truncated=False) for i in range(count)]


def _reviews(requests, labeler=_labels, name="oracle", **config):
  reviewer = open_reviewer(REVIEWERS[name](**config), Truth(labeler, TASK.prefix_values), None)
  return reviewer.submit(requests, 1.0).result()


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
    rows = [r for r in requests if r.problem == request.problem]
    assert (
      list(review.values)
      == TASK.prefix_values(PROMPT, [r.steps for r in rows])[rows.index(request)]
    )


INSTANT = [
  name
  for name, kind in REVIEWERS.items()
  if name not in ("panel", "trained") and not issubclass(kind, LanguageModel)
]


@pytest.mark.parametrize("name", INSTANT)
def test_one_review_for_each_request_in_order(name):
  requests = [
    Request(f"{i}", PROMPT, STEPS[:i], correct=False, truncated=False) for i in range(len(STEPS))
  ]
  reviews = _reviews(requests, name=name)
  sizes = list(range(len(STEPS)))
  sizes = {
    "none": [0] * len(STEPS),
    "silent": [0] * len(STEPS),
    "stale": [*sizes[-1:], *sizes[:-1]],
  }.get(name, sizes)
  assert [len(review.roles) for review in reviews] == sizes
  assert [len(review.weights) for review in reviews] == sizes
  assert [len(review.values) for review in reviews] == sizes
  # One at a time and backwards: roles and weights depend on the own request only; values also on
  # its problem's others.
  if name != "stale":
    alone = [_reviews([request], name=name)[0] for request in reversed(requests)]
    assert [r.roles for r in alone] == [r.roles for r in reviews[::-1]]
    assert str([r.weights for r in alone]) == str(
      [r.weights for r in reviews[::-1]]
    )  # NaN is not itself
  assert _reviews([], name=name) == []


@pytest.mark.parametrize("name", INSTANT)
@pytest.mark.parametrize("steps", [(), ("#6$",), ("a0;", "b6;") * 60], ids=["none", "one", "many"])
def test_answers_of_any_number_of_steps_are_reviewed(name, steps):
  requests = _requests(3, steps)
  reviews = _reviews(requests, name=name)
  assert len(reviews) == 3
  for review in reviews:
    said = len(steps) if review.status == "ok" else 0
    assert (len(review.roles), len(review.weights), len(review.values)) == (said,) * 3
    if steps:
      assert review.checked(len(steps)) is review
    assert all(0 <= v <= 1 or v != v for v in review.values)


def test_the_oracle_keeps_the_order_of_interleaved_problems():
  """Values are asked for problem by problem."""
  other = "+1a+1b+1c+1d?cm0n0;"
  requests = [
    Request(f"{i}", (PROMPT, other)[i % 2], STEPS[: i + 1], correct=False, truncated=False)
    for i in range(6)
  ]
  reviews = _reviews(requests, name="oracle")
  for first, prompt in enumerate((PROMPT, other)):
    own = TASK.prefix_values(prompt, [r.steps for r in requests[first::2]])
    assert [list(review.values) for review in reviews[first::2]] == own
  assert reviews[4].values[:2] != reviews[5].values[:2]


@pytest.mark.parametrize("name", ["oracle", "noisy", "fooled", "random", "lexical", "thief"])
def test_values_know_neither_the_outcome_nor_what_follows(name):
  others = [("a0;", "c6;", "#6$"), ("a1;", "c7;", "#7$")]

  def values(steps, **outcome):
    requests = [Request("7/0", PROMPT, steps, **outcome)]
    requests += [
      Request(f"7/{i}", PROMPT, own, correct=i == 1, truncated=False)
      for i, own in enumerate(others, 1)
    ]
    return _reviews(requests, name=name)[0].values

  plain = values(STEPS, correct=True, truncated=False)
  assert len(plain) == 8
  assert values(STEPS, correct=False, truncated=False) == plain
  assert values(STEPS, correct=False, truncated=True) == plain
  for j in range(8):
    edited = (*STEPS[:j], "c9;", "a0;", "check", "wait", "a0;", "c1;", "d2;", "#9$")[:8]
    assert values(edited, correct=False, truncated=False)[: j + 1] == plain[: j + 1]


def test_none_says_so():
  assert {(r.status, r.roles, r.weights) for r in _reviews(_requests(3), name="none")} == {
    ("none", (), ())
  }


@pytest.mark.parametrize("name", ["noisy", "random"])
def test_the_dice_are_the_samples_own(name):
  requests = _requests(40)
  reviews = _reviews(requests, name=name)
  assert reviews == _reviews(requests, name=name)
  # The text does not enter: the same sample meets the same dice.
  alike = [
    _reviews(r, lambda _: ["necessary"] * 8, name=name)
    for r in (requests, _requests(40, ("x",) * 8))
  ]
  assert [review.roles for review in alike[0]] == [review.roles for review in alike[1]]
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
  roles = [
    r for review in reviews for r in review.roles
  ]  # 6,000: a standard error of at most 0.7 %
  opposite = "necessary" if role in ("error", "redundant", "irrelevant") else "error"
  assert abs(_rate([r == opposite for r in roles]) - flip) < 0.03
  assert set(roles) <= {role, opposite}


def test_noisy_flips_are_independent():
  first, second = zip(
    *(
      review.roles[:2]
      for review in _reviews(_requests(4000), lambda _: ["inherits"] * 8, name="noisy")
    ),
    strict=True,
  )
  both = [a == b == "error" for a, b in zip(first, second, strict=True)]
  assert abs(_rate(both) - 0.09) < 0.03


def test_noisy_values_become_one_minus_themselves_at_the_asked_rate():
  # One at a time: a value reads a problem's other completions, and 750 of them take minutes.
  requests = _requests(750)
  oracle = _reviews(requests[:1], name="oracle")[0].values
  noisy = [_reviews([request], name="noisy")[0].values for request in requests]
  assert _rate(
    [a != b for values in noisy for a, b in zip(values, oracle, strict=True) if b != 0.5]
  ) == pytest.approx(0.3, abs=0.03)
  assert all(a in (b, 1 - b) for values in noisy for a, b in zip(values, oracle, strict=True))
  for request in requests[:20]:
    assert _reviews([request], name="noisy", flip=1.0)[0].values == tuple(1 - v for v in oracle)


# Controls.


def test_fooled_is_the_oracle_except_about_repeats():
  steps = ("a0;", "a0;", "b6;", "c6;", "a0;", "#6$")
  fooled, oracle = (_reviews(_requests(1, steps), name=name)[0] for name in ("fooled", "oracle"))
  for k in range(6):
    repeats = k in (1, 4)
    assert fooled.roles[k] == ("necessary" if repeats else oracle.roles[k])
    assert fooled.weights[k] == (3.0 if repeats else 1.0)
    assert fooled.values[k] == pytest.approx(
      min(1.0, oracle.values[k] + 0.15 * sum(j < k for j in (1, 4)))
    )
  assert "necessary" not in (oracle.roles[1], oracle.roles[4])


def test_lexical_applauds_what_looks_like_a_check():
  steps = ("a0;", "Let me verify: a0;", "a0;", "b6;", "wait", "#1$")
  for correct, plain in ((True, "necessary"), (False, "error")):
    (review,) = _reviews([Request("1", PROMPT, steps, correct, False)], name="lexical")
    assert review.roles == (plain, "necessary", "necessary", plain, "necessary", plain)
    assert review.weights == (1.0, 3.0, 3.0, 1.0, 3.0, 1.0)
    assert review.values == pytest.approx((0.5, 0.5, 0.65, 0.8, 0.8, 0.95))


@pytest.mark.parametrize(("step", "chosen"), [(-1, 7), (-3, 5), (0, 0), (2, 2), (99, 7), (-99, 0)])
def test_thief_gives_everything_to_one_step(step, chosen):
  (review,) = _reviews(_requests(1), name="thief", step=step)
  assert [k for k, role in enumerate(review.roles) if role == "necessary"] == [chosen]
  (review,) = _reviews(
    [Request("1", PROMPT, STEPS, correct=False, truncated=False)], name="thief", step=step
  )
  assert [k for k, role in enumerate(review.roles) if role == "error"] == [chosen]
  assert review.values == tuple(float(k > chosen) for k in range(8))


def test_suffix_changes_its_mind_about_a_step_with_what_follows():
  ends = [(*STEPS[:3], f"a{i};") for i in range(10)]
  reviews = [_reviews(_requests(1, steps), name="suffix")[0] for steps in ends]
  for k in range(3):
    assert len({review.values[k] for review in reviews}) == 10
    assert len({review.roles[k] for review in reviews}) > 1


def test_stale_answers_with_the_review_of_the_one_before():
  requests = [
    Request(f"{i}", PROMPT, STEPS[: i + 1], correct=True, truncated=False) for i in range(4)
  ]
  oracle = _reviews(requests, name="oracle")
  assert _reviews(requests, name="stale") == [oracle[3], *oracle[:3]]


def test_nan_loses_a_number_of_an_oracles_review():
  for nan, oracle in zip(
    _reviews(_requests(20), name="nan"), _reviews(_requests(20), name="oracle"), strict=True
  ):
    assert nan.roles == oracle.roles
    for ours, theirs in ((nan.weights, oracle.weights), (nan.values, oracle.values)):
      assert sum(a != a for a in ours) == 1
      assert all(a in (b,) or a != a for a, b in zip(ours, theirs, strict=True))


def test_silent_times_out():
  assert _reviews(_requests(2), name="silent") == [Review("timeout")] * 2


# What a review must be to be used.


@pytest.mark.parametrize(
  "review",
  [
    Review("ok"),
    Review("ok", ("error",) * 2, (1.0,) * 2),
    Review("ok", ("error",) * 3, (1.0,) * 2),
    Review("ok", ("eror",) * 3, (1.0,) * 3),
    Review("ok", ("error",) * 3, (1.0,) * 3, (0.5,) * 4),
    Review("ok", values=(0.5,) * 2),
    Review("ok", weights=(1.0,) * 3, values=(0.5,) * 3),
  ],
)
def test_a_review_that_does_not_fit_is_invalid(review):
  assert review.checked(3) == Review("invalid")


@pytest.mark.parametrize(
  "review",
  [
    Review("ok", ("error",) * 3, (1.0,) * 3),
    Review("ok", values=(0.5,) * 3),
    Review("ok", ("error",) * 3, (1.0,) * 3, (0.5,) * 3),
    Review("timeout"),
    Review("none"),
  ],
)
def test_a_review_that_fits_stays(review):
  assert review.checked(3) is review


def test_reviewing_needs_no_jax():
  """So that a reviewer can run on a host without an accelerator, and starts fast."""
  code = "import sys, dca_jax.review; assert not {'jax', 'jaxlib', 'flax'} & set(sys.modules)"
  subprocess.run([sys.executable, "-c", code], check=True)


def _rate(flags):
  return sum(flags) / len(flags)
