"""The update against independently written losses, and its invariances."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from policies import random_params

from dca_jax.learner import (
  Batch,
  Learner,
  LearnerConfig,
  Rewrites,
  init_state,
  make_optimizer,
  reference_logprobs,
  update,
)
from dca_jax.learner.loss import expm1_bounded
from dca_jax.learner.update import apply_rounded
from dca_jax.policy import Policy, PolicyConfig, Sampling, split

VOCAB = 20
P, G, S, T = 4, 2, 4, 6
B = P * G
POLICY = Policy(PolicyConfig(width=16, depth=2, heads=2, kv_heads=1, head_dim=8, mlp=24), VOCAB)
LENGTHS = np.array([6, 1, 3, 5, 2, 6, 4, 3], np.int32)
WITHIN = np.arange(T) < LENGTHS[:, None]
# Not 1 anywhere in this file: a temperature that one side forgot would show.
WARM = Sampling(temperature=0.7)

# An optimizer that keeps the gradient in its state, exactly as the update made it, and adds it to
# the parameters.
KEEP = optax.trace(0.0)

PLAIN = LearnerConfig()
PPO = LearnerConfig(loss="ppo", updates_per_batch=2, clip_low=0.2, clip_high=0.3)


def everything(normalizer, micro_batches=1):
  return LearnerConfig(
    loss="ppo",
    updates_per_batch=2,
    clip_high=0.3,
    kl=0.3,
    entropy=0.2,
    normalizer=normalizer,
    micro_batches=micro_batches,
  )


PARAMS = random_params(POLICY, 0.25)
OTHER = jax.tree.map(
  lambda a, b: np.float32(0.9 * a + 0.1 * b), PARAMS, random_params(POLICY, 0.25, 1)
)


def learner_logprobs(params, batch, sampling=WARM):
  everywhere = batch._replace(sampled_BxT=np.ones((B, T), bool), trained_B=np.ones(B, bool))
  return np.array(reference_logprobs(POLICY, sampling, params, everywhere))


@pytest.fixture(scope="module")
def batch():
  """Uneven lengths, one row left out, a policy that has moved since it sampled,
  and a different reference."""
  rng = np.random.default_rng(2)
  completions = rng.integers(VOCAB, size=(B, T)).astype(np.int32)
  batch = Batch(
    prompts_PxS=rng.integers(VOCAB, size=(P, S)).astype(np.int32),
    prompt_lengths_P=np.array([4, 2, 3, 4], np.int32),
    tokens_BxT=completions,
    sampled_BxT=WITHIN,
    trained_B=np.arange(B) != 3,
    advantages_BxT=rng.normal(size=(B, T)).astype(np.float32),
    logprobs_BxT=np.zeros((B, T), np.float32),
    reference_BxT=np.zeros((B, T), np.float32),
  )
  now = learner_logprobs(PARAMS, batch)
  moved = rng.normal(scale=0.3, size=(B, T)).astype(np.float32)
  return batch._replace(logprobs_BxT=now + moved, reference_BxT=learner_logprobs(OTHER, batch))


def run(config, batch, *, params=PARAMS, on_policy=True, sampling=WARM, optimizer=KEEP):
  """One update from `params`, which are copied because the update gives their memory away."""
  state = init_state(optimizer, jax.tree.map(jnp.array, params))
  return update(Learner(POLICY, config, sampling, optimizer), state, batch, jnp.bool_(on_policy))


def gradient(*args, **kwargs):
  state, metrics, _ = run(*args, **kwargs)
  return jax.tree.map(np.asarray, state.opt_state.trace), {
    key: float(x) for key, x in metrics.items()
  }


def flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def assert_same(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def single(value, row, t):
  """Advantages that are zero but in one place."""
  out = np.zeros((B, T), np.float32)
  out[row, t] = value
  return out


# What is in the loss.


@pytest.mark.parametrize("row", [0, 1, 2])  # A full one, an end token alone, a short one.
def test_the_end_token_is_trained_on(batch, row):
  last = LENGTHS[row] - 1
  got, metrics = gradient(PLAIN, batch._replace(advantages_BxT=single(1.0, row, last)))
  assert np.abs(flat(got)).max() > 1e-3
  assert metrics["learner/tokens"] == WITHIN[np.asarray(batch.trained_B)].sum()
  logps = learner_logprobs(PARAMS, batch)
  assert metrics["learner/policy_loss"] == pytest.approx(-logps[row, last] / (B * T), rel=1e-5)


def test_nothing_beyond_the_length_counts(batch):
  beyond = ~WITHIN
  changed = batch._replace(
    tokens_BxT=np.where(beyond, (batch.tokens_BxT + 1) % VOCAB, batch.tokens_BxT),
    advantages_BxT=np.where(beyond, np.float32(1e6), batch.advantages_BxT),
    logprobs_BxT=np.where(beyond, np.float32(-1e6), batch.logprobs_BxT),
    reference_BxT=np.where(beyond, np.float32(1e6), batch.reference_BxT),
  )
  for config in (PLAIN, everything("tokens")):
    kept, metrics = gradient(config, batch, on_policy=False)
    got, other = gradient(config, changed, on_policy=False)
    jax.tree.map(np.testing.assert_array_equal, got, kept)
    assert other == metrics


def test_rows_left_out_change_nothing(batch):
  out = ~batch.trained_B
  rng = np.random.default_rng(3)
  changed = batch._replace(
    tokens_BxT=np.where(out[:, None], (batch.tokens_BxT + 1) % VOCAB, batch.tokens_BxT),
    sampled_BxT=np.where(out[:, None], np.arange(T) < 1, batch.sampled_BxT),
    **{
      name: np.where(out[:, None], rng.normal(size=(B, T)).astype(np.float32), getattr(batch, name))
      for name in ("advantages_BxT", "logprobs_BxT", "reference_BxT")
    },
  )
  for config in (PLAIN, everything("constant")):
    kept, metrics = gradient(config, batch, on_policy=False)
    got, other = gradient(config, changed, on_policy=False)
    jax.tree.map(np.testing.assert_array_equal, got, kept)
    assert other == metrics


def test_a_row_let_in_does_change_the_gradient(batch):
  kept, _ = gradient(PLAIN, batch)
  got, _ = gradient(PLAIN, batch._replace(trained_B=np.ones(B, bool)))
  assert np.abs(flat(got) - flat(kept)).max() > 1e-3


@pytest.mark.parametrize("normalizer", ["constant", "tokens"])
def test_an_empty_batch_has_no_gradient(batch, normalizer):
  empty = batch._replace(trained_B=np.zeros(B, bool))
  got, metrics = gradient(everything(normalizer), empty, on_policy=False)
  assert not flat(got).any()
  assert np.isfinite(list(metrics.values())).all()
  assert metrics["learner/tokens"] == 0


# Against plain versions.


def plain_grpo_loss(params, batch):
  """GRPO with the constant normaliser, each prompt and completion one sequence,
  written without the program's parts."""
  tokens, at = np.zeros((B, S + T), np.int32), np.zeros((B, T), np.int32)
  for row in range(B):
    start = batch.prompt_lengths_P[row // G]
    tokens[row, :start] = batch.prompts_PxS[row // G, :start]
    tokens[row, start : start + T] = batch.tokens_BxT[row]
    at[row] = np.arange(start - 1, start - 1 + T)  # Where each completion token is predicted.
  hidden, _ = POLICY.apply({"params": params}, tokens)
  logps = jax.nn.log_softmax(hidden @ params["embedding"].T / 0.7)[
    np.arange(B)[:, None], at, batch.tokens_BxT
  ]
  mask = batch.sampled_BxT & np.asarray(batch.trained_B)[:, None]
  return -jnp.where(mask, logps * batch.advantages_BxT, 0).sum() / (B * T)


def test_uniform_advantages_give_the_gradient_of_grpo(batch):
  uniform = batch._replace(advantages_BxT=np.repeat(batch.advantages_BxT[:, :1], T, 1))
  loss, expected = jax.jit(jax.value_and_grad(lambda params: plain_grpo_loss(params, uniform)))(
    PARAMS
  )
  got, metrics = gradient(PLAIN, uniform)
  assert np.abs(flat(expected)).max() > 0.01
  assert_same(got, expected, rtol=1e-5, atol=1e-6)
  assert metrics["learner/policy_loss"] == pytest.approx(float(loss), rel=1e-5)
  assert metrics["learner/grad_norm"] == pytest.approx(np.linalg.norm(flat(expected)), rel=1e-5)


def test_rewrites_add_their_likelihood_and_nothing_else(batch):
  """The gradient of -sum(w log p) / (B T), each row a completion of its prompt; every sum over the
  episodes is as it would be without them."""
  rng = np.random.default_rng(4)
  tokens = rng.integers(VOCAB, size=(P, T)).astype(np.int32)
  weights = rng.uniform(0.1, 2.0, size=(P, T)).astype(np.float32) * (rng.random((P, T)) < 0.5)
  weights[2] = 0.0  # Nobody filled this row.
  alone = batch._replace(
    tokens_BxT=np.repeat(tokens, G, 0),
    sampled_BxT=np.repeat(weights > 0, G, 0),
    trained_B=np.arange(B) % G == 0,
    advantages_BxT=np.repeat(weights, G, 0),
  )
  expected, _ = gradient(PLAIN, alone)  # Of which the test above says what it is.
  config = everything("constant")
  kept, metrics = gradient(config, batch, on_policy=False)
  got, other = gradient(config, batch._replace(rewrites=Rewrites(tokens, weights)), on_policy=False)
  assert_same(jax.tree.map(np.subtract, got, kept), expected, rtol=1e-4, atol=1e-5)
  assert np.abs(flat(expected)).max() > 0.01
  del other["learner/grad_norm"], metrics["learner/grad_norm"]
  assert other == pytest.approx(metrics, rel=1e-4)
  # Where no row is filled, the gradient is the same.
  none = batch._replace(rewrites=Rewrites(tokens, 0 * weights))
  assert_same(gradient(config, none, on_policy=False)[0], kept, rtol=1e-5, atol=1e-7)


def test_sums_against_numpy(batch):
  config = everything("tokens")
  _, metrics = gradient(config, batch, on_policy=False)
  mask = WITHIN & batch.trained_B[:, None]
  logps = learner_logprobs(PARAMS, batch).astype(np.float64)
  ratio = np.exp(logps - batch.logprobs_BxT)
  clipped = np.clip(ratio, 0.8, 1.3)
  a = batch.advantages_BxT
  objective = np.minimum(ratio * a, clipped * a)
  gap = batch.reference_BxT - logps
  acts = ((ratio > 1.3) & (a > 0)) | ((ratio < 0.8) & (a < 0))
  assert acts[mask].any()
  for key, value in {
    "policy_loss": -objective,
    "kl": np.exp(gap) - 1 - gap,
    "clip_fraction": acts,
    "ratio": ratio,
  }.items():
    assert metrics[f"learner/{key}"] == pytest.approx(value[mask].mean(), rel=1e-4), key


# So many that a part is a single row, and three, which divide neither prompts nor groups.
@pytest.mark.parametrize(("normalizer", "micro_batches"), [("constant", B), ("tokens", 3)])
def test_micro_batches_change_nothing(batch, normalizer, micro_batches):
  whole, metrics, logps = run(everything(normalizer), batch, on_policy=False)
  np.testing.assert_allclose(logps, learner_logprobs(PARAMS, batch), rtol=1e-5, atol=1e-5)
  got, others, parts = run(everything(normalizer, micro_batches), batch, on_policy=False)
  assert_same(got, whole, rtol=1e-5, atol=1e-6)
  assert_same(others, metrics, rtol=1e-5, atol=1e-6)
  rows = np.flatnonzero(batch.trained_B)  # In their order; a part where nothing counts is left out.
  np.testing.assert_allclose(parts[rows], logps[rows], rtol=1e-5, atol=1e-5)


# The importance ratio.


def test_ratio_is_1_at_the_first_update_and_not_at_the_second(batch):
  state, metrics, logps = run(PPO, batch)
  assert metrics["learner/ratio"] == 1.0
  assert metrics["learner/clip_fraction"] == 0.0
  np.testing.assert_allclose(logps, learner_logprobs(PARAMS, batch), rtol=1e-5, atol=1e-5)
  again = batch._replace(logprobs_BxT=logps)
  _, metrics, _ = run(PPO, again, params=jax.tree.map(np.asarray, state.params), on_policy=False)
  assert abs(metrics["learner/ratio"] - 1.0) > 1e-3


def test_first_update_is_reinforce(batch):
  ppo, _ = gradient(PPO, batch)
  reinforce, _ = gradient(PLAIN, batch)
  assert_same(ppo, reinforce, rtol=1e-5, atol=1e-6)


def test_error_of_the_sampler_is_measured(batch):
  logps = learner_logprobs(PARAMS, batch)
  wrong = np.where(WITHIN, logps, 9.0).astype(np.float32)
  wrong[2, 1] += 0.25
  wrong[3] += 5.0  # Left out.
  _, metrics = gradient(PPO, batch._replace(logprobs_BxT=wrong))
  assert metrics["sampler/logprob_error"] == pytest.approx(0.25, abs=1e-4)


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9, 1.1, 1.25, 1.5])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_clipping_acts_on_its_own_side(batch, ratio, advantage):
  # Between 1.2 and 1.3 only the upper bound's own size tells; at 0.75 only the lower's.
  row, t = 2, 1
  base, _ = gradient(PPO, batch._replace(advantages_BxT=single(1.0, row, t)))
  old = learner_logprobs(PARAMS, batch)
  old[row, t] -= np.log(ratio)
  doctored = batch._replace(advantages_BxT=single(advantage, row, t), logprobs_BxT=old)
  got, metrics = gradient(PPO, doctored, on_policy=False)
  clipped = ratio > 1.3 if advantage > 0 else ratio < 0.8
  if clipped:
    assert not flat(got).any()
  else:
    assert_same(got, jax.tree.map(lambda g: ratio * advantage * g, base), rtol=1e-4, atol=1e-6)
  tokens = metrics["learner/tokens"]
  assert metrics["learner/clip_fraction"] * tokens == pytest.approx(float(clipped), abs=1e-5)


