"""Calibrated credit in the exact laboratory: what a growing number of spot checks makes of it.

Checks are drawn as a run would draw them: steps of the policy's own traces, each measured by one
answer from before it and one from after it, which is the same one where the first takes the step.
All else is exact: for the shares that they leave, the expected update over all traces is known
(`dca_jax.credit.exact`).

N traces, T steps.
"""

from typing import NamedTuple

import numpy as np

from dca_jax.credit import Calibrated, ReviewArrays, Scheme, Uniform, Weighted
from dca_jax.credit.calibrated import CELLS, SEEN, Evidence, cell_number, fit, word_of
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
  suspect = SEEN.index("check") * ((tree.actions_NxT == CHECK) & seen)
  end = np.where(tree.reward_N > 0, 0, 1)[:, None]
  chances = np.round(chances_of(tree), 6)
  words = np.vectorize(word_of, otypes=[int])(said.roles_BxK, said.weights_BxK)
  keys = np.stack(np.broadcast_arrays(words, suspect, chances, end), -1).reshape(-1, 4)
  kinds, of = np.unique(keys, axis=0, return_inverse=True)
  known = [cell_number(int(w), int(s), chance, int(e)) for w, s, chance, e in kinds]
  return np.array(known)[of.reshape(tree.actions_NxT.shape)]


def chances_of(tree: Tree) -> np.ndarray:
  """How likely each step is to the policy, [N, T]."""
  n = len(tree.actions_NxT)
  columns = [np.repeat(pi.reshape(-1), n // pi.size) for pi in tree.policy]
  return np.stack(columns, 1)


def evidence(tree: Tree, cell_NxT: np.ndarray, checks: int, rng: np.random.Generator) -> Evidence:
  """What so many spot checks of the policy's own steps found."""
  ends = np.concatenate([tree.value_NxT, tree.reward_N[:, None]], 1)
  trace = rng.choice(len(tree.reward_N), checks, p=tree.probability_N)
  step = rng.integers(tree.actions_NxT.shape[1], size=checks)
  chance, before, after = chances_of(tree)[trace, step], ends[trace, step], ends[trace, step + 1]
  otherwise = np.clip((before - chance * after) / (1 - chance), 0, 1)
  wins = [rng.random(checks) < value for value in (otherwise, after)]
  effect = np.where(rng.random(checks) < chance, 0.0, wins[1].astype(float) - wins[0])
  even = advantages(tree)[trace] / cell_NxT.shape[1]
  sums = np.zeros((5, CELLS))
  for i, x in enumerate((1.0, even**2, even**2, even * effect, effect**2)):
    np.add.at(sums[i], cell_NxT[trace, step], x)
  return Evidence(sums, np.zeros(2))


def advantages(tree: Tree) -> np.ndarray:
  return tree.reward_N - tree.probability_N @ tree.reward_N


def calibrated(tree: Tree, said: ReviewArrays, cell_NxT: np.ndarray, found: Evidence) -> Row:
  """The exact expected update under what was found."""
  scheme = Calibrated()
  return measure(tree, "", credit(tree, scheme, said, fit(found, scheme.doubt).of(cell_NxT)))


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
