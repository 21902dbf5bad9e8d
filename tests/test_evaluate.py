"""The numbers that an evaluation reports; no policy runs here."""

import itertools

import numpy as np
import pytest

from dca_jax.evaluate import EvaluateConfig, interval, majority_correct, pass_at_k


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n):
  for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
    subsets = list(itertools.combinations([i < correct for i in range(n)], k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_majority():
  assert majority_correct(["3", "3", "5"], [True, True, False]) == 1.0
  assert majority_correct(["5", "3", "5"], [False, True, False]) == 0.0
  # Among equally frequent answers the share that is correct, in any order.
  assert majority_correct(["3", "5"], [True, False]) == 0.5
  assert majority_correct(["5", "3"], [False, True]) == 0.5
  assert majority_correct(["3", "5", "7", "5", "3", "7", "1"], [True] + [False] * 3 + [True] + [False] * 2) == 1 / 3
  # No answer is not an answer: it cannot win, however frequent.
  assert majority_correct([None, None, "3"], [False, False, True]) == 1.0
  assert majority_correct([None, None], [False, False]) == 0.0
  assert majority_correct([], []) == 0.0


def test_majority_of_one_is_accuracy():
  for answer, ok in (("3", True), ("5", False), (None, False)):
    assert majority_correct([answer], [ok]) == float(ok)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 256, 1000])
def test_interval_contains_the_mean_and_stays_within_0_and_1(n):
  rng = np.random.default_rng(n)
  for x in (np.zeros(n), np.ones(n), np.full(n, 0.5), rng.random(n), rng.integers(2, size=n), rng.random(n) ** 20):
    e = interval(x)
    assert e.value == pytest.approx(x.mean())
    assert 0 <= e.low <= e.value + 1e-12
    assert e.value - 1e-12 <= e.high <= 1
    assert e.high > e.low


def test_interval_has_a_width_when_all_are_right_or_all_wrong():
  # Wilson's bound, n / (n + z^2): with 20 successes of 20 about 84 %.
  assert interval([True] * 20).low == pytest.approx(20 / (20 + 1.96**2))
  assert interval([False] * 20).high == pytest.approx(1.96**2 / (20 + 1.96**2))


def test_interval_of_coin_flips_is_wilsons():
  n, right = 50, 40
  p, z = right / n, 1.96
  e = interval([1] * right + [0] * (n - right))
  # The bounds are the p0 at which the score test just rejects: |p - p0| = z * sqrt(p0 (1 - p0) / n).
  for bound in (e.low, e.high):
    assert abs(p - bound) == pytest.approx(z * np.sqrt(bound * (1 - bound) / n))


def test_interval_shrinks_with_problems_and_with_samples():
  rng = np.random.default_rng(0)
  data = rng.integers(2, size=32)
  widths = [e.high - e.low for e in (interval(np.tile(data, k)) for k in (1, 4, 16))]
  assert widths[0] > 1.8 * widths[1] > 3 * widths[2]
  # Means of several samples vary less than single ones around the same accuracy.
  one, eight = (interval(rng.binomial(s, 0.5, 200) / s) for s in (1, 8))
  assert eight.high - eight.low < 0.5 * (one.high - one.low)


@pytest.mark.parametrize(
  ("problems", "alpha", "beta", "samples"),
  [(256, 2.0, 2.0, 1), (256, 0.5, 0.5, 8), (64, 1.0, 3.0, 8), (64, 18.0, 2.0, 4), (32, 2.0, 2.0, 1)],
)
def test_interval_covers_the_truth_95_times_in_100(problems, alpha, beta, samples):
  """Problems differ in difficulty (a beta distribution); each is sampled a few times."""
  rng = np.random.default_rng(1)
  runs = 3000
  x = rng.binomial(samples, rng.beta(alpha, beta, (runs, problems))) / samples
  truth = alpha / (alpha + beta)
  covered = np.mean([e.low <= truth <= e.high for e in map(interval, x)])
  assert 0.93 < covered < 0.975  # The standard error of this share is 0.4 %.


def test_config_finds_impossible_values():
  assert EvaluateConfig().check() == {}
  assert set(EvaluateConfig(problems=0, samples=2, k=3, every=-1).check()) == {"problems", "k", "every"}
