"""An update in parts against the whole padded batch: the same gradient, from fewer positions."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh
from policies import ROUNDS, random_params

from dca_jax.learner import Batch, Learner, LearnerConfig, init_state, reference_logprobs, update
from dca_jax.learner.loss import loss_sums
from dca_jax.learner.parts import (
  Part,
  cut,
  in_order,
  part_rows,
  read_prompts,
  take,
  take_prompts,
  widths,
)
from dca_jax.policy import Policy, PolicyConfig, Sampling

VOCAB, P, G, S, T = 20, 4, 4, 5, 104
B = P * G
CONFIG = PolicyConfig(width=16, depth=2, heads=2, kv_heads=1, head_dim=8, mlp=24)
POLICY = Policy(CONFIG, VOCAB)
KEEP = optax.trace(0.0)
LEARNER = Learner(
  POLICY,
  LearnerConfig(loss="ppo", updates_per_batch=2, kl=0.3, entropy=0.2, micro_batches=4),
  Sampling(temperature=0.7),
  KEEP,
)
OFF = jnp.bool_(False)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.lru_cache
def params():
  return jax.jit(lambda key: nn.unbox(POLICY.init_params(key)))(jax.random.key(0))


def batch(lengths, seed=0):
  """Random tokens, of which every third stretch of 8 is given."""
  rng = np.random.default_rng(seed)

  def floats():
    return rng.normal(-3, 0.3, (B, T)).astype(np.float32)

  within = np.arange(T) < np.reshape(lengths, (B, 1))
  return Batch(
    prompts_PxS=rng.integers(VOCAB, size=(P, S)).astype(np.int32),
    prompt_lengths_P=np.array([5, 2, 3, 4], np.int32),
    tokens_BxT=rng.integers(VOCAB, size=(B, T)).astype(np.int32),
    sampled_BxT=within & (np.arange(T) // 8 % 3 != 1),
    trained_B=np.arange(B) != 3,
    logprobs_BxT=floats(),
    reference_BxT=floats(),
    advantages_BxT=floats() + 3,
  )


MIXED = np.random.default_rng(1).permutation([T, 80, *range(1, 50, 4), 0])


@jax.jit
def padded(batch):
  """Gradient, sums and log-probabilities of all positions at once."""

  def loss(params):
    prompts = POLICY.read_prompts(params, batch.prompts_PxS, batch.prompt_lengths_P)
    return loss_sums(LEARNER, params, prompts, batch.rows, OFF)

  return jax.grad(loss, has_aux=True)(params())


@pytest.mark.parametrize("lengths", [MIXED, np.full(B, T), np.full(B, 9)], ids=["mixed", "T", "9"])
def test_the_gradient_is_that_of_the_padded_batch(lengths):
  given = batch(lengths)
  state = init_state(KEEP, jax.tree.map(jnp.copy, params()))
  state, metrics, logps = update(LEARNER, state, given, OFF)
  expected, (sums, expected_logps) = padded(given)
  jax.tree.map(
    lambda got, grad: np.testing.assert_allclose(got, grad / (B * T), rtol=1e-4, atol=1e-7),
    state.opt_state.trace,
    expected,
  )
  assert metrics["learner/tokens"] == sums.tokens == given.rows.trained_RxT.sum()
  assert metrics["learner/policy_loss"] * B * T == pytest.approx(float(sums.policy_loss), rel=1e-5)
  for name in ("entropy", "kl", "ratio"):
    mean = getattr(sums, name) / sums.tokens
    assert metrics[f"learner/{name}"] == pytest.approx(float(mean), rel=1e-5)
  counted = given.rows.trained_RxT
  np.testing.assert_allclose(logps[counted], expected_logps[counted], atol=1e-5)
  others = reference_logprobs(POLICY, LEARNER.sampling, params(), given)
  np.testing.assert_allclose(others[counted], expected_logps[counted], atol=1e-5)


def test_prompts_of_layers_of_several_shapes_are_read_in_chunks_and_taken():
  policy = Policy(ROUNDS, VOCAB)
  params, given = random_params(policy, 0.2), batch(MIXED)
  given = given.prompts_PxS, given.prompt_lengths_P
  whole = jit(lambda params: policy.read_prompts(params, *given))(params)
  chunked = jit(lambda params: read_prompts(policy, params, given, 2))(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), chunked, whole)
  taken = take_prompts(policy, whole, np.array([[3, 0, 3]]))
  assert [x.shape[-4] for x in jax.tree.leaves(taken.cache)] == [3] * 4
  np.testing.assert_array_equal(taken.cache[0].v[:, :, 2], whole.cache[0].v[:, :, 3])
  np.testing.assert_array_equal(taken.lengths_P, whole.lengths_P[np.array([3, 0, 3])])


def test_one_program_serves_all_lengths():
  compiled = update._cache_size()
  for seed, lengths in enumerate([MIXED, np.full(B, T), np.arange(B), np.zeros(B, int)]):
    state = init_state(KEEP, jax.tree.map(jnp.copy, params()))
    state, metrics, _ = update(LEARNER, state, batch(lengths, seed), OFF)
    assert np.isfinite(metrics["learner/grad_norm"])
  assert update._cache_size() <= compiled + 1
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(state.opt_state.trace))


# How a batch is cut.


def lengths_of(lengths, t):
  return jnp.arange(t) < np.reshape(lengths, (-1, 1))


def positions(parts: Part, t: int) -> int:
  return int(np.array([0, *widths(t)])[parts.width].sum()) * parts.rows_DxR[0].size


@pytest.mark.parametrize("shards", [1, 4])
def test_every_row_is_in_one_part_that_holds_it(shards):
  rng = np.random.default_rng(shards)
  lengths = np.minimum(rng.geometric(1 / 64, 60), 256)
  policy = POLICY.clone(mesh=AbstractMesh((shards, 1, 1), ("data", "fsdp", "tensor")))
  parts = cut(policy, 12, lengths_of(lengths, 256), 4)
  assert len(parts.width) >= 4
  by_shard = lengths.reshape(shards, -1)
  for shard, own in enumerate(by_shard):
    rows = np.asarray(parts.rows_DxR[:, shard]).ravel()
    assert sorted(rows[rows < len(own)]) == list(range(len(own)))
    assert (rows[rows >= len(own)] == len(own)).all()
  for rows_DxR, width in zip(parts.rows_DxR, parts.width, strict=True):
    room = [0, *widths(256)][int(width)]
    longest = max(
      own[r] for own, rows in zip(by_shard, rows_DxR, strict=True) for r in rows if r < len(own)
    )
    assert longest <= room
    assert width == 1 or [0, *widths(256)][int(width) - 1] < longest
  x = jnp.arange(60.0)
  taken = jnp.stack([take(POLICY, x, rows) for rows in parts.rows_DxR])
  np.testing.assert_array_equal(in_order(parts, taken, 60), x)


def test_few_positions_are_computed_that_nobody_wrote():
  """Lengths with a mean of 64 of at most 256, where padding would make four positions of one."""
  shares = []
  for seed in range(10):
    lengths = np.minimum(np.random.default_rng(seed).geometric(1 / 64, 256), 256)
    shares.append(positions(cut(POLICY, 32, lengths_of(lengths, 256)), 256) / lengths.sum())
  assert np.mean(shares) < 1.75


def test_equal_rows_are_computed_once_without_gaps():
  for rows, t, n in ((128, 48, 4), (24, 256, 8)):
    parts = cut(POLICY, 8, lengths_of(np.full(rows, t), t), n)
    assert positions(parts, t) == rows * t


def test_nothing_counts_nothing_computed():
  lengths = np.where(np.arange(64) < 16, 200, 0)
  parts = cut(POLICY, 8, lengths_of(lengths, 256))
  assert positions(parts, 256) == 16 * 256


@pytest.mark.parametrize(("rows", "most", "n"), [(8, 64, 1), (8, 8192, 1), (1, 9, 1), (6, 64, 4)])
def test_parts_are_no_larger_than_a_micro_batch(rows, most, n):
  assert 1 <= part_rows(None, rows, most, n) <= -(-rows // n)


def test_parts_are_larger_where_each_gathers_the_parameters():
  alone, spread = (AbstractMesh((1, n, 1), ("data", "fsdp", "tensor")) for n in (1, 8))
  assert part_rows(spread, 64, 256, 1) == 4 * part_rows(alone, 64, 256, 1)
  assert part_rows(spread, 64, 256, 8) == part_rows(alone, 64, 256, 8) == 8
