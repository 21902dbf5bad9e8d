"""Calibrated credit in the laboratory: its evidence is what the scheme would gather, and what it
makes of it is what docs/method.md says."""

import numpy as np
import pytest

from dca_jax.credit.calibrated import fit
from dca_jax.credit.exact import make_tree
from evidence.lab import checks

TREE = make_tree()


@pytest.fixture(scope="module")
def rows():
  """With no checks, and with so many that only the cells matter; by reviewer."""
  found = {}
  for name in ("oracle", "fooled", "fooled, unseen", "random"):
    said, seen = checks.controls(TREE)[name]
    cells = checks.cells(TREE, said, seen)
    for n in (0, 200_000):
      evidence = checks.evidence(TREE, cells, n, np.random.default_rng(0))
      found[name, n] = checks.calibrated(TREE, said, cells, evidence)
  return found


def test_without_checks_it_is_rloo_and_pays_nothing(rows):
  for (_, n), row in rows.items():
    if not n:
      assert row.cosine == pytest.approx(1, abs=1e-6)
      assert row.leading == pytest.approx(0, abs=1e-6)


def test_what_applause_buys_goes_where_it_can_be_seen(rows):
  base, many = checks.plain(TREE, "uniform"), 200_000
  fooled = checks.plain(TREE, "weighted", "fooled")
  assert fooled.leading > 0.4
  # Neither cell of a check that does nothing earns anything, whatever it is called.
  assert -0.2 < rows["fooled", many].leading < 0.02
  assert checks.relative(rows["fooled", many], base) > 2 * checks.relative(fooled, base)
  assert checks.relative(rows["oracle", many], base) > 6
  assert checks.relative(rows["random", many], base) > 0.85
  # What the cells cannot tell apart is only diluted.
  assert rows["fooled, unseen", many].leading > 0.3


def test_the_measured_shares_are_those_of_the_policy():
  """The evidence of a cell tends to the slope of the exact effects over the even share."""
  said, seen = checks.controls(TREE)["oracle"]
  cells, n = checks.cells(TREE, said, seen), 400_000
  evidence = checks.evidence(TREE, cells, n, np.random.default_rng(1))
  effects = np.diff(TREE.value_NxT, axis=1, append=TREE.reward_N[:, None])
  even = np.broadcast_to(checks.advantages(TREE)[:, None] / cells.shape[1], cells.shape)
  weight = np.broadcast_to(TREE.probability_N[:, None], cells.shape)
  found = fit(evidence, 0.0)
  for cell in np.unique(cells):
    here = cells == cell
    expected = n * weight[here].sum() / cells.shape[1]
    assert evidence.sums[0][cell] == pytest.approx(expected, abs=4 * np.sqrt(expected) + 1)
    slope = np.sum((weight * even * effects)[here]) / np.sum((weight * even**2)[here])
    assert found.slopes[cell] == pytest.approx(slope, abs=4 * found.errors[cell])
