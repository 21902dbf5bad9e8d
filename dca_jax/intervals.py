"""95 % intervals of what is measured on a sample of independent units, such as problems."""

import math
import typing
from collections.abc import Callable

import numpy as np
from scipy.special import stdtrit

_DRAWS = 500


class Estimate(typing.NamedTuple):
  """A measured number with its 95 % interval."""

  value: float
  low: float
  high: float


def share(hits_N, counts_N=None) -> Estimate:
  """Wilson's interval for the sum of `hits` over the sum of `counts`, a number in [0, 1].

  Units, not what is counted in them, are independent, so the sample size is the number of
  independent coin flips that would have the observed variance between units (Korn and Graubard
  1998). Unlike a bootstrap it has a width when all are right.

  Args:
    hits_N: one number for each unit, at most its count.
    counts_N: 1 for each where it is left out. Units that count nothing say nothing.
  """
  hits = np.asarray(hits_N, float)
  counts = np.ones(len(hits)) if counts_N is None else np.asarray(counts_N, float)
  hits, counts = hits[counts > 0], counts[counts > 0]
  n, total, z = len(hits), float(counts.sum()), 1.96
  if not n:
    return Estimate(math.nan, 0.0, 1.0)
  p = float(hits.sum() / total)
  spread_N = (hits - p * counts) * n / total
  variance = float(np.square(spread_N).sum() / (n - 1)) if n > 1 else 0.0
  size = max(n, p * (1 - p) / (variance / n)) if variance > 0 else n
  centre, spread = (
    p + z * z / (2 * size),
    z * math.sqrt(p * (1 - p) / size + z * z / (4 * size * size)),
  )
  scale = 1 + z * z / size
  return Estimate(p, max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale))


def bootstrap(sums_NxM, statistic: Callable[[np.ndarray], np.ndarray]) -> Estimate:
  """The percentile interval of a function of sums over units, drawn again with replacement.

  Args:
    sums_NxM: what each unit adds to each of M sums.
    statistic: from sums [R, M] to numbers [R]; what is not a number is left out.
  """
  sums = np.asarray(sums_NxM, float)
  n = len(sums)
  draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), _DRAWS) if n else None
  value = float(statistic(sums.sum(0)[None])[0])
  drawn = statistic(draws @ sums) if draws is not None else np.array([])
  drawn = drawn[np.isfinite(drawn)]
  low, high = np.quantile(drawn, (0.025, 0.975)) if len(drawn) else (math.nan, math.nan)
  return Estimate(value, float(low), float(high))


def paired_ratio(base_N, arm_N) -> Estimate:
  """The geometric mean of the ratios of pairs, base over arm, and Student's interval of its
  logarithm; at least two pairs of positive numbers."""
  logs_N = np.log(np.asarray(base_N, float) / np.asarray(arm_N, float))
  n = len(logs_N)
  spread = stdtrit(n - 1, 0.975) * logs_N.std(ddof=1) / math.sqrt(n)
  mean = logs_N.mean()
  return Estimate(*(float(x) for x in np.exp([mean, mean - spread, mean + spread])))
