"""Log-probabilities of the sampled distribution, against an independent numpy version."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from dca_jax.policy import Head, Sampling, logprobs, sampling_logits, token_logprobs

B, T, D, V = 3, 5, 16, 20
CUTS = [
  Sampling(),
  Sampling(temperature=0.7),
  Sampling(temperature=1.3, top_k=5),
  Sampling(top_p=0.8),
  Sampling(temperature=0.7, top_k=6, top_p=0.7),
  Sampling(top_k=V, top_p=0.5),
  Sampling(top_k=3 * V),
  Sampling(top_p=1e-6),
]


@pytest.fixture(scope="module")
def hidden():
  return jnp.float32(np.random.default_rng(0).normal(size=(B, T, D)))


@pytest.fixture(scope="module")
def embedding():
  return jnp.float32(0.5 * np.random.default_rng(1).normal(size=(V, D)))


def all_logits(hidden, embedding):
  return np.asarray(hidden, np.float64) @ np.asarray(embedding, np.float64).T


def reference_probabilities(logits, sampling):
  """Top-k first, then top-p on what is left, renormalised; in float64, one row at a time."""
  out = np.zeros_like(logits)
  for index in np.ndindex(logits.shape[:-1]):
    scaled = logits[index] / sampling.temperature
    order = np.argsort(-scaled)
    if sampling.top_k:
      order = order[: sampling.top_k]
    p = np.exp(scaled[order] - scaled.max())
    p /= p.sum()
    kept, reached = 0, 0.0
    while kept < len(order) and (kept == 0 or reached < sampling.top_p):
      reached += p[kept]
      kept += 1
    out[(*index, order[:kept])] = p[:kept] / p[:kept].sum()
  return out


cut_logits = jax.jit(sampling_logits, static_argnums=2)


@functools.partial(jax.jit, static_argnums=3)
def compute(hidden, embedding, targets, sampling):
  return token_logprobs(hidden, Head(embedding), targets, sampling)


@functools.partial(jax.jit, static_argnums=3)
def gradients(hidden, embedding, targets, sampling, entropy_weight):
  def total(hidden, embedding):
    logps, entropy = token_logprobs(hidden, Head(embedding), targets, sampling)
    return logps.sum() + entropy_weight * entropy.sum()

  return jax.grad(total, (0, 1))(hidden, embedding)


def test_plain_sampling_is_a_log_softmax(hidden, embedding):
  targets = jnp.array(np.random.default_rng(2).integers(V, size=(B, T)))
  logps = scipy.special.log_softmax(all_logits(hidden, embedding), -1)
  got, entropy = compute(hidden, embedding, targets, Sampling())
  np.testing.assert_allclose(
    got, np.take_along_axis(logps, np.asarray(targets)[..., None], 2)[..., 0], rtol=1e-5, atol=1e-5
  )
  np.testing.assert_allclose(entropy, -(np.exp(logps) * logps).sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampling", CUTS, ids=str)
def test_against_numpy(hidden, embedding, sampling):
  probabilities = reference_probabilities(all_logits(hidden, embedding), sampling)
  kept = probabilities > 0
  assert kept.any(-1).all()

  flat = cut_logits(hidden.reshape(-1, D), Head(embedding), sampling).reshape(B, T, V)
  np.testing.assert_array_equal(np.isfinite(flat), kept)
  np.testing.assert_allclose(scipy.special.softmax(flat, -1), probabilities, rtol=1e-5, atol=1e-6)

  # The likeliest token and the unlikeliest one that is kept.
  for targets in (probabilities.argmax(-1), np.where(kept, probabilities, np.inf).argmin(-1)):
    logps, entropy = compute(hidden, embedding, jnp.array(targets), sampling)
    expected = np.log(np.take_along_axis(probabilities, targets[..., None], -1)[..., 0])
    np.testing.assert_allclose(logps, expected, rtol=1e-5, atol=1e-5)
    plogp = np.where(kept, probabilities * np.log(np.where(kept, probabilities, 1)), 0)
    np.testing.assert_allclose(entropy, -plogp.sum(-1), rtol=1e-5, atol=1e-5)


def test_top_1_is_certain(hidden, embedding):
  targets = (hidden @ embedding.T).argmax(-1)
  logps, entropy = compute(hidden, embedding, targets, Sampling(top_k=1))
  np.testing.assert_array_equal(logps, 0.0)
  np.testing.assert_array_equal(entropy, 0.0)


def test_a_target_that_is_cut_keeps_its_logit(hidden, embedding):
  sampling = Sampling(top_k=4)
  logits = all_logits(hidden, embedding)
  targets = logits.argmin(-1)
  logps, entropy = compute(hidden, embedding, jnp.array(targets), sampling)
  top = -np.sort(-logits, -1)[..., :4]
  low = logits.min(-1)
  total = np.exp(top).sum(-1) + np.exp(low)
  np.testing.assert_allclose(logps, low - np.log(total), rtol=1e-5, atol=1e-5)
  assert np.isfinite(entropy).all()


@pytest.mark.parametrize(
  "sampling", [Sampling(top_k=4), Sampling(top_p=0.6), Sampling(0.7, 5, 0.8)], ids=str
)
# Weight 0 as well: the loss multiplies the entropy by its weight, and 0 times a gradient that is
# not finite is not 0.
@pytest.mark.parametrize("entropy_weight", [0.0, 1.0])
@pytest.mark.parametrize("target", ["kept", "cut"])
def test_gradient_is_finite_where_tokens_are_cut(
  hidden, embedding, sampling, entropy_weight, target
):
  logits = all_logits(hidden, embedding)
  targets = logits.argmax(-1) if target == "kept" else logits.argmin(-1)
  for g in gradients(hidden, embedding, jnp.array(targets), sampling, entropy_weight):
    assert np.isfinite(g).all()
    assert np.abs(g).max() > 0


def test_gradient_where_tokens_are_cut_equals_that_of_the_kept_ones(hidden, embedding):
  targets = jnp.array(all_logits(hidden, embedding).argmax(-1))
  kept = jnp.array(reference_probabilities(all_logits(hidden, embedding), Sampling(top_k=4)) > 0)

  def total(hidden, embedding):
    # A large finite number in place of minus infinity: naive, and differentiable without care.
    logps = jax.nn.log_softmax(jnp.where(kept, hidden @ embedding.T, -1e4))
    entropy = -(jnp.exp(logps) * logps).sum()
    return jnp.take_along_axis(logps, targets[..., None], -1).sum() + entropy

  expected = jax.jit(jax.grad(total, (0, 1)))(hidden, embedding)
  got = gradients(hidden, embedding, targets, Sampling(top_k=4), 1.0)
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# 4 tokens a chunk, of 15: the last chunk is partly padding; and a chunk smaller than one token's
# logits.
@pytest.mark.parametrize("bound", [4 * V, V // 2])
def test_chunks_change_nothing(monkeypatch, hidden, embedding, bound):
  targets = jnp.array(np.random.default_rng(2).integers(V, size=(B, T)))

  def run(hidden, embedding):
    def total(hidden, embedding):
      logps, entropy = token_logprobs(hidden, Head(embedding), targets, Sampling(temperature=0.7))
      return (logps * jnp.arange(T)).sum() + entropy.sum(), (logps, entropy)

    return jax.grad(total, (0, 1), has_aux=True)(hidden, embedding)

  # A fresh function each time: jit would not notice the changed bound.
  whole = jax.jit(lambda *args: run(*args))(hidden, embedding)
  monkeypatch.setattr(logprobs, "chunk_logits", lambda rows, width: bound)
  chunked = jax.jit(lambda *args: run(*args))(hidden, embedding)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole, chunked)


def largest_array(jaxpr) -> int:
  """Elements of the largest array in a program, inner programs included."""
  largest = 0
  for equation in jaxpr.eqns:
    largest = max([largest] + [math.prod(v.aval.shape) for v in equation.outvars])
    for inner in jax.tree.leaves(list(equation.params.values())):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        largest = max(largest, largest_array(inner))
  return largest


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, 50, 0.9)], ids=str)
def test_no_array_of_all_logits(sampling):
  tokens, vocab, bound = 4 * 1024, 32_768, 2**24
  assert tokens * vocab >= 8 * bound
  shapes = (
    jax.ShapeDtypeStruct((4, 1024, D), jnp.float32),
    jax.ShapeDtypeStruct((vocab, D), jnp.float32),
    jax.ShapeDtypeStruct((4, 1024), jnp.int32),
  )

  def both(hidden, embedding, targets):
    def total(hidden, embedding):
      logps, entropy = token_logprobs(hidden, Head(embedding), targets, sampling)
      return logps.sum() + entropy.sum()

    return jax.grad(total, (0, 1))(hidden, embedding)

  traced = jax.jit(both).trace(*shapes)
  assert bound // 2 < largest_array(traced.jaxpr.jaxpr) <= bound
  if (
    sampling == Sampling()
  ):  # The compiler could still have joined the chunks; a few of them may live at once.
    memory = traced.lower().compile().memory_analysis()
    assert memory.temp_size_in_bytes < 6 * bound * 4 < tokens * vocab * 4


def test_chunks_take_a_fraction_of_the_memory():
  # 8 x 2,048 tokens at Gemma 3's vocabulary, forward and backward, by XLA's own account.
  shapes = (
    jax.ShapeDtypeStruct((8, 2048, 64), jnp.bfloat16),
    jax.ShapeDtypeStruct((262_144, 64), jnp.float32),
  )
  targets = jax.ShapeDtypeStruct((8, 2048), jnp.int32)

  def chunked(hidden, matrix, targets):
    return token_logprobs(hidden, Head(matrix), targets, Sampling())[0].sum()

  def plain(hidden, matrix, targets):
    logits = jnp.matmul(hidden, matrix.T.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1).sum()

  ours, theirs = (
    jax.jit(jax.grad(f, (0, 1)))
    .lower(*shapes, targets)
    .compile()
    .memory_analysis()
    .temp_size_in_bytes
    for f in (chunked, plain)
  )
  assert ours * 8 < theirs
