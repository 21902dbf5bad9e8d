"""The transformer against plain rewritings of it: one sequence, naive attention,
repeated prompts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from policies import ROUNDS, random_params, token_by_token

from dca_jax.policy import Policy, PolicyConfig, Sampling, token_logprobs
from dca_jax.policy.attention import KeyValue, attend
from dca_jax.policy.layers import rotate, rotations

VOCAB = 20
GROUP = 3
# With norms of queries and keys, which are off by default; the sampler's and the learner's tests
# run without.
TINY = PolicyConfig(width=16, depth=2, heads=4, kv_heads=2, head_dim=4, mlp=24, qk_norm=True)
LENGTHS = np.array([3, 5])


@pytest.fixture(scope="module")
def policy():
  return Policy(TINY, VOCAB)


@pytest.fixture(scope="module")
def params(policy):
  return jax.tree.map(jnp.float32, random_params(policy, 0.3))


@pytest.fixture(scope="module")
def apply_fn(policy):
  return jax.jit(
    lambda params, tokens, start=None: policy.apply({"params": params}, tokens, start)[0]
  )


def normal(seed, *shape):
  return jnp.float32(np.random.default_rng(seed).normal(size=shape))


@pytest.fixture(scope="module")
def hidden_fn(policy):
  return jax.jit(policy.completion_hidden)


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(0)
  prompts = rng.integers(VOCAB, size=(2, 6))
  completions = rng.integers(VOCAB, size=(2 * GROUP, 7))
  return jnp.array(prompts), jnp.array(LENGTHS), jnp.array(completions)


def plain_hidden(apply_fn, params, batch):
  """What `completion_hidden` must equal: each prompt without its padding,
  and its completions, as one sequence."""
  prompts, lengths, completions = batch
  rows = []
  for p, length in enumerate(np.asarray(lengths)):
    own = completions[p * GROUP : (p + 1) * GROUP, :-1]
    prompt = jnp.repeat(prompts[p : p + 1, :length], GROUP, 0)
    rows.append(apply_fn(params, jnp.concatenate([prompt, own], 1))[:, length - 1 :])
  return jnp.concatenate(rows)


def test_no_gradient_from_a_later_token(apply_fn, params):
  tokens = jnp.arange(8)[
    None
  ]  # All different, so that row u of the embedding is token u and nothing else.
  direction = normal(1, TINY.width)

  def outputs(embedding):
    return (apply_fn(params | {"embedding": embedding}, tokens) @ direction)[0]

  reads_TxU = np.abs(jax.jit(jax.jacrev(outputs))(params["embedding"])).sum(-1)[:, :8]
  assert np.all(reads_TxU[np.triu_indices(8, 1)] == 0)
  assert np.all(reads_TxU[np.tril_indices(8)] > 0)


def test_completion_reads_its_prompt_and_its_own_past_only(policy, params):
  prompts, lengths = jnp.array([[0, 1, 2, 3, 19]]), jnp.array([4])  # Token 19 is padding.
  completions = jnp.arange(4, 14).reshape(2, 5)
  direction = normal(1, TINY.width)

  def outputs(embedding):
    changed = params | {"embedding": embedding}
    return policy.completion_hidden(changed, prompts, lengths, completions) @ direction

  reads_GxTxV = np.abs(jax.jit(jax.jacrev(outputs))(params["embedding"])).sum(-1)
  for g, tokens in enumerate(np.asarray(completions)):
    for t in range(5):
      expected = {0, 1, 2, 3, *tokens[:t].tolist()}
      assert set(np.flatnonzero(reads_GxTxV[g, t]).tolist()) == expected


def test_shared_prompt_equals_one_plain_sequence(apply_fn, params, hidden_fn, batch):
  np.testing.assert_allclose(
    hidden_fn(params, *batch), plain_hidden(apply_fn, params, batch), rtol=0, atol=1e-5
  )


def test_prompt_padding_does_not_leak(params, hidden_fn, batch):
  prompts, lengths, completions = batch
  padding = jnp.arange(prompts.shape[1]) >= lengths[:, None]
  other = jnp.where(padding, (prompts + 7) % VOCAB, prompts)
  np.testing.assert_array_equal(
    hidden_fn(params, other, lengths, completions), hidden_fn(params, *batch)
  )


def test_decoder_equals_completion_hidden(policy, params, hidden_fn, batch):
  decode = jax.jit(lambda *given: token_by_token(policy, *given))
  np.testing.assert_allclose(decode(params, *batch), hidden_fn(params, *batch), rtol=0, atol=1e-5)


def test_gradient_of_a_shared_prompt_equals_that_of_repeated_prompts(policy, params, batch):
  prompts, lengths, completions = batch
  weights = normal(2, *completions.shape)

  def loss(params, prompts, lengths):
    hidden = policy.completion_hidden(params, prompts, lengths, completions)
    return (token_logprobs(hidden, policy.head(params), completions, Sampling())[0] * weights).sum()

  gradient = jax.jit(jax.grad(loss))
  shared = gradient(params, prompts, lengths)
  repeated = gradient(params, jnp.repeat(prompts, GROUP, 0), jnp.repeat(lengths, GROUP))
  assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(shared))
  for a, b in zip(jax.tree.leaves(shared), jax.tree.leaves(repeated), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_queries_against_naive_attention(kv_heads):
  p, g, t, n, h, s = 2, 3, 4, 4, 6, 5
  q = normal(3, p * g, t, n, h)
  own = KeyValue(normal(4, p * g, kv_heads, h, t), normal(14, p * g, kv_heads, t, h))
  prompt = KeyValue(normal(5, p, kv_heads, h, s), normal(15, p, kv_heads, s, h))
  own_mask = np.tril(np.ones((t, t), bool))
  lengths = np.array([5, 2])
  prompt_mask = np.arange(s) < lengths[:, None]

  expected = np.zeros(q.shape)
  for row, i, head in np.ndindex(p * g, t, n):
    kv, length = head // (n // kv_heads), lengths[row // g]  # Neighbouring heads share a key.
    k = np.concatenate([prompt.k[row // g, kv].T[:length], own.k[row, kv].T[: i + 1]])
    v = np.concatenate([prompt.v[row // g, kv, :length], own.v[row, kv, : i + 1]])
    expected[row, i, head] = scipy.special.softmax(k @ np.asarray(q[row, i, head]) / h**0.5) @ v

  np.testing.assert_allclose(
    jax.jit(attend)(q, own, own_mask, prompt, prompt_mask[:, None]), expected, rtol=1e-5, atol=1e-5
  )
  # A prompt that is all padding is no prompt.
  alone = jax.jit(attend)(q, own, own_mask, None, None)
  blank = jax.jit(attend)(q, own, own_mask, prompt, np.zeros_like(prompt_mask)[:, None])
  np.testing.assert_allclose(blank, alone, rtol=1e-5, atol=1e-5)


def test_every_parameter_has_logical_axes(policy):
  boxed = jax.eval_shape(policy.init_params, jax.random.key(0))
  known = {"layers", "embed", "heads", "kv_heads", "head_dim", "mlp", "vocab"}
  specs = nn.get_partition_spec(boxed)
  for (path, spec), leaf in zip(
    jax.tree.leaves_with_path(specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec)),
    jax.tree.leaves(nn.unbox(boxed)),
    strict=True,
  ):
    name = jax.tree_util.keystr(path)
    assert len(spec) == leaf.ndim, name
    assert set(spec) <= known, name
    assert ("layers" in spec) == ("blocks" in name), name


def test_layers_without_keys_teach_those_that_they_read():
  """And nothing trains the scale of a layer."""
  policy, tokens = Policy(ROUNDS, VOCAB), np.arange(24).reshape(2, 12) % VOCAB
  params = random_params(policy, 0.2)
  for layer in params["blocks"].values():  # What their own layers read counts for nothing.
    layer["o"]["kernel"] *= 0

  def loss(params):
    return (policy.apply({"params": params}, tokens)[0] * np.arange(16)).sum()

  grads = jax.jit(jax.grad(loss), compiler_options={"xla_backend_optimization_level": 0})(params)
  assert all(np.any(layer["k"]["kernel"]) for layer in grads["blocks"].values())
  assert all(layer.keys().isdisjoint("kv") for layer in grads["shared_blocks"].values())
  for layer in (*grads["blocks"].values(), *grads["shared_blocks"].values()):
    assert not np.any(layer["layer_scale"])
    assert np.any(layer["gate"]["kernel"])


def test_default_size():
  params = jax.eval_shape(Policy(PolicyConfig(), 31).init_params, jax.random.key(0))
  assert sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(params))) == pytest.approx(
    150_000, rel=0.01
  )


def test_bfloat16_runs_and_is_finite(params, hidden_fn, batch):
  policy = Policy(PolicyConfig(**{**vars(TINY), "dtype": "bfloat16"}), VOCAB)

  @jax.jit
  def run(params):
    def loss(params):
      hidden = policy.completion_hidden(params, *batch)
      logps, entropy = token_logprobs(hidden, policy.head(params), batch[2], Sampling())
      return logps.sum() + entropy.sum(), (hidden, logps)

    return jax.grad(loss, has_aux=True)(params)

  grads, (hidden, logps) = run(params)
  assert hidden.dtype == jnp.bfloat16
  assert logps.dtype == jnp.float32
  assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for g in jax.tree.leaves(grads))
  # Three significant digits, through two layers and a norm.
  np.testing.assert_allclose(
    hidden.astype(jnp.float32), hidden_fn(params, *batch), rtol=0, atol=0.15
  )


def test_rotary_scores_depend_on_relative_position_only():
  q, k = normal(4, 2, TINY.head_dim)

  def score(at_q, at_k):
    rotated = [
      rotate(x[None, None, None], rotations(jnp.array([[i]]), TINY))[0, 0, 0]
      for x, i in ((q, at_q), (k, at_k))
    ]
    return float(rotated[0] @ rotated[1])

  assert score(7, 3) == pytest.approx(score(4, 0), abs=1e-5)
  assert score(107, 103) == pytest.approx(score(4, 0), abs=1e-4)
  assert abs(score(7, 3) - score(3, 3)) > 1e-2
  assert abs(score(7, 3) - score(3, 7)) > 1e-2  # Before and after differ.


def test_hidden_states_do_not_change_when_a_whole_sequence_moves(apply_fn, params, batch):
  tokens = batch[2]
  at_0, at_9 = (apply_fn(params, tokens, np.full(len(tokens), start)) for start in (0, 9))
  np.testing.assert_allclose(at_9, at_0, rtol=0, atol=1e-5)
