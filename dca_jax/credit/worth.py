"""What learning from a reviewer is worth, told from how it errs.

Its errors are carried over to the exact task (`exact.py`): a step there is said to be what the
reviewer said of some audited step of the same class, in an answer of the same outcome, and of a
last step where it is one, as far as there are any. That gives the update which such a reviewer
induces, in closed form. Speed is then read off a surface that was measured on the task `chains`.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dca_jax.credit import exact
from dca_jax.credit.schemes import Weighted
from dca_jax.episode import ROLES
from dca_jax.intervals import Estimate

CLASSES = ("necessary", "error", "repair", "inert", "applauded")
"""What a step of the exact task can be: `applauded` is an inert one of the kind that the reviewer
likes best, and `inert` any other."""


class Word(NamedTuple):
  """What a reviewer said of a step."""

  role: str
  weight: float
  last: bool = False
  """Whether the step was the last one of its answer."""
  won: bool | None = None
  """Whether the answer was right; None says it of both kinds."""

  def fits(self, last: bool, won: bool) -> tuple[bool, bool]:
    """Of a step of another answer: whether the outcome is the same, and the place."""
    return self.won in (None, won), self.last == last


Said = Mapping[str, Sequence[Word]]
"""By class."""


class Worth(NamedTuple):
  """The update that a reviewer induces under `weighted` credit, on the exact task."""

  cosine: float
  """With the policy gradient."""
  snr: float
  """Signal to noise of one trace's update along the gradient, in multiples of RLOO's."""
  performing: float
  """Expected credit of an applauded step less that of another one that does as little."""
  calibrated: float
  """The same where a step gets what steps so labelled are worth on average instead, in multiples of
  what that gives where nothing is labelled and only the look of steps is known."""


def worth(said: Said, usable: float, seed: int = 0) -> Worth | None:
  """What such a reviewer is worth; None where nothing is known of a class that matters.

  Args:
    usable: share of the reviews that can be used; the others leave credit uniform.
  """
  pools = dict(said)
  pools["repair"] = pools.get("repair") or pools.get("necessary", ())
  pools["inert"] = pools.get("inert") or pools.get("applauded", ())
  pools["applauded"] = pools.get("applauded") or pools["inert"]
  if not all(pools.get(name) for name in CLASSES):
    return None
  tree, rng = exact.make_tree(), np.random.default_rng(seed)
  classes = _classes(tree)
  roles, weights = np.zeros(classes.shape, int), np.ones(classes.shape)
  is_last, won_Nx1 = np.arange(classes.shape[1]) == classes.shape[1] - 1, tree.reward_N[:, None] > 0
  for i, last, won in itertools.product(range(len(CLASSES)), (False, True), (False, True)):
    closest = max(word.fits(last, won) for word in pools[CLASSES[i]])
    pool = [word for word in pools[CLASSES[i]] if word.fits(last, won) == closest]
    here = (classes == i) & (is_last == last) & (won_Nx1 == won)
    drawn = rng.integers(len(pool), size=here.sum())
    roles[here] = np.array([ROLES.index(word.role) for word in pool])[drawn]
    weights[here] = np.array([word.weight for word in pool])[drawn]
  ok_N = rng.random(len(classes)) < usable
  review = exact.review(tree, roles, weights)._replace(ok_B=ok_N)
  uniform_NxT = _uniform(tree)
  credit_NxT = np.where(ok_N[:, None], exact.credit(tree, Weighted(), review), uniform_NxT)
  row = exact.measure(tree, "", credit_NxT)
  rloo, blind = _yardsticks()
  calibrated = _snr(tree, _calibrated(tree, np.where(ok_N[:, None], roles, len(ROLES)), classes))
  return Worth(
    row.cosine,
    row.snr * row.cosine**2 / rloo,
    (row.leading + row.trailing) / 2,
    calibrated / blind,
  )


@functools.lru_cache
def _yardsticks() -> tuple[float, float]:
  """The signal to noise of RLOO, and of calibrated credit where every step is called the same."""
  tree = exact.make_tree()
  classes = _classes(tree)
  return _snr(tree, _uniform(tree)), _snr(tree, _calibrated(tree, 0 * classes, classes))


def _classes(tree: exact.Tree) -> np.ndarray:
  true = exact.roles(tree)
  named = [np.flatnonzero(np.array(ROLES) == name)[0] for name in CLASSES[:3]]
  cases = [true == role for role in named] + [tree.actions_NxT == exact.CHECK]
  return np.select(cases, [0, 1, 2, CLASSES.index("applauded")], CLASSES.index("inert"))


def _advantages(tree: exact.Tree) -> np.ndarray:
  return tree.reward_N - tree.probability_N @ tree.reward_N


def _uniform(tree: exact.Tree) -> np.ndarray:
  return np.broadcast_to(_advantages(tree)[:, None], tree.actions_NxT.shape)


def _snr(tree: exact.Tree, credit_NxT: np.ndarray) -> float:
  row = exact.measure(tree, "", credit_NxT)
  return row.snr * row.cosine**2


def _calibrated(tree: exact.Tree, roles_NxT: np.ndarray, classes_NxT: np.ndarray) -> np.ndarray:
  """Credit f + A - mean f, with f the mean effect of a step of that role and look, times a scale of
  at most 3 at which f spreads half as far as the advantage."""
  p_Nx1, effects = tree.probability_N[:, None], np.append(tree.value_NxT, tree.reward_N[:, None], 1)
  effects = np.diff(effects, axis=1)
  cells = roles_NxT * 2 + (classes_NxT == CLASSES.index("applauded"))
  f = np.zeros(cells.shape)
  for cell in np.unique(cells):
    own = p_Nx1 * (cells == cell)
    f[cells == cell] = (own * effects).sum() / own.sum()
  advantages_N = _advantages(tree)
  spread = np.sqrt((p_Nx1 * f**2).sum() / f.shape[1])
  scale = min(3.0, 0.5 * np.sqrt(tree.probability_N @ advantages_N**2) / max(spread, 1e-9))
  return scale * f + (advantages_N - scale * f.mean(1))[:, None]


FLIPS, APPLAUSE = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5), (0.0, 0.1, 0.3, 1.0)
SPEEDUP = (
  (3.1, 2.9, 1.1, 0.0),
  (2.3, 2.2, 1.1, 0.0),
  (2.2, 1.8, 0.7, 0.0),
  (1.6, 1.0, 0.0, 0.0),
  (0.5, 0.0, 0.0, 0.0),
  (0.0, 0.0, 0.0, 0.0),
)
"""How many times fewer samples than RLOO `weighted` credit took to 80 % on `chains`, by the chance
of a flipped label and the chance that a repeat is applauded with weight 3; 0 where it did not get
there in 90 steps. `python -m evidence.surface`: means of seeds 41 and 43 (the last column: of seed
41) against RLOO's median of seeds 41 to 43, 11,264 completions. Seeds differ most at an applause of
0.3, where 0.1 flipped did better than none (1.8); there the lower number stands for both. The last
row was not run."""


@functools.lru_cache
def _flipped_snr() -> np.ndarray:
  """The `snr` of an oracle whose labels are flipped with the chances `FLIPS`."""
  snr = []
  for flip in FLIPS:
    wrong = round(100 * flip)
    said = {
      name: [Word(role, 1.0)] * (100 - wrong) + [Word(opposite, 1.0)] * wrong
      for name, role, opposite in zip(
        CLASSES,
        ("necessary", "error", "repair", "redundant", "redundant"),
        ("error", "necessary", "error", "necessary", "necessary"),
        strict=True,
      )
    }
    found = worth(said, 1.0)
    snr.append(found.snr if found else np.nan)
  return np.array(snr)


def predicted_speedup(snr: float, applause: float) -> float:
  """How many times fewer samples than RLOO `weighted` credit needs on `chains` with a reviewer that
  errs like this one; 0 where such a reviewer ruins the policy.

  A reviewer is placed on the surface by the flips that would cost as much signal, and by how often
  steps of its favourite needless kind would have to be applauded with weight 3 to earn as much.

  Args:
    applause: what such a step earns beside one that is to be credited.
  """
  flip = float(np.interp(-np.log(max(snr, 1e-6)), -np.log(_flipped_snr()), FLIPS))
  applauded = (applause * (1 - flip) - flip) / (3 - flip)
  rows = [np.interp(applauded, APPLAUSE, row) for row in SPEEDUP]
  return float(np.interp(flip, FLIPS, rows))


def verdict(speedup: Estimate | None, gain: Estimate | None, wrong: Estimate | None) -> str:
  """`no` where what the reviewer says is worth nothing even once outcomes have said what, `train`
  where `weighted` credit will be faster than RLOO, else `calibrated`.

  Args:
    wrong: what a step earns by being made wrong; a reviewer that does not see that is not believed
      without measurements, however well it knows needless steps.
  """
  if speedup is None or gain is None or gain.low <= 1.2:
    return "no"
  blind = wrong is not None and wrong.high >= 0
  return "train" if speedup.low > 1 and not blind else "calibrated"
