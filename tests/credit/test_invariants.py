"""The twelve invariants that no reviewer can break, for `return_to_go`, `potential` and `capo`.

Those of `weighted` and `signed` are in test_schemes.py: sums, signs and caps (I1, I2, I12) in
`test_sums_signs_and_caps`, silence (I3) in `test_a_review_that_says_nothing_...`, permutation (I4), splitting (I6),
tokens without credit (I9), groups without variance (I10), missing reviews (I11) under those names.
"""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from test_schemes import NECESSARY, B, G, K, P, T, _batch, _batches, _compute, _mask, _uniform

from dca_jax.credit import CreditConfig, Review
from dca_jax.lab import tree
from dca_jax.review import Request, ReviewerConfig, Truth, make_reviewer
from dca_jax.roles import ROLES
from dca_jax.task import Chains, ChainsConfig

RTG, CAPO = CreditConfig(scheme="return_to_go"), CreditConfig(scheme="capo")
SAFE, OWN = CreditConfig(scheme="potential"), CreditConfig(scheme="potential", discount=0.0)
POTENTIALS = [SAFE, OWN, dataclasses.replace(SAFE, discount=0.9), dataclasses.replace(OWN, log_epsilon=0.01)]


def _name(config):
  return f"{config.scheme}-{config.discount}-{config.log_epsilon}"


def _step_coefficients(tokens, batch, i):
  """The coefficient of each step of row i; all tokens of a step have the same."""
  ids = batch["review"].step_ids_BxT[i, : batch["lengths"][i]]
  firsts = [int(np.argmax(ids == k)) for k in range(ids[-1] + 1)]
  for k, first in enumerate(firsts):
    assert np.unique(tokens[i, : len(ids)][ids == k]).size == 1, first
  return [float(tokens[i, first]) for first in firsts]


def _phi(config, batch, i, baseline):
  """The values of row i's prefixes, missing ones filled, as the docstring of `potential` says; None without any."""
  ids = batch["review"].step_ids_BxT[i, : batch["lengths"][i]]
  given_ = batch["review"].values_BxK[i, : ids[-1] + 1].astype(float)
  known = (given_ >= 0) & (given_ <= 1)
  if not known.any() or not batch["review"].ok_B[i]:
    return None
  phi, last = [], min(max(baseline, 0.0), 1.0)
  for value, ok in zip(given_, known, strict=True):
    last = value if ok else last
    phi.append(last)
  epsilon = config.log_epsilon
  return [np.log1p(v / epsilon) / np.log1p(1 / epsilon) if epsilon else v for v in phi]


# I1: what each scheme conserves.


@settings(max_examples=60, deadline=None)
@given(batch=_batches())
def test_i1_redistributed_rewards_sum_to_the_reward(batch):
  # With no reward elsewhere in the group the baseline is 0, so a token's advantage is the reward still to come.
  batch["rewards"][:, 1:] = 0
  rows = np.arange(0, B, G)
  to_go, rewards = _compute(RTG, batch)[rows].astype(float), batch["rewards"][:, 0]
  paid = to_go - np.append(to_go[:, 1:], np.zeros((P, 1)), 1)
  assert (paid >= -1e-6).all()
  np.testing.assert_allclose(paid.sum(1), rewards, rtol=1e-6)


@pytest.mark.parametrize("config", POTENTIALS, ids=_name)
@settings(max_examples=40, deadline=None)
@given(batch=_batches())
def test_i1_changes_of_value_telescope_to_the_reward(config, batch):
  tokens, rewards = _compute(config, batch), batch["rewards"].reshape(-1).astype(float)
  advantages = _uniform(CreditConfig(), batch)
  for i in range(B):
    phi = _phi(config, batch, i, rewards[i] - float(advantages[i, 0]))
    if phi is None:
      assert np.array_equal(tokens[i], advantages[i])
      continue
    change = np.diff([*phi, rewards[i]])
    wanted = [sum(config.discount ** (j - k) * change[j] for j in range(k, len(phi))) for k in range(len(phi))]
    coefficients = _step_coefficients(tokens, batch, i)
    np.testing.assert_allclose(coefficients, wanted, atol=1e-6)
    if config.discount == 0:
      assert sum(coefficients) == pytest.approx(rewards[i] - phi[0], abs=1e-6)


def test_i1_capo_conserves_nothing():
  batch = _batch(3)
  roles, ok = batch["review"].roles_BxK, np.ones(B, bool)
  batch["truncated"][:] = False
  tokens = _compute(CAPO, batch).astype(float)
  wrong = np.take_along_axis(roles == ROLES.index("error"), batch["review"].step_ids_BxT, 1) & _mask(batch)
  share = (wrong.sum(1) / batch["lengths"]).reshape(P, G)
  others = ((share.sum(1, keepdims=True) - share) / (G - 1)).reshape(-1)
  mass = _uniform(CAPO, batch).astype(float).sum(1)
  lost = CAPO.penalty * (wrong.sum(1) - others * batch["lengths"])
  np.testing.assert_allclose(tokens.sum(1), mass - lost, atol=1e-5)
  assert np.abs(lost[ok]).max() > 1


