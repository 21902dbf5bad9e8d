"""Where the policy decides when to stop: what is unbiased, and what is not."""

import numpy as np
import pytest

from evidence.lab import stopping


@pytest.mark.parametrize("seed", range(3))
def test_credit_by_turn_is_unbiased_unless_later_turns_have_baselines_of_their_own(seed):
  t = stopping.traces(seed)
  assert t.probability_N.sum() == pytest.approx(1)
  np.testing.assert_allclose(stopping.turn_rewards(t).sum(1), t.reward_N, atol=1e-12)
  lengths = t.reached_NxK.sum(1)
  assert {*lengths.tolist()} == {*range(1, stopping.TURNS + 1)}
  rows = stopping.rows(t)
  for name in (
    "uniform (RLOO)",
    "potential 1, the environment's scores",
    "potential 1, any numbers by turn",
    "return to go less its mean by turn",
  ):
    cosine, error = rows[name]
    assert cosine == pytest.approx(1, abs=1e-6)
    assert error < 1e-6
  # How many means are taken off depends on how long the policy goes on.
  assert rows["turn rewards less their means by turn, to go"][0] < 0.99
  assert rows["turn rewards less their means by turn, to go"][1] > 0.1
