"""Calibrated credit in the exact laboratory: what a growing number of spot checks makes of it.

Checks are drawn as a run would draw them: steps of the policy's own traces, each measured by one
answer from before it and one from after it. All else is exact: for the effects that they leave, the
expected update over all traces is known (`dca_jax.credit.exact`).

N traces, T steps.
"""

from typing import NamedTuple

import numpy as np

from dca_jax.credit import Calibrated, ReviewArrays, Scheme, Uniform, Weighted
from dca_jax.credit.calibrated import CELLS, ENDS, SEEN, Evidence, cell_number, fit, fitted, word_of
from dca_jax.credit.exact import CHECK, Row, Tree, credit, measure, review, roles
from dca_jax.episode import ROLES

CHECKS = (0, 100, 400, 1600, 6400, 25600, 102400)
DRAWS = 8
"""Runs that each number is a mean of."""
FLIP = 0.3


class Point(NamedTuple):
  """What so many checks make of one reviewer's word, mean over the draws."""

  reviewer: str
  checks: int
  cosine: float
  """Between the expected update and the policy gradient."""
  snr: float
  """Signal to noise over RLOO's, times the cosine squared."""
  leading: float
  """Performative premium, leading: expected credit of `check` less that of `plain`."""
  spread: float
  """Standard deviation of the premium over the draws."""


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


def cells(tree: Tree, said: ReviewArrays, seen: bool) -> np.ndarray:
  """The cell of every step, as the scheme numbers them, [N, T]."""
  n, t = tree.actions_NxT.shape
  known = {
    key: cell_number(word_of(key[0], key[1]), SEEN.index("check") * key[2], key[3])
    for key in np.ndindex(len(ROLES), 4, 2, len(ENDS))
  }
  suspect = (tree.actions_NxT == CHECK) & seen
  end = np.where(tree.reward_N > 0, 0, 1)[:, None]
  keys = np.broadcast_arrays(said.roles_BxK, said.weights_BxK, suspect, end)
  flat = zip(*(x.astype(int).ravel().tolist() for x in keys), strict=True)
  return np.array([known[key] for key in flat]).reshape(n, t)


def evidence(tree: Tree, cell_NxT: np.ndarray, checks: int, rng: np.random.Generator) -> Evidence:
  """What so many spot checks of the policy's own steps found."""
  ends = np.concatenate([tree.value_NxT, tree.reward_N[:, None]], 1)
  trace = rng.choice(len(tree.reward_N), checks, p=tree.probability_N)
  step = rng.integers(tree.actions_NxT.shape[1], size=checks)
  before, after = (rng.random(checks) < ends[trace, step + k] for k in range(2))
  effect = after.astype(float) - before - advantages(tree)[trace] / cell_NxT.shape[1]
  sums = np.zeros((4, CELLS))
  for i, x in enumerate((1.0, 1.0, effect, effect**2)):
    np.add.at(sums[i], cell_NxT[trace, step], x)
  return Evidence(sums, np.zeros(2))


def advantages(tree: Tree) -> np.ndarray:
  return tree.reward_N - tree.probability_N @ tree.reward_N


def calibrated(tree: Tree, said: ReviewArrays, cell_NxT: np.ndarray, found: Evidence) -> Row:
  """The exact expected update under what was found."""
  scheme = Calibrated()
  gains, own_N = fit(found, scheme.doubt).gains, advantages(tree)
  effects_NxT = fitted(gains, own_N[:, None], cell_NxT)
  return measure(tree, "", credit(tree, scheme, said, np.abs(effects_NxT)))


def relative(row: Row, base: Row) -> float:
  return row.snr * row.cosine**2 / (base.snr * base.cosine**2)


def curves(tree: Tree) -> list[Point]:
  """Every reviewer and number of checks."""
  points, base = [], plain(tree, "uniform")
  for name, (said, seen) in controls(tree).items():
    cell_NxT = cells(tree, said, seen)
    for checks in CHECKS:
      rows = []
      for draw in range(DRAWS):
        found = evidence(tree, cell_NxT, checks, np.random.default_rng([3, draw]))
        rows.append(calibrated(tree, said, cell_NxT, found))
      gains, cosine = [row.leading for row in rows], np.mean([row.cosine for row in rows])
      snr = np.mean([relative(row, base) for row in rows])
      points.append(
        Point(name, checks, *map(float, (cosine, snr, np.mean(gains), np.std(gains, ddof=1))))
      )
  return points


def plain(tree: Tree, scheme: str, reviewer: str = "oracle") -> Row:
  """The same of a scheme that measures nothing."""
  known: dict[str, Scheme] = {"uniform": Uniform(), "weighted": Weighted()}
  return measure(tree, "", credit(tree, known[scheme], controls(tree)[reviewer][0]))
