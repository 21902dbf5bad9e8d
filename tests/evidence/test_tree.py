"""The exact laboratory: its closed forms are right, and they say what docs/method.md says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dca_jax.credit import ReturnToGo, ReviewArrays, Weighted, token_advantages
from evidence.lab import tree

SMALL = tree.make_tree(steps=3)


@pytest.fixture(scope="module")
def rows():
  return {row.name: row for row in tree.table(tree.make_tree())}


def rloo(rows):
  return rows["uniform (RLOO)"].snr


def scores(small):
  """For each trace and step the gradient of the log-probability by every logit, [N, T,
  all logits]."""
  n, t = small.actions_NxT.shape
  sizes = [pi.size for pi in small.policy]
  out = np.zeros((n, t, sum(sizes)))
  for i in range(n):
    prefix, first = 0, 0
    for k, action in enumerate(small.actions_NxT[i]):
      at = first + prefix * 5
      out[i, k, at : at + 5] = -small.policy[k][prefix]
      out[i, k, at + action] += 1
      prefix, first = prefix * 5 + action, first + sizes[k]
  return out


def success(logits, small):
  """The policy's chance of success as a function of its logits, step by step over every trace."""
  n = len(small.reward_N)
  logp = sum(jnp.repeat(jax.nn.log_softmax(x).reshape(-1), n // x.size) for x in logits)
  return (jnp.exp(logp) * small.reward_N).sum()


def test_the_tree_is_a_distribution_and_values_are_conditional_means():
  for t in (SMALL, tree.make_tree()):
    assert t.probability_N.sum() == pytest.approx(1)
    # The same numbers by another way: walking back from the rewards, one step at a time.
    value = t.reward_N
    for k in reversed(range(t.actions_NxT.shape[1])):
      value = (t.policy[k] * value.reshape(t.policy[k].shape)).sum(1)
      np.testing.assert_allclose(t.value_NxT[:, k], np.repeat(value, len(t.reward_N) // len(value)))


def test_moments_equal_those_of_explicit_vectors():
  score, p = scores(SMALL), SMALL.probability_N
  gradient = jax.grad(success)([jnp.log(pi) for pi in SMALL.policy], SMALL)
  truth = np.concatenate([np.asarray(x).reshape(-1) for x in gradient])
  rng = np.random.default_rng(0)
  said = tree.reviews(SMALL)
  for credit in (
    np.broadcast_to(SMALL.reward_N[:, None], SMALL.actions_NxT.shape),
    rng.normal(size=SMALL.actions_NxT.shape),
    tree.credit(SMALL, Weighted(), said["fooled"]),
  ):
    g = np.einsum("nt,ntd->nd", credit, score)
    mean = p @ g
    row = tree.measure(SMALL, "", credit)
    assert row.cosine == pytest.approx(
      mean @ truth / np.sqrt(mean @ mean * (truth @ truth)), abs=1e-6
    )
    assert row.snr == pytest.approx(mean @ mean / (p @ np.square(g).sum(1) - mean @ mean), rel=1e-9)


@pytest.mark.parametrize("config", [Weighted(), ReturnToGo()])
def test_sampled_groups_agree_with_the_exact_update(config):
  """The shipped entry point on groups of eight has the expectation
  that the laboratory computes without groups."""
  rng, said, groups = np.random.default_rng(1), tree.reviews(SMALL)["fooled"], 4000
  rows = rng.choice(len(SMALL.reward_N), size=groups * 8, p=SMALL.probability_N)
  sampled = token_advantages(
    config,
    jnp.asarray(SMALL.reward_N[rows].reshape(groups, 8), jnp.float32),
    jnp.ones((len(rows), 3), bool),
    jnp.zeros(len(rows), bool),
    ReviewArrays(*(jnp.asarray(x)[rows] for x in said)),
  )
  score = scores(SMALL)
  per_group = np.einsum("nt,ntd->nd", sampled, score[rows]).reshape(groups, 8, -1).mean(1)
  exact = SMALL.probability_N @ np.einsum("nt,ntd->nd", tree.credit(SMALL, config, said), score)
  error = per_group.std(0, ddof=1) / groups**0.5
  seen = error > 0
  z = (per_group.mean(0) - exact)[seen] / error[seen]
  assert np.abs(z).max() < 5
  assert 0.6 < np.sqrt(np.mean(z**2)) < 1.4


@pytest.mark.parametrize(
  "name", ["uniform (RLOO)", "potential 1, oracle", "potential 1, fooled", "potential 1, random"]
)
def test_the_safe_rows_are_unbiased_and_pay_nothing_for_performing(rows, name):
  assert rows[name].cosine > 1 - 1e-6
  assert abs(rows[name].leading) < 1e-6
  assert abs(rows[name].trailing) < 1e-6


def test_values_that_know_the_rest_break_the_guarantee(rows):
  row = rows["potential 1, values that know the rest"]
  assert row.cosine < 0.95
  assert row.leading > 0.1


def test_true_advantages_have_four_times_the_signal_to_noise(rows):
  row = rows["potential 0, oracle: the true advantages"]
  assert row.cosine > 1 - 1e-6
  assert row.snr > 4 * rloo(rows)
  assert row.snr < tree.STEPS * rloo(rows)  # The bound: as many times as there are steps.


@pytest.mark.parametrize(
  "scheme", ["weighted, lambda 0.5", "weighted, lambda 1", "signed", "return_to_go", "potential 0"]
)
def test_a_fooled_reviewer_pays_for_performing_where_the_scheme_trusts_it(rows, scheme):
  assert rows[f"{scheme}, fooled"].leading > 0.05
  honest = next(row for name, row in rows.items() if name.startswith(f"{scheme}, oracle"))
  assert abs(honest.leading) < 1e-6


def test_one_table_for_wins_and_losses_costs_most_of_the_gain(rows):
  assert (
    rows["weighted, lambda 1, one table, oracle"].snr * 4 < rows["weighted, lambda 1, oracle"].snr
  )