# I4: a group has no order.


@pytest.mark.parametrize("config", [*POTENTIALS, RTG, CAPO], ids=_name)
def test_i4_permuting_a_group_permutes_its_tokens(config):
  rng = np.random.default_rng(5)
  batch = _batch(5, rng.integers(0, 9, (P, G)) / 8)
  order = np.concatenate([rng.permutation(G) + G * p for p in range(P)])
  moved = {
    "rewards": batch["rewards"].reshape(-1)[order].reshape(P, G),
    "lengths": batch["lengths"][order],
    "truncated": batch["truncated"][order],
    "review": Review(*(x[order] for x in batch["review"])),
  }
  ours, theirs = _compute(config, moved), _compute(config, batch)[order]
  # The group's mean is summed in another order.
  np.testing.assert_allclose(ours, theirs, atol=0 if config.scheme == "potential" else 1e-6)


# I5: nothing that is written into an answer changes its total.


def _with_probe(batch, row, after, role, weight, value, tokens=4):
  """The batch with a step of so many tokens put behind step `after` of a row; its other steps keep what was said."""
  ids, roles, weights, values, ok = (x.copy() for x in batch["review"])
  length = batch["lengths"][row]
  at = int(np.searchsorted(ids[row, :length], after, "right"))
  grown = np.concatenate([ids[row, :at], [after + 1] * tokens, ids[row, at:length] + 1])
  ids[row] = np.append(grown, np.zeros(T - len(grown), int))
  for array, new in ((roles, role), (weights, weight), (values, value)):
    array[row] = np.insert(array[row], after + 1, new)[:K]
  lengths = batch["lengths"].copy()
  lengths[row] += tokens
  return {**batch, "lengths": lengths, "review": Review(ids, roles, weights, values, ok)}


