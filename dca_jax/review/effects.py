"""Credit against what steps really did, as the policy's own further answers measured it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from dca_jax.episode import Check, Review
from dca_jax.intervals import Estimate, bootstrap
from dca_jax.review.audit import KINDS, correlation, intensity, kind_of, moments
from dca_jax.review.types import Request

_FEWEST = 20
"""Steps of a kind that there must be before it is said what they did."""


class Checked(NamedTuple):
  """An answer whose steps were spot-checked."""

  request: Request
  checks: Mapping[int, Check]
  review: Review

  @property
  def credit(self) -> np.ndarray:
    """What each step would be credited with: in a right answer the intensity of its role, in a
    wrong one blame for what is called an error. Of a reviewer that gives values alone, how they
    change with it. The last step has none: what is measured of it is the outcome itself, of which
    the reviewer was told."""
    if not self.review.roles:
      return np.diff(self.review.values)
    if self.request.correct:
      return intensity(self.review)[:-1]
    weights, wrong = np.asarray(self.review.weights, float), np.array(self.review.roles) == "error"
    return (-weights * wrong)[:-1]


def effects(checked: Sequence[Checked]) -> dict[str, Estimate]:
  """How credit agrees with effects, by name; the reviews must be usable.

  `effect_spearman`: rank correlation of credit and measured effect over steps, each rank less its
  mean in the answer, because outcomes alone tell answers apart. `effect_ceiling`: what a
  correlation could be at most, for the noise of the measurements (the root of their reliability).
  `effect_credited_KIND`, `effect_blamed_KIND`: the mean effect of steps of a surface kind that earn
  and that pay; near 0 where they do nothing, whatever they are called.
  """
  rows = [
    (n, check, credit, kind_of(c.request, k, ""))
    for n, c in enumerate(checked)
    for k, credit in enumerate(c.credit)
    if np.isfinite(credit) and (check := c.checks.get(k))
  ]
  if len(rows) < _FEWEST:
    return {}
  answers, credits = np.array([n for n, *_ in rows]), np.array([row[2] for row in rows])
  kinds = np.array([kind for *_, kind in rows])
  did = np.array([check.effect for _, check, *_ in rows])
  noise = np.array([check.variance for _, check, *_ in rows])
  parts = [answers == n for n in np.unique(answers)]
  x, y = rankdata(credits), rankdata(did)
  measures = {
    "effect_spearman": bootstrap([moments(x[own], y[own]) for own in parts], correlation),
    "effect_ceiling": bootstrap(
      [(moments(did[own], did[own])[1], noise[own].sum()) for own in parts],
      lambda s: np.sqrt(np.clip(1 - s[:, 1] / np.maximum(s[:, 0], 1e-12), 0, 1)),
    ),
  }
  for kind in KINDS:
    for word, said in (("credited", credits > 0), ("blamed", credits < 0)):
      here = said & (kinds == kind)
      if here.sum() >= _FEWEST:
        sums = [(did[own & here].sum(), (own & here).sum()) for own in parts]
        with np.errstate(invalid="ignore"):  # Samples drawn again may hold no such step.
          measures[f"effect_{word}_{kind}"] = bootstrap(sums, lambda s: s[:, 0] / s[:, 1])
  return {name: e for name, e in measures.items() if np.isfinite(e.value)}
