"""Intervals of shares and of functions of sums."""

import numpy as np
import pytest

from dca_jax.intervals import bootstrap, share


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 256, 1000])
def test_interval_contains_the_mean_and_stays_within_0_and_1(n):
  rng = np.random.default_rng(n)
  for x in (
    np.zeros(n),
    np.ones(n),
    np.full(n, 0.5),
    rng.random(n),
    rng.integers(2, size=n),
    rng.random(n) ** 20,
  ):
    e = share(x)
    assert e.value == pytest.approx(x.mean())
    assert 0 <= e.low <= e.value + 1e-12
    assert e.value - 1e-12 <= e.high <= 1
    assert e.high > e.low


def test_interval_has_a_width_when_all_are_right_or_all_wrong():
  # Wilson's bound, n / (n + z^2): with 20 successes of 20 about 84 %.
  assert share([True] * 20).low == pytest.approx(20 / (20 + 1.96**2))
  assert share([False] * 20).high == pytest.approx(1.96**2 / (20 + 1.96**2))


def test_interval_of_coin_flips_is_wilsons():
  n, right = 50, 40
  p, z = right / n, 1.96
  e = share([1] * right + [0] * (n - right))
  # The bounds are the p0 at which the score test just rejects: |p - p0| = z * sqrt(p0 (1 - p0) /
  # n).
  for bound in (e.low, e.high):
    assert abs(p - bound) == pytest.approx(z * np.sqrt(bound * (1 - bound) / n))


def test_interval_shrinks_with_problems_and_with_samples():
  rng = np.random.default_rng(0)
  data = rng.integers(2, size=32)
  widths = [e.high - e.low for e in (share(np.tile(data, k)) for k in (1, 4, 16))]
  assert widths[0] > 1.8 * widths[1] > 3 * widths[2]
  # Means of several samples vary less than single ones around the same accuracy.
  one, eight = (share(rng.binomial(s, 0.5, 200) / s) for s in (1, 8))
  assert eight.high - eight.low < 0.5 * (one.high - one.low)


@pytest.mark.parametrize(
  "x", [[0.25, 0.5, 0.75, 0.5, 0.25], [0, 1, 1, 0.5, 1], [0.9, 1, 1], [0.4, 0.6], [0.125]], ids=str
)
def test_interval_is_wilsons_for_as_many_coins_as_vary_as_much(x):
  n, p = len(x), sum(x) / len(x)
  of_the_mean = sum((y - p) ** 2 for y in x) / (n - 1) / n if n > 1 else 0
  coins = max(n, p * (1 - p) / of_the_mean) if of_the_mean else n
  e = share(x)
  for bound in (e.low, e.high):
    assert abs(p - bound) == pytest.approx(1.96 * np.sqrt(bound * (1 - bound) / coins))


def test_a_share_of_unequal_units_is_that_of_the_sums_and_as_wide_as_they_vary():
  rng = np.random.default_rng(0)
  counts = rng.integers(0, 9, 400)
  hits = rng.binomial(counts, 0.3)
  e = share(hits, counts)
  assert e.value == pytest.approx(hits.sum() / counts.sum())
  alone = share(np.repeat([1, 0], [hits.sum(), (counts - hits).sum()]))
  assert e.high - e.low == pytest.approx(alone.high - alone.low, rel=0.2)
  # Units that are alike within say no more than one of their steps would.
  alike = counts * (rng.random(400) < 0.3)
  wide = share(alike, counts)
  assert wide.high - wide.low > 1.5 * (e.high - e.low)
  assert np.isnan(share([0], [0]).value)


def test_the_bootstrap_covers_a_ratio_of_sums():
  covered = 0
  for seed in range(60):
    rng = np.random.default_rng(seed)
    x = rng.exponential(2.0, 80)
    sums = np.stack([x * rng.normal(1.5, 0.3, 80), x], 1)
    e = bootstrap(sums, lambda s: s[:, 0] / s[:, 1])
    covered += e.low <= 1.5 <= e.high
  assert covered >= 50
