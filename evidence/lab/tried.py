"""What was derived, tried in the exact laboratory, and does not carry a scheme.

A *doubly robust* credit of a step is f + (checked / share) (measured - f), with f what steps so
labelled are worth and `checked` whether its spot check was drawn: unbiased for every reviewer,
because f drops out of the mean. A *control variate* along the trajectory is A less f of the other
steps. A *distilled* critic gives a prefix the chance of success that what a reviewer says of such
prefixes predicts: how many steps so far are credited, wrong and repaired.

N traces, T steps.
"""

import numpy as np

from dca_jax.credit import Potential, ReviewArrays
from dca_jax.credit.exact import Row, Tree, credit, measure, review
from dca_jax.episode import ROLES
from evidence.lab import checks

CHECKED = ((0.1, 4), (1.0, 1), (1.0, 4))
"""Share of the steps that are checked, and answers on each side."""
REVIEWERS = ("oracle", "noisy", "fooled", "fooled, unseen", "random")


def worth(tree: Tree, cell_NxT: np.ndarray) -> np.ndarray:
  """The mean advantage of the steps of each cell, as endless checks would find it, [N, T]."""
  p_Nx1, advantages_NxT = tree.probability_N[:, None], _effects(tree)
  f_NxT = np.zeros(cell_NxT.shape)
  for cell in np.unique(cell_NxT):
    own = p_Nx1 * (cell_NxT == cell)
    f_NxT[cell_NxT == cell] = (own * advantages_NxT).sum() / own.sum()
  return f_NxT


def doubly_robust(tree: Tree, f_NxT: np.ndarray, share: float, answers: int, base: Row) -> float:
  """Signal to noise over RLOO's; the noise of drawing and measuring comes on top of the traces'."""
  ends = _ends(tree)
  spread = ends * (1 - ends) / answers
  miss_NxT = _effects(tree) - f_NxT
  noise_NxT = spread[:, :-1] + spread[:, 1:]
  square_NxT = f_NxT**2 + 2 * f_NxT * miss_NxT + (miss_NxT**2 + noise_NxT) / share
  norms_NxT = np.stack(
    [
      np.repeat((1 - 2 * pi + (pi**2).sum(1, keepdims=True)).ravel(), len(ends) // pi.size)
      for pi in tree.policy
    ],
    1,
  )
  second, own = (tree.probability_N @ (x * norms_NxT) for x in (square_NxT, _effects(tree) ** 2))
  snr = measure(tree, "", _effects(tree)).snr
  size = own.sum() * snr / (1 + snr)  # |E g|^2, which is that of the true advantages.
  return float(size / (second.sum() - size) / base.snr)


def control_variate(tree: Tree, f_NxT: np.ndarray) -> Row:
  return measure(tree, "", checks.advantages(tree)[:, None] - f_NxT.sum(1, keepdims=True) + f_NxT)


def distilled(tree: Tree, said: ReviewArrays, discount: float) -> Row:
  """`potential` credit with the distilled critic's values."""
  roles, p, values = np.asarray(said.roles_BxK), tree.probability_N, []
  kinds = [
    np.isin(roles, [*map(ROLES.index, names)])
    for names in (("necessary",), ("error",), ("repair",))
  ]
  for t, pi in enumerate(tree.policy):
    words = sum(10**i * kind[:, :t].sum(1) for i, kind in enumerate(kinds))
    _, word = np.unique(words, return_inverse=True)
    told = (np.bincount(word, p * tree.reward_N) / np.bincount(word, p))[word]
    here = p.reshape(len(pi), -1)
    mean = (here * told.reshape(here.shape)).sum(1) / here.sum(1)
    values.append(np.repeat(mean, here.shape[1]))
  known = review(tree, values_NxT=np.stack(values, 1))
  return measure(tree, "", credit(tree, Potential(discount=discount), known))


def table(tree: Tree) -> list[list[str]]:
  """A row for each reviewer."""
  rows, base = [], checks.plain(tree, "uniform")
  for name in REVIEWERS:
    said, seen = checks.controls(tree)[name]
    f_NxT = worth(tree, checks.cells(tree, said, seen))
    robust = [doubly_robust(tree, f_NxT, *kind, base) for kind in CHECKED]
    along = control_variate(tree, f_NxT)
    critics = [distilled(tree, said, discount) for discount in (1.0, 0.0)]
    snrs = [*robust, *(checks.relative(row, base) for row in (along, *critics))]
    gains = [round(row.leading, 3) + 0.0 for row in (along, *critics)]
    rows.append([name, *(f"{x:.2f}" for x in snrs), *(f"{x:+.3f}" for x in gains)])
  return rows


HEADS = [
  "reviewer",
  *(f"robust {share:g} x {answers}" for share, answers in CHECKED),
  *("control", "critic, 1", "critic, 0"),
  *("premium", "critic, 1", "critic, 0"),
]


def _ends(tree: Tree) -> np.ndarray:
  return np.append(tree.value_NxT, tree.reward_N[:, None], 1)


def _effects(tree: Tree) -> np.ndarray:
  return np.diff(_ends(tree), axis=1)