@pytest.mark.parametrize(
  "config",
  [
    OWN,
    POTENTIALS[3],
    RTG,
    *(CreditConfig(scheme=s, conserve="completion") for s in ("uniform", "weighted", "signed")),
  ],
  ids=_name,
)
@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("role", ROLES)
def test_i5_a_probe_leaves_the_total_alone(config, after, role):
  batch = _batch(9, np.tile([1.0, 0.0, 0.0, 0.0], (P, 1)))
  batch["lengths"][:] = 16
  batch["review"].step_ids_BxT[:] = np.minimum(np.arange(T) // 4, 3)
  batch["truncated"][:] = False
  probed = _with_probe(batch, 0, after, ROLES.index(role), 3.0, 0.9)

  def total(batch):
    tokens = _compute(config, batch)
    if config.scheme == "potential":
      return sum(_step_coefficients(tokens, batch, 0))
    if config.scheme == "return_to_go":  # Of the rewards paid out, the rest of the group having none.
      return float(tokens[0, 0])
    return float(tokens[0].astype(float).sum())

  assert total(probed) == pytest.approx(total(batch), rel=1e-6)


# I6: where steps are cut does not matter, where what is said is the same.


@pytest.mark.parametrize("config", [RTG, CAPO], ids=_name)
def test_i6_cutting_steps_in_two_changes_nothing(config):
  batch, rng = _batch(6), np.random.default_rng(6)
  whole = np.minimum(batch["review"].step_ids_BxT // 2, K // 2 - 1)
  roles, weights = rng.integers(0, 6, (B, K // 2)), rng.random((B, K // 2), np.float32)
  one = {"roles_BxK": np.tile(roles, 2), "weights_BxK": np.tile(weights, 2)}
  two = {"roles_BxK": roles.repeat(2, 1), "weights_BxK": weights.repeat(2, 1)}
  halves = whole * 2 + (np.arange(T) >= 12)
  ours = _compute(config, batch, step_ids_BxT=whole, **one)
  np.testing.assert_allclose(_compute(config, batch, step_ids_BxT=halves, **two), ours, atol=1e-6)
  assert not np.allclose(ours, _uniform(config, batch))


# I7: a prefix does not hear of what follows.


@pytest.mark.parametrize("config", POTENTIALS, ids=_name)
def test_i7_values_behind_a_step_do_not_reach_it(config):
  batch, rng = _batch(10), np.random.default_rng(10)
  j = 2
  edited = {name: getattr(batch["review"], name).copy() for name in ("roles_BxK", "weights_BxK", "values_BxK")}
  edited["values_BxK"][:, j + 1 :] = rng.choice([0.0, 0.3, 1.0, np.nan, np.inf], (B, K - j - 1))
  edited["roles_BxK"][:, j + 1 :] = NECESSARY
  edited["weights_BxK"][:, j + 1 :] = np.nan
  tokens, after = _compute(config, batch), _compute(config, batch, **edited)
  # At discount 1 a step hears of the outcome only; at 0 of the next prefix too.
  sees = {1.0: j, 0.0: j - 1}.get(config.discount, -1)
  early = batch["review"].step_ids_BxT <= sees
  assert np.array_equal(tokens[early], after[early])
  assert not np.array_equal(tokens, after)


CHAINS = Chains(ChainsConfig())
TRUTH = Truth(lambda r: CHAINS.label_steps(r.problem, r.steps, r.truncated), CHAINS.prefix_values)


def _values(name, steps, others, correct):
  prompt = CHAINS.demonstration(3, False)[0]
  requests = [Request(f"1/3/{i}", prompt, tuple(s), correct, False) for i, s in enumerate([steps, *others])]
  return make_reviewer(ReviewerConfig(name=name), TRUTH)(requests, 1.0)[0].values


@pytest.mark.parametrize("name", ["oracle", "noisy", "random", "lexical", "thief", "suffix"])
def test_i7_reviewers_value_a_prefix_without_the_rest(name):
  """All but the control that is made to fail this test."""
  text = CHAINS.demonstration(3, False)[1]
  steps = [part + ";" for part in text.split(";")[:-1]] + [text.split(";")[-1]]
  others = [steps, [*steps[:3], "#0$"]]
  blind = True
  for j in range(1, len(steps) - 1):
    edited = steps[:j] + [steps[0], "a0;", "b9;", "check", "wait"][: len(steps) - 1 - j] + steps[j + 5 :]
    edited = [*edited, "#1$"][: len(steps)]
    ours, theirs = _values(name, steps, others, True), _values(name, edited, others, False)
    blind &= name == "thief" or ours[: j + 1] == theirs[: j + 1]  # Which step the thief likes depends on their number.
  assert blind == (name != "suffix")


# I8: at discount 1 the expected update is the policy gradient, whatever the potential.

SMALL = tree.make_tree(steps=4)


def _cosine(values_NxT):
  return tree.measure(SMALL, "", tree.credit(SMALL, SAFE, tree.review(SMALL, values_NxT=values_NxT))).cosine


def test_i8_any_potential_of_the_prefix_leaves_the_expected_update_alone():
  rng, n = np.random.default_rng(0), len(SMALL.reward_N)
  by_prefix = np.stack([np.repeat(rng.random(len(pi)), n // len(pi)) for pi in SMALL.policy], 1)
  checks = (SMALL.actions_NxT == tree.CHECK).cumsum(1) - (SMALL.actions_NxT == tree.CHECK)
  potentials = {
    "random": by_prefix,
    "hostile": 1 - SMALL.value_NxT,
    "performed for": np.clip(SMALL.value_NxT + 0.3 * checks, 0, 1),
    "fails after a check": np.where(checks > 0, np.nan, SMALL.value_NxT),
    "fails at random prefixes": np.where(by_prefix < 0.5, np.inf, by_prefix),
  }
  for values in potentials.values():
    assert _cosine(values) > 1 - 1e-6


def test_i8_a_potential_that_knows_the_rest_does_not():
  total = (SMALL.actions_NxT == tree.CHECK).sum(1, keepdims=True)
  assert _cosine(np.clip(1 - 0.2 * total + 0 * SMALL.value_NxT, 0, 1)) < 0.99
  # Nor one that fails for what the rest says.
  assert _cosine(np.where(total > 1, np.nan, SMALL.value_NxT)) < 0.9999


# I10: groups without variance.


@pytest.mark.parametrize("baseline", ["leave_one_out", "mean"])
def test_i10_return_to_go_is_zero_where_all_fail(baseline):
  batch = _batch(8, np.zeros((P, G)))
  assert not _compute(dataclasses.replace(RTG, baseline=baseline), batch).any()


# I11: a missing review is that completion's alone.


@pytest.mark.parametrize("config", [*POTENTIALS, RTG, CAPO], ids=_name)
def test_i11_a_missing_review_is_uniform_for_that_completion(config):
  batch = _batch(3, np.random.default_rng(3).integers(1, 9, (P, G)) / 8)
  ok = np.arange(B) % 3 > 0
  tokens, all_ok = _compute(config, batch, ok_B=ok), _compute(config, batch)
  assert np.array_equal(tokens[~ok], _uniform(config, batch)[~ok])
  if config.scheme == "potential":
    assert np.array_equal(tokens[ok], all_ok[ok])
  else:  # These have a baseline made of what is said of the others.
    assert not np.array_equal(tokens[ok], all_ok[ok])