def test_update_is_finite_where_the_sampler_cuts_tokens(batch):
  got, metrics = gradient(PLAIN, batch, sampling=Sampling(top_k=5))
  assert np.isfinite(flat(got)).all()
  assert np.isfinite(list(metrics.values())).all()


# KL and entropy.

BOTH = LearnerConfig(kl=1.0, entropy=1.0)


def pull_and_bonus(batch, params):
  """The gradients of the KL term and of the entropy bonus, each alone, and the metrics.

  Against itself as the reference the policy has no KL gradient, so one program tells the two apart.
  """
  silent = batch._replace(advantages_BxT=np.zeros((B, T), np.float32))
  both, metrics = gradient(BOTH, silent, params=params)
  bonus, alike = gradient(
    BOTH, silent._replace(reference_BxT=learner_logprobs(params, batch)), params=params
  )
  assert alike["learner/kl"] == pytest.approx(0.0, abs=1e-10)
  return jax.tree.map(np.subtract, both, bonus), bonus, metrics


def descend(batch, which, *, rate, steps):
  """Plain gradient descent on one of the two terms; the metrics before each step."""
  params, history = PARAMS, []
  for _ in range(steps):
    *terms, metrics = pull_and_bonus(batch, params)
    history.append(metrics)
    params = jax.tree.map(lambda p, g: p - rate * g, params, terms[which])
  return history


