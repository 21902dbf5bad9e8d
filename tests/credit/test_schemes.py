"""What every way of spreading an outcome over tokens must keep, whatever a reviewer says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dca_jax.config import ConfigError, build
from dca_jax.credit import SCHEMES, ReviewArrays, RoleTable, group_advantages, token_advantages
from dca_jax.episode import ROLES

# One shape for nearly everything, so that a config is compiled once.
P, G, T, K = 3, 4, 24, 6
B = P * G
NECESSARY, REDUNDANT, IRRELEVANT, ERROR, INHERITS, REPAIR = range(len(ROLES))
WILD = {
  "credit": RoleTable(necessary=1000.0, repair=1.0, inherits=1e-3),
  "blame": RoleTable(error=1000.0, irrelevant=3.0, necessary=1e-3),
  "blame_truncated": RoleTable(error=0.1, redundant=7.0, irrelevant=1.0),
}


def make(scheme="uniform", **settings):
  """A scheme with those of the settings that it has."""
  known = {field.name for field in dataclasses.fields(SCHEMES[scheme])}
  return SCHEMES[scheme](**{key: value for key, value in settings.items() if key in known})


CONFIGS = [
  make(scheme=scheme, conserve=conserve, **other)
  for scheme in ("weighted", "signed")
  for conserve in ("tokens", "completion")
  for other in ({}, {"lam": 1.0, "beta": 3.0, "cap": 2.0, **WILD})
]


def advantages_of(config, rewards, lengths, truncated, review):
  """The advantages of episodes that are sampled from their beginning up to their length."""
  sampled = jnp.arange(np.shape(review.step_ids_BxT)[1]) < jnp.asarray(lengths)[:, None]
  # Of `calibrated`: as if that were what steps of each role have been worth.
  facts = 1.0 / (1.0 + jnp.asarray(review.roles_BxK))
  return token_advantages(config, rewards, sampled, truncated, review, facts)


_jitted = jax.jit(advantages_of, static_argnums=0)


def _compute(config, batch, **changes):
  batch = {**batch, **{k: v for k, v in changes.items() if k in batch}}
  review = batch["review"]._replace(
    **{k: v for k, v in changes.items() if k in ReviewArrays._fields}
  )
  return np.asarray(_jitted(config, batch["rewards"], batch["lengths"], batch["truncated"], review))


def _mask(batch):
  return np.arange(T) < batch["lengths"][:, None]


# Numbers a reviewer should send, and numbers that it should not.
SANE = [0.0, 1e-38, 1e-7, 1e-3, 0.1, 0.5, 1.0, 2.0, 999.0, 1000.0]
INSANE = [np.nan, np.inf, -np.inf, -1.0, -1e-7, 1001.0, 3e38]
# Numbers below 1e-38 may become 0 on their way, so a sum of such is only as exact as this.
TINY = 1e-30
_values = st.one_of(st.floats(0, 1, width=32), st.floats(0, 1, width=32), st.sampled_from(INSANE))
_sane = st.one_of(st.sampled_from(SANE), st.floats(0, 1000, width=32))


@st.composite
def _batches(draw):
  def array(dtype, shape, elements):
    return draw(hnp.arrays(dtype, shape, elements=elements))

  # A step id for every token, rising by 0 or 1; multiples of 1/64 so that sums of rewards are exact
  # in any order.
  rises = array(np.int32, (B, T), st.integers(0, 1))
  weights = draw(st.sampled_from([_sane, st.one_of(_sane, _sane, _sane, st.sampled_from(INSANE))]))
  return {
    "rewards": array(np.int32, (P, G), st.integers(0, 64)).astype(np.float32) / 64,
    "lengths": array(np.int32, B, st.integers(1, T)),
    "truncated": array(bool, B, st.booleans()),
    "review": ReviewArrays(
      np.minimum(rises.cumsum(1) // 2, K - 1).astype(np.int32),
      array(np.int32, (B, K), st.integers(0, len(ROLES) - 1)),
      array(np.float32, (B, K), weights),
      array(np.float32, (B, K), _values),
      array(bool, B, st.sampled_from([True, True, True, False])),
    ),
  }


def _batch(seed=0, rewards=None):
  """A plain batch: weights of 1, every review usable, steps of random lengths."""
  rng = np.random.default_rng(seed)
  return {
    "rewards": np.asarray(rng.integers(0, 2, (P, G)) if rewards is None else rewards, np.float32),
    "lengths": rng.integers(12, T + 1, B).astype(np.int32),
    "truncated": rng.random(B) < 0.3,
    "review": ReviewArrays(
      np.sort(rng.integers(0, K, (B, T)), 1).astype(np.int32),
      rng.integers(0, len(ROLES), (B, K)).astype(np.int32),
      np.ones((B, K), np.float32),
      rng.random((B, K), np.float32),
      np.ones(B, bool),
    ),
  }


def _uniform(config, batch):
  return _compute(make(conserve=config.conserve, baseline=config.baseline), batch)


# For every review.


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.scheme}-{c.conserve}-cap {c.cap}")
@settings(max_examples=60, deadline=None)
@given(batch=_batches())
def test_sums_signs_and_caps(config, batch):
  tokens, mask = _compute(config, batch), _mask(batch)
  assert tokens.dtype == np.float32
  assert np.isfinite(tokens).all()
  assert not tokens[~mask].any()

  a_B = _uniform(dataclasses.replace(config, conserve="tokens"), batch)[:, 0].astype(float)
  lengths = batch["lengths"]
  mass = a_B * (lengths if config.conserve == "tokens" else T)
  exact = tokens.astype(float)
  assert (np.abs(exact.sum(1) - mass) <= 1e-6 * np.abs(exact).sum(1) + TINY).all()

  per_token = (mass / lengths)[:, None]
  if config.scheme == "weighted":
    assert (exact * np.sign(per_token) >= 0).all()
    assert (np.abs(exact) <= config.cap * np.abs(per_token) * (1 + 1e-6)).all()
    assert not exact[a_B == 0].any()
  else:
    assert (np.abs(exact - per_token)[mask] <= config.cap * (1 + 1e-6)).all()

  unusable = ~batch["review"].ok_B | ~_usable(batch)
  assert np.array_equal(tokens[unusable], _uniform(config, batch)[unusable])


def _usable(batch):
  ids, _, weights, _, _ = batch["review"]
  read = np.take_along_axis(weights, ids, 1)
  return (((read >= 0) & (read <= 1000)) | ~_mask(batch)).all(1)


@pytest.mark.parametrize("rewards", [0.0, 1.0], ids=["all fail", "all succeed"])
@pytest.mark.parametrize("weight", [1.0, 1000.0])
def test_signed_conserves_the_sum_of_nearly_equal_weights(weight, rewards):
  """The contrast between the steps is then as small as the rounding of their mean."""
  batch = _batch(rewards=np.full((P, G), rewards))
  weights = np.full((B, K), weight, np.float32)
  weights[:, ::2] = np.nextafter(np.float32(weight), np.float32(0))
  tokens = _compute(
    make(scheme="signed"), batch, weights_BxK=weights, roles_BxK=np.zeros((B, K), np.int32)
  )
  tokens = tokens.astype(float)
  assert (np.abs(tokens.sum(1)) <= 1e-6 * np.abs(tokens).sum(1)).all()


@pytest.mark.parametrize("scheme", ["weighted", "signed"])
@pytest.mark.parametrize("length", [1, 2, 4096])
def test_sums_of_very_short_and_very_long_completions(scheme, length):
  rng = np.random.default_rng(length)
  steps = min(length, 300)
  ids = np.sort(rng.integers(0, steps, (B, length)), 1)
  review = ReviewArrays(
    ids, rng.integers(0, 6, (B, steps)), *rng.random((2, B, steps), np.float32), np.ones(B, bool)
  )
  rewards = rng.integers(0, 2, (P, G)).astype(np.float32)
  config = make(scheme=scheme)
  tokens = _jitted(config, rewards, np.full(B, length), np.zeros(B, bool), review)
  exact, mass = (
    np.asarray(tokens, float),
    length * np.asarray(group_advantages(config, rewards), float).reshape(-1),
  )
  # One advantage, rounded differently in two programs, may differ in its last bit.
  assert (np.abs(exact.sum(1) - mass) <= 2e-6 * np.abs(exact).sum(1)).all()
  if length == 1:
    assert np.array_equal(
      tokens, _jitted(make(), rewards, np.full(B, 1), np.zeros(B, bool), review)
    )


# Uniform.


def _plain_group_advantages(rewards, baseline):
  """GRPO's and RLOO's, in the words of the papers."""
  rewards = np.asarray(rewards, np.float32)
  others = (rewards.sum(1, keepdims=True) - rewards) / np.float32(rewards.shape[1] - 1)
  advantages = rewards - (others if baseline == "leave_one_out" else rewards.mean(1, keepdims=True))
  return np.where((rewards == rewards[:, :1]).all(1, keepdims=True), np.float32(0), advantages)


@pytest.mark.parametrize("baseline", ["leave_one_out", "mean"])
@pytest.mark.parametrize("group", [2, 4, 5, 8])
def test_uniform_is_the_plain_advantage_bit_for_bit(baseline, group):
  rng = np.random.default_rng(group)
  config = make(baseline=baseline)
  for high in (1, 64):
    rewards = rng.integers(0, high + 1, (16, group)).astype(np.float32) / high
    lengths = rng.integers(1, T + 1, 16 * group)
    one_step = [np.zeros((16 * group, 1), t) for t in (int, np.float32, np.float32)]
    nobody = ReviewArrays(np.zeros((16 * group, T), int), *one_step, np.zeros(16 * group, bool))
    # Outside jit, because XLA multiplies by 1 / (G - 1) where numpy divides.
    tokens = advantages_of(config, rewards, lengths, np.zeros(16 * group, bool), nobody)
    plain = _plain_group_advantages(rewards, baseline).reshape(-1, 1)
    assert np.array_equal(tokens, np.where(np.arange(T) < lengths[:, None], plain, np.float32(0)))
    under_jit = _jitted(config, rewards, lengths, np.zeros(16 * group, bool), nobody)
    np.testing.assert_allclose(under_jit, tokens, atol=1.2e-7)


def test_baselines_by_hand():
  rewards = np.array(
    [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
  )
  third = 1 / 3
  loo = [[1, -third, -third, -third], [third, third, -1, third], [0] * 4, [0] * 4]
  mean = [[0.75, -0.25, -0.25, -0.25], [0.25, 0.25, -0.75, 0.25], [0] * 4, [0] * 4]
  np.testing.assert_allclose(group_advantages(make(), jnp.array(rewards)), loo, rtol=1e-6)
  np.testing.assert_allclose(
    group_advantages(make(baseline="mean"), jnp.array(rewards)), mean, rtol=1e-6
  )


@pytest.mark.parametrize("baseline", ["leave_one_out", "mean"])
def test_divide_by_std(baseline):
  rewards = np.array(
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0.1, 0.1, 0.1, 0.1], [0.5, 0.25, 1, 0]], np.float32
  )
  plain = np.asarray(group_advantages(make(baseline=baseline), rewards))
  divided = np.asarray(group_advantages(make(baseline=baseline, divide_by_std=True), rewards))
  varied = rewards.std(1) > 1e-3
  np.testing.assert_allclose(
    divided[varied], plain[varied] / rewards[varied].std(1, keepdims=True), rtol=1e-5
  )
  # Equal rewards have no deviation to divide by; and 0.1 has no exact mean.
  assert not divided[~varied].any()
  assert not plain[~varied].any()


def test_rewards_that_hardly_differ_weigh_little():
  # The square of 1e-30 is 0 in float32, and so would be a deviation of it.
  rewards = np.float32([[0, 0, 0, 1e-30], [0.7, 0.7, 0.7, 0.7 + 1e-7]])
  divided = np.asarray(group_advantages(make(divide_by_std=True), rewards))
  assert np.isfinite(divided).all()
  assert np.abs(divided).max() < 1e-3


# Without information every scheme is uniform.


def _void_missing(batch):
  return {"ok_B": np.zeros(B, bool)}


def _void_weight(value, batch):
  # One bad weight, in the step of the first token, is enough.
  weights = np.ones((B, K), np.float32)
  weights[np.arange(B), batch["review"].step_ids_BxT[:, 0]] = value
  return {"weights_BxK": weights}


def _void_equal(role, weight, batch):
  return {
    "roles_BxK": np.full((B, K), role, np.int32),
    "weights_BxK": np.full((B, K), weight, np.float32),
  }


def _void_same_intensity(batch):
  # Both earn 1 and neither pays: two names, one judgement.
  return {
    "roles_BxK": np.where(np.arange(K) % 2, NECESSARY, REPAIR).astype(np.int32)[None].repeat(B, 0)
  }


VOID = {
  "missing": _void_missing,
  **{f"weight {value}": functools.partial(_void_weight, value) for value in INSANE},
  **{
    f"all {ROLES[r]} {w}": functools.partial(_void_equal, r, w)
    for r in range(6)
    for w in (1e-3, 1.0, 999.9)
  },
  "all of weight 0": functools.partial(_void_equal, NECESSARY, 0.0),
  "two roles of the same intensity": _void_same_intensity,
}


@pytest.mark.parametrize("conserve", ["tokens", "completion"])
@pytest.mark.parametrize("scheme", ["uniform", "weighted", "signed"])
@pytest.mark.parametrize("void", VOID)
def test_a_review_that_says_nothing_is_uniform_bit_for_bit(scheme, conserve, void):
  for seed in range(3):
    rewards = np.random.default_rng(seed).random((P, G)) if seed else None
    batch = _batch(seed, rewards)
    tokens = _compute(make(scheme=scheme, conserve=conserve), batch, **VOID[void](batch))
    assert tokens.any()
    assert np.array_equal(tokens, _compute(make(conserve=conserve), batch))


UNUSABLE = {
  "missing": (_void_missing, ("return_to_go", "capo", "potential")),
  **{f"weight {w}": (functools.partial(_void_weight, w), ("return_to_go", "capo")) for w in INSANE},
  "all of weight 0": (functools.partial(_void_equal, NECESSARY, 0.0), ("return_to_go", "capo")),
  **{
    f"values {v}": (lambda _, v=v: {"values_BxK": np.full((B, K), v, np.float32)}, ("potential",))
    for v in (np.nan, np.inf, -0.1, 1.5)
  },
}


@pytest.mark.parametrize("baseline", ["leave_one_out", "mean"])
@pytest.mark.parametrize("void", UNUSABLE)
def test_the_other_schemes_are_uniform_without_a_usable_review(void, baseline):
  change, schemes = UNUSABLE[void]
  for scheme in schemes:
    # Failures have nothing to redistribute, whatever is said of them, so every reward is positive
    # here.
    batch = _batch(1, np.random.default_rng(1).integers(1, 9, (P, G)) / 8)
    config = make(scheme=scheme, baseline=baseline)
    tokens = _compute(config, batch, **change(batch))
    assert np.array_equal(tokens, _uniform(config, batch))
    assert not np.array_equal(tokens, _compute(config, batch))


@pytest.mark.parametrize("scheme", ["weighted", "signed"])
def test_a_missing_review_leaves_the_others_of_its_group_alone(scheme):
  batch, config = _batch(3), make(scheme=scheme)
  ok = np.arange(B) % 3 > 0
  tokens = _compute(config, batch, ok_B=ok)
  assert np.array_equal(tokens[ok], _compute(config, batch)[ok])
  assert np.array_equal(tokens[~ok], _uniform(config, batch)[~ok])
  assert not np.array_equal(tokens[ok], _uniform(config, batch)[ok])


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "uniform"])
def test_padding_does_not_matter(scheme):
  batch, config = _batch(4), make(scheme=scheme, discount=0.5)
  beyond = ~_mask(batch)
  ids = np.where(beyond, K - 1, np.minimum(batch["review"].step_ids_BxT, K - 2))
  weights, values = (
    getattr(batch["review"], name).copy() for name in ("weights_BxK", "values_BxK")
  )
  plain = _compute(config, batch, step_ids_BxT=ids)
  # That step has no token within the length, so what is said of it voids nothing and is not heard.
  weights[:, K - 1], values[:, K - 1] = np.nan, 1.0
  assert np.array_equal(
    plain, _compute(config, batch, step_ids_BxT=ids, weights_BxK=weights, values_BxK=values)
  )
  assert not np.array_equal(plain, _uniform(config, batch))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_is_deaf_to_what_it_does_not_read(scheme):
  batch, config = _batch(5), make(scheme=scheme, discount=0.5)
  insane = np.resize(np.array(INSANE, np.float32), (B, K))
  other = _batch(6)["review"]
  if scheme == "potential":
    said = {"roles_BxK": other.roles_BxK, "weights_BxK": insane}
  else:
    said = {"values_BxK": insane}
  assert np.array_equal(_compute(config, batch, **said), _compute(config, batch))


def test_what_is_reported_as_unused_is_all_that_is_unused():
  """A key that a scheme does not report changes its credit; one
  that it reports does not change it."""
  table = RoleTable(inherits=1.0, redundant=0.3)
  changes = {"divide_by_std": True, "conserve": "completion", "lam": 0.1, "beta": 0.1, "cap": 1.25}
  changes |= {"discount": 0.5, "log_epsilon": 0.1, "penalty": 0.1, "credit": table, "blame": table}
  changes |= {"blame_truncated": table}
  known = {field.name for kind in SCHEMES.values() for field in dataclasses.fields(kind)}
  # These decide what is learnt, in test_calibrated.py and test_guard.py.
  assert {"scheme", "baseline", "keep", "doubt", "guard", *changes} == known
  batch = _batch(9, np.tile([1.0, 0.0, 1.0, 0.0], (P, 1)))
  batch["truncated"][:] = np.arange(B) % 4 == 3
  batch["lengths"][:] = T - 2
  batch["review"].roles_BxK[:] = np.arange(K)
  for scheme in SCHEMES:
    # What caps can bite on. Outside jit, because there are many configs.
    config = make(scheme=scheme, lam=1.0, beta=3.0)
    plain, unused = advantages_of(config, *batch.values()), config.unused()
    own = {field.name for field in dataclasses.fields(config)}
    for key, value in ((key, value) for key, value in changes.items() if key in own):
      tokens = advantages_of(dataclasses.replace(config, **{key: value}), *batch.values())
      same = np.array_equal(tokens, plain)
      # The mass of capo and the fallbacks have a shape too, which these schemes do not support.
      if key not in ("divide_by_std", "conserve") or key not in unused:
        assert same == (key in unused), (scheme, key)


# Invariances.


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.scheme}-{c.conserve}-cap {c.cap}")
def test_permuting_a_group_permutes_its_tokens(config):
  rng = np.random.default_rng(5)
  batch = _batch(5, rng.integers(0, 9, (P, G)) / 8)
  order = np.concatenate([rng.permutation(G) + G * p for p in range(P)])
  moved = {
    "rewards": batch["rewards"].reshape(-1)[order].reshape(P, G),
    "lengths": batch["lengths"][order],
    "truncated": batch["truncated"][order],
    "review": ReviewArrays(*(x[order] for x in batch["review"])),
  }
  assert np.array_equal(_compute(config, moved), _compute(config, batch)[order])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.scheme}-{c.conserve}-cap {c.cap}")
def test_cutting_steps_in_two_changes_nothing(config):
  batch = _batch(6)
  rng = np.random.default_rng(6)
  whole = np.minimum(batch["review"].step_ids_BxT // 2, K // 2 - 1)
  roles = rng.integers(0, 6, (B, K // 2))
  weights = rng.random((B, K // 2), np.float32)
  halves = whole * 2 + (np.arange(T) % 2)  # Which token goes to which half does not matter either.
  padded = {"roles_BxK": np.tile(roles, 2), "weights_BxK": np.tile(weights, 2)}
  doubled = {"roles_BxK": roles.repeat(2, 1), "weights_BxK": weights.repeat(2, 1)}
  one = _compute(config, batch, step_ids_BxT=whole, **padded)
  two = _compute(config, batch, step_ids_BxT=halves, **doubled)
  assert np.array_equal(one, two)
  assert not np.array_equal(one, _uniform(config, batch))


def _with_and_without_a_tail(config):
  """Wins whose steps earn, and the same ones with six tokens more that earn nothing."""
  batch = _batch(7, np.tile([1.0, 0.0, 1.0, 0.0], (P, 1)))
  batch["lengths"] = np.full(B, 15, np.int32)
  ids = np.minimum(np.arange(T) // 3, K - 1)[None].repeat(B, 0)
  roles = np.array([NECESSARY, REPAIR, NECESSARY, INHERITS, NECESSARY, REDUNDANT])[None].repeat(
    B, 0
  )
  weights = np.array([1.0, 0.5, 0.25, 1.0, 1.0, 1.0], np.float32)[None].repeat(B, 0)
  changes = {"step_ids_BxT": ids, "roles_BxK": roles, "weights_BxK": weights}
  longer = batch["lengths"].copy()
  longer[0] += 6
  return _compute(config, batch, **changes), _compute(config, batch, **changes, lengths=longer)


def test_tokens_without_credit_do_not_pump_up_the_others():
  config = make(scheme="weighted", conserve="completion", lam=1.0, cap=1000.0)
  short, long = _with_and_without_a_tail(config)
  np.testing.assert_allclose(long[0, :15], short[0, :15], rtol=1e-5)
  assert not long[0, 15:].any()
  assert np.array_equal(long[1:], short[1:])
  # They do when a completion's mass is its length.
  short, long = _with_and_without_a_tail(dataclasses.replace(config, conserve="tokens"))
  np.testing.assert_allclose(long[0, :15], short[0, :15] * 21 / 15, rtol=1e-5)


@pytest.mark.parametrize("conserve", ["tokens", "completion"])
@pytest.mark.parametrize("rewards", [0.0, 0.1, 1.0])
def test_groups_without_variance(rewards, conserve):
  batch = _batch(8, np.full((P, G), rewards))
  assert not _compute(make(conserve=conserve), batch).any()
  assert not _compute(make(scheme="weighted", conserve=conserve), batch).any()
  tokens = _compute(make(scheme="signed", conserve=conserve), batch).astype(float)
  assert tokens.any()
  assert (np.abs(tokens.sum(1)) <= 1e-6 * np.abs(tokens).sum(1)).all()


# Which table is read.


def _wins(batch):
  return _plain_group_advantages(batch["rewards"], "mean").reshape(-1) > 0


def test_credit_is_for_wins_and_blame_for_losses():
  batch = _batch(9, np.tile([1.0, 0.0, 1.0, 0.0], (P, 1)))
  batch["truncated"][:] = np.arange(B) % 4 >= 2
  config, wins, truncated = make(scheme="weighted"), _wins(batch), batch["truncated"]
  plain = _compute(config, batch)
  for key, read in (
    ("credit", wins),
    ("blame", ~wins & ~truncated),
    ("blame_truncated", ~wins & truncated),
  ):
    changed = _compute(
      dataclasses.replace(config, **{key: RoleTable(inherits=1.0, redundant=0.3)}), batch
    )
    assert np.array_equal(changed[~read], plain[~read])
    assert (changed[read] != plain[read]).any(1).all()


def test_who_earns_and_who_pays():
  batch = _batch(10, np.tile([1.0, 0.0, 1.0, 0.0], (P, 1)))
  batch["truncated"] = np.arange(B) % 4 == 3
  batch["lengths"][:] = T
  ids = np.arange(T)[None].repeat(B, 0) // 4  # Every role has four tokens.
  roles = np.arange(6)[None].repeat(B, 0)
  tokens = _compute(make(scheme="weighted", lam=1.0), batch, step_ids_BxT=ids, roles_BxK=roles)
  per_role = tokens.reshape(B, 6, 4)[:, :, 0]
  for i, payers in ((0, (NECESSARY, REPAIR)), (1, (ERROR,)), (3, (ERROR, REDUNDANT, IRRELEVANT))):
    expected = np.zeros(6)
    expected[list(payers)] = 6 / len(payers) * (2 / 3 if i == 0 else -2 / 3)
    np.testing.assert_allclose(per_role[i], expected, rtol=1e-6)


def test_signed_by_hand():
  batch = _batch(11, np.zeros((P, G)))
  batch["truncated"][:] = False
  batch["lengths"][:] = 12
  ids = np.arange(T)[None].repeat(B, 0) // 4  # Three steps of four tokens: +1, -1 and 0.
  roles = np.array([NECESSARY, ERROR, INHERITS, REPAIR, REPAIR, REPAIR])[None].repeat(B, 0)
  tokens = _compute(make(scheme="signed", beta=0.25), batch, step_ids_BxT=ids, roles_BxK=roles)
  np.testing.assert_allclose(
    tokens, np.repeat([0.25, -0.25, 0, 0, 0, 0], 4)[None].repeat(B, 0), atol=1e-7
  )


def _one_group(rewards, lengths):
  """A batch whose groups are all the same; every token is a step up to the last,
  which takes the rest."""
  batch = _batch(0, np.tile(rewards, (P, 1)))
  batch["lengths"] = np.tile(lengths, P).astype(np.int32)
  batch["truncated"][:] = False
  return batch


def test_return_to_go_by_hand():
  batch = _one_group([1.0, 0.5, 0.0, 0.0], [24, 12, 24, 24])
  # Two steps: of the long completion's 24 tokens the last 12 earn, of the short one's 12 the first
  # 3.
  ids = np.array([np.arange(T) >= 12, np.arange(T) >= 3] * 2 * P).astype(np.int32)
  ids = ids.reshape(P, G, T)[:, [0, 1, 0, 0]].reshape(B, T)
  roles = np.full((B, K), INHERITS)
  roles[0::G, 1], roles[1::G, 0] = NECESSARY, NECESSARY
  tokens = _compute(make(scheme="return_to_go"), batch, step_ids_BxT=ids, roles_BxK=roles)
  long = np.array([1.0] * 12 + [1 - i / 12 for i in range(12)])
  short = np.array([0.5, 1 / 3, 1 / 6] + [0.0] * 9)
  # A third each of the others' at the same share of their length: two tokens of the long are one of
  # the short.
  np.testing.assert_allclose(tokens[0], long - short.repeat(2) / 3, atol=1e-6)
  np.testing.assert_allclose(tokens[1], [*(short - long[::2] / 3), *[0] * 12], atol=1e-6)
  np.testing.assert_allclose(tokens[2], -(long + short.repeat(2)) / 3, atol=1e-6)
  assert np.array_equal(tokens.reshape(P, G, T), np.tile(tokens[:G], (P, 1, 1)))


@pytest.mark.parametrize("length", [48, 49, 50])
def test_return_to_go_is_zero_in_a_group_of_equals(length):
  """The baseline is read at the same place, whatever the length is divided by."""
  ids = np.tile(np.minimum(np.arange(length) // 5, K - 1), (G, 1))
  review = ReviewArrays(
    ids, np.tile(np.arange(K), (G, 1)), *np.ones((2, G, K), np.float32), np.ones(G, bool)
  )
  config = make(scheme="return_to_go")
  tokens = _jitted(
    config, np.ones((1, G), np.float32), np.full(G, length), np.zeros(G, bool), review
  )
  np.testing.assert_allclose(tokens, 0, atol=1e-6)


def test_potential_by_hand():
  batch = _one_group([1.0, 0.0, 0.0, 0.0], [24, 24, 24, 24])
  ids = np.tile(np.minimum(np.arange(T) // 6, 3), (B, 1))
  values = np.tile(
    np.float32([0.25, 0.5, np.nan, 0.125, 0.75, 0.75]), (B, 1)
  )  # Of six steps four are written.
  values[2::G, 0], values[2::G, 3] = -1.0, np.inf
  for discount, won, lost, missing in (
    (1.0, [0.75, 0.5, 0.5, 0.875], [-0.25, -0.5, -0.5, -0.125], [-1 / 3, -0.5, -0.5, -0.5]),
    (0.0, [0.25, 0.0, -0.375, 0.875], [0.25, 0.0, -0.375, -0.125], [1 / 6, 0.0, 0.0, -0.5]),
    (
      0.5,
      [0.265625, 0.03125, 0.0625, 0.875],
      [0.140625, -0.21875, -0.4375, -0.125],
      [5 / 48, -0.125, -0.25, -0.5],
    ),
  ):
    tokens = _compute(
      make(scheme="potential", discount=discount), batch, step_ids_BxT=ids, values_BxK=values
    )
    for row, wanted in enumerate((won, lost, missing)):
      np.testing.assert_allclose(tokens[row], np.repeat(wanted, 6), atol=1e-6)


def test_log_potential_counts_a_doubling_as_much_at_any_height():
  batch = _one_group([1.0, 0.0, 0.0, 0.0], [24, 24, 24, 24])
  ids = np.tile(np.minimum(np.arange(T) // 6, 3), (B, 1))
  # 1 + v / epsilon is 1, 2, 4 and 8, of at most 1 / epsilon + 1 = 1024.
  values = np.tile(np.float32([0, 1, 3, 7, 0, 0]) / 1023, (B, 1))
  config = make(scheme="potential", discount=0.0, log_epsilon=1 / 1023)
  tokens = _compute(config, batch, step_ids_BxT=ids, values_BxK=values)
  np.testing.assert_allclose(tokens[0], np.repeat([0.1, 0.1, 0.1, 0.7], 6), atol=1e-6)
  np.testing.assert_allclose(tokens[1], np.repeat([0.1, 0.1, 0.1, -0.3], 6), atol=1e-6)


def test_capo_by_hand():
  batch = _one_group([1.0, 0.0, 0.0, 0.0], [24, 12, 24, 24])
  batch["truncated"] = np.arange(B) % G == 3
  ids = np.tile((np.arange(T) >= 6).astype(np.int32), (B, 1))
  roles = np.tile([ERROR, NECESSARY, 0, 0, 0, 0], (B, 1))
  roles[3::G, :2] = NECESSARY, REDUNDANT  # Redundancy is to blame where the tokens ran out.
  weights = np.ones((B, K), np.float32)
  weights[2::G, 0] = 0.5
  config = make(scheme="capo", penalty=0.4)
  tokens = _compute(config, batch, step_ids_BxT=ids, roles_BxK=roles, weights_BxK=weights)
  # The mean blame of a token: a quarter, a half, an eighth and three quarters.
  for row, plain, first, rest, others in (
    (0, 1, 1, 0, (0.5 + 0.125 + 0.75) / 3),
    (1, -1 / 3, 1, 0, (0.25 + 0.125 + 0.75) / 3),
    (2, -1 / 3, 0.5, 0, (0.25 + 0.5 + 0.75) / 3),
    (3, -1 / 3, 0, 1, (0.25 + 0.5 + 0.125) / 3),
  ):
    wanted = plain - 0.4 * (np.array([first] * 6 + [rest] * 18) - others)
    np.testing.assert_allclose(
      tokens[row], np.where(np.arange(T) < batch["lengths"][row], wanted, 0), atol=1e-6
    )


def test_lambda_and_cap():
  batch = _batch(12, np.tile([1.0, 0.0, 1.0, 0.0], (P, 1)))
  batch["lengths"][:] = T
  ids = np.minimum(np.arange(T), 1)[None].repeat(B, 0)  # The first token alone is a step.
  roles = np.array([NECESSARY, INHERITS, 0, 0, 0, 0])[None].repeat(B, 0)
  for lam, cap, first, rest in (
    (1.0, 100.0, 24.0, 0.0),
    (0.5, 100.0, 12.5, 0.5),
    (0.0, 100.0, 1.0, 1.0),
    (1.0, 12.0, 12.0, 12 / 23),  # What the cap takes from the one goes to all others.
    (1.0, 1.0, 1.0, 1.0),
  ):
    config = make(scheme="weighted", lam=lam, cap=cap)
    tokens = _compute(config, batch, step_ids_BxT=ids, roles_BxK=roles)
    np.testing.assert_allclose(tokens[0] / (2 / 3), [first] + [rest] * (T - 1), atol=1e-5)


# Under jit.


def test_a_config_is_compiled_once_and_jit_changes_nothing():
  traces = []

  def counted(config, *args):
    traces.append(config)
    return advantages_of(config, *args)

  compiled = jax.jit(counted, static_argnums=0)
  for scheme in SCHEMES:
    for seed in range(3):
      batch = _batch(seed)
      # An equal config, made anew; and a learning run changes none of the shapes.
      out = compiled(make(scheme=scheme), *batch.values())
      eager = advantages_of(make(scheme=scheme), *batch.values())
      np.testing.assert_allclose(out, eager, rtol=1e-5, atol=1e-6)
  assert len(traces) == len(SCHEMES)


def test_config_finds_impossible_values():
  for scheme in SCHEMES:
    assert make(scheme).check() == {}
    bad = {
      "baseline": "none",
      "conserve": "steps",
      "lam": 1.5,
      "beta": -1.0,
      "cap": -1.0,
      "penalty": -0.1,
    }
    own = {field.name for field in dataclasses.fields(SCHEMES[scheme])}
    assert set(make(scheme, **bad).check()) == bad.keys() & own
  with pytest.raises(ConfigError, match=r"credit\.scheme: must be one of .*'both'"):
    build({"credit": {"scheme": "both"}})
  for value in (-0.1, 1.1, float("nan")):
    assert set(make("potential", discount=value, log_epsilon=value).check()) == {
      "discount",
      "log_epsilon",
    }
  for value in (0.0, 1.0):
    assert make("potential", discount=value, log_epsilon=value).check() == {}
    assert make("capo", penalty=value).check() == {}
  assert set(make(scheme="weighted", cap=0.5).check()) == {"cap"}
  assert set(RoleTable(error=-1.0, repair=float("nan"), necessary=1001.0).check()) == {
    "error",
    "repair",
    "necessary",
  }
