"""Calibrated credit in the exact laboratory: what a growing number of spot checks makes of it.

Checks are drawn as a run would draw them: steps of the policy's own traces, each measured by one
answer from before it and one from after it. All else is exact: for the effects that they leave, the
expected update over all traces is known (`dca_jax.credit.exact`).

N traces, T steps.
"""

from typing import NamedTuple

import numpy as np

from dca_jax.credit import ReviewArrays
from dca_jax.credit.calibrated import CELLS, SEEN, Calibrated, Evidence, fit
from dca_jax.credit.exact import CHECK, Tree, measure, review, roles
from dca_jax.episode import ROLES

CHECKS = (0, 64, 256, 1024, 4096, 16384)
TRUSTS = (0.0, 2.0)
DRAWS = 8
"""Runs that each number is a mean of."""
FLIP = 0.3


class Point(NamedTuple):
  """Means over the draws of what so many checks make of one reviewer's word."""

  reviewer: str
  trust: float
  checks: int
  cosine: float
  """Between the expected update and the policy gradient."""
  snr: float
  """Signal to noise, times the cosine squared, over RLOO's."""
  leading: float
  """Performative premium: expected credit of `check` less that of `plain`, where the policy leads."""
  worst: float
  """The largest premium of the draws."""


def controls(tree: Tree) -> dict[str, tuple[ReviewArrays, bool]]:
  """Reviewers by name: their word on every trace, and whether a check can be seen without them."""
  n, t = tree.actions_NxT.shape
  rng, true, is_check = np.random.default_rng(2), roles(tree), tree.actions_NxT == CHECK
  necessary, error, inherits = map(ROLES.index, ("necessary", "error", "inherits"))
  by_outcome = np.where(tree.reward_N > 0, necessary, error)[:, None]
  helpful = np.isin(true, [ROLES.index(r) for r in ("necessary", "repair", "inherits")])
  flipped = np.where(helpful, error, necessary)
  applauded = np.where(is_check, necessary, true)
  return {
    "oracle": (review(tree, true), True),
    "noisy": (review(tree, np.where(rng.random((n, t)) < FLIP, flipped, true)), True),
    "fooled": (review(tree, applauded, np.where(is_check, 3.0, 1.0)), True),
    "fooled, unseen": (review(tree, applauded), False),
    "lexical": (review(tree, np.where(is_check, necessary, by_outcome)), True),
    "random": (review(tree, rng.integers(0, len(ROLES), (n, t))), True),
    "thief": (review(tree, np.where(np.arange(t) == t - 1, by_outcome, inherits)), True),
  }


def advantages(tree: Tree) -> np.ndarray:
  """What every step did to the chance of success, [N, T]."""
  return np.diff(tree.value_NxT, axis=1, append=tree.reward_N[:, None])


def cells(tree: Tree, said: ReviewArrays, seen: bool) -> tuple[np.ndarray, np.ndarray]:
  """The cell of every step, as the scheme numbers them: coarse and place, [N, T] each."""
  n, t = tree.actions_NxT.shape
  word = np.asarray(said.roles_BxK) * 3 + np.searchsorted((0.75, 1.5), said.weights_BxK)
  suspect = (tree.actions_NxT == CHECK) & seen
  place = 3 + np.where(np.arange(t) == t - 1, 2, 2 * np.arange(t) // t)
  return word * len(SEEN) + suspect * SEEN.index("check"), np.broadcast_to(place, (n, t))


def evidence(tree: Tree, cell, checks: int, rng: np.random.Generator) -> Evidence:
  """What so many spot checks of the policy's own steps found."""
  after_NxT = tree.value_NxT + advantages(tree)
  trace = rng.choice(len(tree.reward_N), checks, p=tree.probability_N)
  step = rng.integers(tree.actions_NxT.shape[1], size=checks)
  before, after = tree.value_NxT[trace, step], after_NxT[trace, step]
  effect = (rng.random(checks) < after).astype(float) - (rng.random(checks) < before)
  sums, own = np.zeros((4, *CELLS)), tuple(c[trace, step] for c in cell)
  for i, x in enumerate((1.0, 1.0, effect, effect**2)):
    np.add.at(sums[i], own, x)
  return Evidence(sums, np.zeros(2))


def calibrated(tree: Tree, scheme: Calibrated, cell, found: Evidence) -> np.ndarray:
  """The scheme's credit of every step, [N, T], with the exact expectations in the place of a
  group's means."""
  own_NxT = fit(found, scheme.doubt).effects[cell]
  whole_N, p = own_NxT.sum(1), tree.probability_N
  rest_N = tree.reward_N - p @ tree.reward_N - (whole_N - p @ whole_N)
  return rest_N[:, None] + (1 + scheme.trust) * own_NxT


def curves(tree: Tree) -> list[Point]:
  """Every reviewer, trust and number of checks."""
  points = []
  plain = tree.reward_N - tree.probability_N @ tree.reward_N
  rloo = measure(tree, "", np.broadcast_to(plain[:, None], tree.actions_NxT.shape)).snr
  for name, (said, seen) in controls(tree).items():
    cell = cells(tree, said, seen)
    for trust in TRUSTS:
      for checks in CHECKS:
        rows = []
        for draw in range(DRAWS):
          found = evidence(tree, cell, checks, np.random.default_rng([3, draw]))
          credit_NxT = calibrated(tree, Calibrated(trust=trust), cell, found)
          rows.append(measure(tree, "", credit_NxT))
        gains = [row.leading for row in rows]
        snr = np.mean([row.snr * row.cosine**2 for row in rows]) / rloo
        cosine = np.mean([row.cosine for row in rows])
        points.append(
          Point(name, trust, checks, float(cosine), float(snr), float(np.mean(gains)), max(gains))
        )
  return points