def test_kl_of_every_row_is_positive(batch):
  for row in range(B):
    _, metrics = gradient(BOTH, batch._replace(trained_B=np.arange(B) == row))
    assert metrics["learner/kl"] > 1e-6


def test_kl_gradient_is_1_minus_the_ratio_of_the_reference(batch):
  # As advantages, these give the gradient of the mean of exp(gap) - 1 - gap.
  gap = batch.reference_BxT - learner_logprobs(PARAMS, batch)
  expected, _ = gradient(PLAIN, batch._replace(advantages_BxT=np.expm1(gap)))
  pull, _, _ = pull_and_bonus(batch, PARAMS)
  assert np.abs(flat(expected)).max() > 1e-3
  assert_same(pull, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  "config", [PLAIN, LearnerConfig(kl=0.05), PPO], ids=["measured", "weighted", "ppo"]
)
def test_a_token_far_from_the_other_policy_leaves_the_update_finite(batch, config):
  """e^90 is more than float32 holds: under the reference policy, and under the one that sampled."""
  now = learner_logprobs(PARAMS, batch)
  for far in (90.0, -90.0, 1e4):
    moved = now + single(far, 0, 0)
    away = batch._replace(logprobs_BxT=now - single(far, 0, 0), reference_BxT=moved)
    got, metrics = gradient(config, away, on_policy=False)
    assert np.isfinite(flat(got)).all()
    assert np.isfinite(list(metrics.values())).all()
    assert metrics["learner/kl"] > 1
  if config is PLAIN:
    near, _ = gradient(config, batch)
    jax.tree.map(np.testing.assert_array_equal, got, near)


