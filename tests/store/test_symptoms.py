"""What is said of a run that does not learn: each thing once, also across a resume,
and nothing of one that does."""

import random

import pytest

from dca_jax.store.symptoms import Watch, findings

GOOD = {
  "train/accuracy": 0.5,
  "train/truncated": 0.1,
  "train/mixed_groups": 0.5,
  "learner/grad_norm": 0.3,
}


def rows(steps, **changes):
  """A row a step; a change is a value, or a function of the step."""
  changes = {key.replace("__", "/"): value for key, value in changes.items()}
  made = [{"step": 0, "eval/greedy": 0.5}]
  for step in range(1, steps + 1):
    own = {key: value(step) if callable(value) else value for key, value in changes.items()}
    made.append({"step": step, **GOOD, **own})
  return made


@pytest.mark.parametrize(
  ("changes", "step", "parts"),
  [
    ({"train__truncated": 1.0}, 5, ["every completion has been cut off", "rollout.max_tokens"]),
    ({"learner__grad_norm": 0.0}, 5, ["the gradient has been 0", "learner.mask_truncated"]),
    (
      {"train__mixed_groups": 0.0, "train__accuracy": 0.0},
      20,
      ["no group has had", "none is right", "verifier"],
    ),
    (
      {"train__mixed_groups": 0.0, "train__accuracy": 1.0},
      20,
      ["no group has had", "harder problems"],
    ),
    (
      {"train__accuracy": lambda step: 0.5 if step <= 30 else 0.2},
      None,
      ["was 0.500 over the first", "learner.lr"],
    ),
    (
      {"guard__reason": lambda step: float(step > 10), "guard__share": 0.5},
      11,
      ["answers repeat themselves", "lowers the reviewer's share", "0.50", "credit.guard=False"],
    ),
  ],
)
def test_what_is_wrong_is_said_once_with_a_cause(changes, step, parts):
  (said,) = findings(rows(100, **changes))
  assert all(part in said for part in parts)
  assert step is None or said.startswith(f"step {step}: ")
  assert "\n" not in said


@pytest.mark.parametrize(
  "changes",
  [
    {"guard__reason": lambda step: float(step > 10), "guard__share": 0.5},
    {"review__premium_check": 1.5},
  ],
)
def test_calibrated_credit_is_recommended_only_where_there_is_none(changes):
  (said,) = findings(rows(20, **changes))
  assert "credit.scheme=calibrated" in said
  (said,) = findings(rows(20, **changes, calibration__checks=9.0))
  assert "calibrated" not in said
  assert "credit.guard=False would let" in said or "use credit.scheme=uniform" in said


def test_held_out_problems_that_are_trained_on():
  given = rows(3)
  assert not findings(given)
  given[0]["data/heldout_in_training"] = 0.25
  (said,) = findings(given)
  assert "25% of the evaluated problems" in said


def test_a_run_that_goes_on_does_not_say_it_again():
  given = rows(60, train__truncated=1.0, train__accuracy=lambda step: 0.5 if step <= 30 else 0.0)
  said = findings(given)
  assert len(said) == 2
  for stop in range(60):
    watch = Watch()
    before = [x for row in given[:stop] for x in watch.read(row)]
    assert before + [x for row in given[stop:] for x in watch.read(row)] == said


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"train__accuracy": lambda step: min(1.0, 0.01 * step)},
    {"train__accuracy": lambda step: 0.4 + 0.2 * (step % 2)},
    {"train__truncated": lambda step: 1.0 if step % 5 else 0.9},
    {"train__mixed_groups": lambda step: 0.0 if step % 20 else 0.1, "train__accuracy": 0.0},
    {"train__accuracy": lambda step: 0.5 if step <= 30 else 0.485},
    # A step without mixed groups has no gradient, which alone means nothing.
    {"train__mixed_groups": lambda step: step % 2, "learner__grad_norm": lambda step: step % 2},
  ],
)
def test_nothing_is_said_of_a_run_that_learns(changes):
  assert not findings(rows(100, **changes))


def test_noise_is_not_taken_for_a_fall():
  rng = random.Random(3)
  for _ in range(20):
    chance = rng.uniform(0.02, 0.98)
    # Of 16 problems with completions that are all alike, the noisiest case.
    drawn = [sum(rng.random() < chance for _ in range(16)) / 16 for _ in range(200)]
    assert not findings(rows(200, train__accuracy=lambda step, drawn=drawn: drawn[step - 1]))


def test_a_fall_is_seen_through_the_noise():
  rng = random.Random(1)
  drawn = [
    sum(rng.random() < (0.5 if step < 40 else 0.2) for _ in range(16)) / 16 for step in range(100)
  ]
  (said,) = findings(rows(100, train__accuracy=lambda step: drawn[step - 1]))
  assert "was 0.5" in said


def test_groups_that_fare_alike_explain_a_gradient_of_zero():
  assert not findings(rows(15, train__mixed_groups=0.0, learner__grad_norm=0.0))


def test_a_row_that_is_amended_counts_once():
  watch = Watch()
  given = rows(4, train__truncated=1.0)
  assert not [said for row in given for _ in range(2) for said in watch.read(row)]


def test_rows_of_another_version_are_no_reason_to_fail():
  assert not findings(
    [{"step": 0}, *({"step": step, "train/accuracy": 0.5} for step in range(1, 50))]
  )


def test_a_reviewer_that_can_be_pleased_is_named_by_what_pleases_it():
  given = rows(40)
  for step in (10, 20, 30, 40):
    given[step] |= {"review/premium_check": 1.5, "review/premium_repeat": 0.1}
  (said,) = findings(given)
  assert said.startswith("step 20: planting a check earns 1.5 times")
  assert "credit.scheme=calibrated" in said


def evaluated(step, sampled):
  return {
    "step": step,
    "eval/sampled": sampled,
    "eval/sampled_low": sampled - 0.05,
    "eval/sampled_high": sampled + 0.05,
  }


def test_a_policy_that_got_worse_on_held_out_problems_is_told_of_once():
  rows = [evaluated(0, 0.6), evaluated(10, 0.52), evaluated(20, 0.48), evaluated(30, 0.4)]
  assert findings(rows[:2]) == []
  (said,) = findings(rows)
  assert said.startswith("step 20: of held-out samples 0.480 are right, and 0.600 were at step 0")
  assert "learner.lr" in said
