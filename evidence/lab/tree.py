"""The exact laboratory's table: every scheme with every kind of reviewer, on the task of
`dca_jax.credit.exact`."""

import numpy as np

from dca_jax.credit import (
  Capo,
  Potential,
  ReturnToGo,
  ReviewArrays,
  RoleTable,
  Signed,
  Uniform,
  Weighted,
)
from dca_jax.credit.exact import (
  CHECK,
  STEPS,
  Row,
  Tree,
  credit,
  make_tree,
  measure,
  review,
  roles,
)
from dca_jax.episode import ROLES

__all__ = [
  "ROWS",
  "STEPS",
  "Row",
  "Tree",
  "credit",
  "make_tree",
  "measure",
  "review",
  "reviews",
  "roles",
  "table",
]

APPLAUSE = 0.15
"""What a check adds to a fooled reviewer's value of all that follows."""


def reviews(tree: Tree) -> dict[str, ReviewArrays]:
  """Reviewers by name: their word on every trace."""
  n, t = tree.actions_NxT.shape
  rng = np.random.default_rng(1)
  true, is_check = roles(tree), tree.actions_NxT == CHECK
  applauded = np.where(is_check, ROLES.index("necessary"), true)
  fooled_values = np.clip(tree.value_NxT + APPLAUSE * (is_check.cumsum(1) - is_check), 0, 1)
  random_values = np.stack([np.repeat(rng.random(len(pi)), n // len(pi)) for pi in tree.policy], 1)
  return {
    "oracle": review(tree, true, values_NxT=tree.value_NxT),
    "fooled": review(tree, applauded, np.where(is_check, 3.0, 1.0), fooled_values),
    "random": review(tree, rng.integers(0, len(ROLES), (n, t)), values_NxT=random_values),
    "thief": review(
      tree, np.where(np.arange(t) == t - 1, ROLES.index("necessary"), ROLES.index("inherits"))
    ),
    "hindsight": review(
      tree, values_NxT=np.clip(1 - APPLAUSE * is_check[:, ::-1].cumsum(1)[:, ::-1], 0, 1)
    ),
  }


ONE_TABLE = RoleTable(necessary=1.0, repair=1.0)
ROWS = (
  ("uniform (RLOO)", Uniform(), "oracle"),
  ("potential 0, oracle: the true advantages", Potential(discount=0.0), "oracle"),
  ("potential 0, log, oracle", Potential(discount=0.0, log_epsilon=0.01), "oracle"),
  ("potential 0, fooled", Potential(discount=0.0), "fooled"),
  ("potential 0.95, fooled", Potential(discount=0.95), "fooled"),
  ("potential 1, oracle", Potential(), "oracle"),
  ("potential 1, fooled", Potential(), "fooled"),
  ("potential 1, random", Potential(), "random"),
  ("potential 1, values that know the rest", Potential(), "hindsight"),
  ("weighted, lambda 0.5, oracle", Weighted(), "oracle"),
  ("weighted, lambda 1, oracle", Weighted(lam=1.0), "oracle"),
  ("weighted, lambda 1, one table, oracle", Weighted(lam=1.0, blame=ONE_TABLE), "oracle"),
  ("weighted, lambda 0.5, fooled", Weighted(), "fooled"),
  ("weighted, lambda 1, fooled", Weighted(lam=1.0), "fooled"),
  ("weighted, lambda 1, thief", Weighted(lam=1.0), "thief"),
  ("signed, oracle", Signed(), "oracle"),
  ("signed, fooled", Signed(), "fooled"),
  ("return_to_go, oracle", ReturnToGo(), "oracle"),
  ("return_to_go, fooled", ReturnToGo(), "fooled"),
  ("capo, oracle", Capo(), "oracle"),
)


def table(tree: Tree) -> list[Row]:
  said = reviews(tree)
  return [
    measure(tree, name, credit(tree, scheme, said[reviewer])) for name, scheme, reviewer in ROWS
  ]