def test_beyond_e10_the_estimate_is_a_straight_line():
  x = np.float32([-90, -1, 0, 1e-4, 9.9, 10, 11, 100])
  slope, value = jax.vmap(jax.grad(expm1_bounded))(x), expm1_bounded(x)
  near = np.minimum(np.float64(x), 10)
  np.testing.assert_allclose(slope, np.exp(near), rtol=1e-5, atol=1e-30)
  np.testing.assert_allclose(value, np.expm1(near) + np.exp(near) * (x - near), rtol=1e-5)


def test_kl_pulls_towards_the_reference(batch):
  kl = [metrics["learner/kl"] for metrics in descend(batch, 0, rate=0.03, steps=5)]
  assert all(after < before for before, after in itertools.pairwise(kl))


def test_entropy_bonus_raises_entropy(batch):
  entropy = [metrics["learner/entropy"] for metrics in descend(batch, 1, rate=0.03, steps=4)]
  assert all(after > before for before, after in itertools.pairwise(entropy))


# The compiled program.


def test_compiles_once_and_gives_the_old_state_away(batch):
  run(PLAIN, batch)
  compiled = update._cache_size()
  state = init_state(KEEP, jax.tree.map(jnp.array, PARAMS))
  for i in range(3):
    old, changed = (
      state,
      batch._replace(sampled_BxT=np.roll(WITHIN, i, 0), trained_B=np.arange(B) != i),
    )
    # Equal settings made anew are the same settings.
    learner = Learner(POLICY, LearnerConfig(), Sampling(temperature=0.7), KEEP)
    state, _, _ = update(learner, state, changed, jnp.bool_(i == 0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
  assert update._cache_size() == compiled


# The optimizer.


def run_optimizer(config, steps, gradients, start=0.0):
  """The change at every update of parameters that begin at `start`."""
  optimizer = make_optimizer(config, steps)

  def one(carry, grad):
    params, state = carry
    changes, state = optimizer.update(grad, state, params)
    return (params + changes, state), changes

  params = jnp.full(np.shape(gradients)[1:], start)
  return np.asarray(
    jax.jit(functools.partial(jax.lax.scan, one))((params, optimizer.init(params)), gradients)[1]
  )


@pytest.mark.parametrize(
  ("changes", "steps", "expected"),
  [
    ({}, 3, [1, 1, 1, 1]),
    ({"warmup_updates": 1}, 3, [1 / 2, 1, 1]),
    ({"warmup_updates": 4}, 8, [0.2, 0.4, 0.6, 0.8, 1, 1]),
    ({"schedule": "linear"}, 4, [1, 0.75, 0.5, 0.25, 0]),
    ({"schedule": "cosine"}, 4, [1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5, 0]),
    ({"schedule": "linear", "warmup_updates": 2}, 6, [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25, 0]),
    # Counted in updates, of which a batch has two.
    ({"schedule": "linear", "loss": "ppo", "updates_per_batch": 2}, 2, [1, 0.75, 0.5, 0.25, 0]),
  ],
  ids=str,
)
def test_learning_rates(changes, steps, expected):
  # Under a constant gradient of 1 Adam moves by the learning rate.
  got = run_optimizer(
    LearnerConfig(lr=0.01, **changes), steps, np.ones((len(expected), 1), np.float32)
  )
  np.testing.assert_allclose(got[:, 0], -0.01 * np.array(expected), rtol=1e-4, atol=1e-8)


def test_gradients_are_clipped_to_their_norm():
  # Norms 0.5, 5 and 50: only the latter two are clipped, to norm 1.
  grads = np.float32([[0.3, 0.4], [3, 4], [30, 40]])
  clipped = np.float32([[0.3, 0.4], [0.6, 0.8], [0.6, 0.8]])
  got = run_optimizer(LearnerConfig(max_grad_norm=1.0), 3, grads)
  np.testing.assert_allclose(got, run_optimizer(LearnerConfig(), 3, clipped), rtol=1e-5)
  assert np.abs(got - run_optimizer(LearnerConfig(), 3, grads)).max() > 1e-4


def test_equal_settings_give_the_same_optimizer():
  # The update is compiled for an optimizer object, so a new one each time would compile it again.
  assert make_optimizer(LearnerConfig(lr=0.5), 10) is make_optimizer(LearnerConfig(lr=0.5), 10)
  assert make_optimizer(LearnerConfig(lr=0.5), 10) is not make_optimizer(LearnerConfig(lr=0.4), 10)


def test_adam_does_not_move_without_a_gradient():
  np.testing.assert_array_equal(
    run_optimizer(LearnerConfig(), 3, np.zeros((3, 1), np.float32), start=2.0), 0.0
  )


def test_weight_decay_is_decoupled():
  got = run_optimizer(
    LearnerConfig(lr=0.01, weight_decay=0.1), 1, np.zeros((1, 1), np.float32), start=2.0
  )
  np.testing.assert_allclose(got, -0.01 * 0.1 * 2.0, rtol=1e-5)


@pytest.mark.parametrize(("rank", "kept"), [(0, {"scale", "bias", "layer_scale"}), (4, set())])
def test_norms_and_biases_do_not_decay(rank, kept):
  small = PolicyConfig(
    pretrained="x",
    width=8,
    depth=1,
    head_dim=8,
    mlp=8,
    qkv_bias=True,
    qk_norm=True,
    layer_scale=True,
    lora_rank=rank,
  )
  shapes = split(nn.unbox(jax.eval_shape(Policy(small, VOCAB).init_params, jax.random.key(0))))[1]
  params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
  optimizer = make_optimizer(LearnerConfig(weight_decay=0.1), 10)
  changes, _ = optimizer.update(jax.tree.map(np.zeros_like, params), optimizer.init(params), params)
  moved = {path[-1].key: set(np.sign(x).flat) for path, x in jax.tree.leaves_with_path(changes)}
  assert {name for name, signs in moved.items() if signs == {0}} == kept
  assert {name for name, signs in moved.items() if signs == {-1}} == moved.keys() - kept


def test_bfloat16_weights_move_by_changes_too_small_to_show():
  # A hundredth of the distance between neighbours at 1; rounding to the nearest would never move.
  ones, small = {"a": jnp.ones(20_000, jnp.bfloat16)}, {"a": jnp.full(20_000, 2.0**-7 / 100)}
  moved = apply_rounded(ones, small, jnp.int32(1))["a"]
  assert moved.dtype == jnp.bfloat16
  assert set(np.unique(moved)) == {1, 1 + 2.0**-7}
  assert 150 < (moved > 1).sum() < 250  # Of 200 on average; 50 are 3.5 standard deviations.
  again, later = (apply_rounded(ones, small, jnp.int32(count))["a"] for count in (1, 2))
  assert (moved == again).all()
  assert (moved != later).any()


def test_bfloat16_weights_follow_float32_ones(batch):
  policy = Policy(dataclasses.replace(POLICY.config, weights="bfloat16"), VOCAB)
  assert {
    str(x.dtype) for x in jax.tree.leaves(jax.eval_shape(policy.init_params, jax.random.key(0)))
  } == {"bfloat16"}
  adam = make_optimizer(LearnerConfig(lr=1e-3), 10)
  moved = []
  for one, dtype in ((POLICY, "float32"), (policy, "bfloat16")):
    state = init_state(adam, jax.tree.map(lambda x, dtype=dtype: jnp.array(x, dtype), PARAMS))
    assert (
      optax.tree_utils.tree_get(state.opt_state, "nu")["final_norm"]["scale"].dtype == jnp.float32
    )
    for _ in range(4):
      state = update(Learner(one, PLAIN, WARM, adam), state, batch, jnp.bool_(True))[0]
    assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {dtype}
    moved.append(
      np.concatenate(
        [
          (np.float32(x) - y).ravel()
          for x, y in zip(*map(jax.tree.leaves, (state.params, PARAMS)), strict=True)
        ]
      )
    )
  assert np.corrcoef(*moved)[0, 1] > 0.8
