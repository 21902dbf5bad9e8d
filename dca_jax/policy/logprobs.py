"""Log-probabilities of the distribution that the sampler draws from: one definition for the sampler
and the learner."""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from dca_jax.policy.sharding import constrain

# Logits that a device holds at once, in float32; 64 to 512 MiB.
_LEAST, _MOST = 2**24, 2**27


def chunk_logits(rows: int, width: int) -> int:
  """How many logits a device holds at once of a matrix [rows, width]: as many bytes as the matrix
  has, which every chunk reads anew, within bounds; those of one token at least."""
  return max(rows, min(max(_LEAST, rows * width // 2), _MOST))


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are drawn: logits are divided by `temperature`, then cut to the `top_k` and `top_p`
  likeliest."""

  temperature: float = 1.0
  top_k: int = 0
  """0 keeps all."""
  top_p: float = 1.0
  """1 keeps all; otherwise the smallest set of tokens whose probability reaches top_p (Holtzman et
  al. 2020)."""


@flax.struct.dataclass
class Head:
  """What makes logits of hidden states."""

  matrix_VxD: jax.Array
  soft_cap: float = flax.struct.field(pytree_node=False, default=0.0)
  """Logits are squeezed between -soft_cap and soft_cap; 0 leaves them."""
  vocab_size: int | None = flax.struct.field(pytree_node=False, default=None)
  """How many ids are tokens. A matrix may have more rows, whose ids nothing can decode: they are
  cut."""
  mesh: Mesh | None = flax.struct.field(pytree_node=False, default=None)


def sampling_logits(hidden_NxD, head: Head, sampling: Sampling, targets_N=None) -> jax.Array:
  """Float32 logits [N, V] of the sampled distribution; tokens that are cut are -inf.

  `targets_N`, where given, are never cut: after an update a token that was sampled can leave the
  top k, and its log-probability must stay finite for the importance ratio and the gradient.
  """
  logits = jnp.matmul(
    hidden_NxD, head.matrix_VxD.T.astype(hidden_NxD.dtype), preferred_element_type=jnp.float32
  )
  logits = constrain(logits, head.mesh, "rows", "vocab", vocab=logits.shape[-1])
  if head.soft_cap:
    logits = head.soft_cap * jnp.tanh(logits / head.soft_cap)
  logits = logits / sampling.temperature
  vocab = logits.shape[-1]
  if head.vocab_size is not None and head.vocab_size < vocab:
    logits = jnp.where(jnp.arange(vocab) < head.vocab_size, logits, -jnp.inf)
  if not 0 < sampling.top_k < vocab and sampling.top_p >= 1:
    return logits
  ordered = -jnp.sort(-logits, -1)
  floor = ordered[:, min(sampling.top_k or vocab, vocab) - 1]
  if sampling.top_p < 1:
    # Top-p acts on what top-k left, as the samplers of the field do.
    kept = jax.nn.softmax(jnp.where(ordered >= floor[:, None], ordered, -jnp.inf), -1)
    before = jnp.cumsum(kept, -1) - kept
    floor = jnp.min(
      jnp.where(before < sampling.top_p, ordered, jnp.inf), -1, where=kept > 0, initial=jnp.inf
    )
  keep = logits >= floor[:, None]
  if targets_N is not None:
    keep |= jnp.arange(vocab) == targets_N[:, None]
  return jnp.where(keep, logits, -jnp.inf)


def token_logprobs(hidden_BxTxD, head: Head, targets_BxT, sampling: Sampling):
  """Log-probability of each target and the entropy of its distribution, both [B, T] and float32, in
  nats.

  Works through the columns of tokens in chunks and recomputes the logits in the backward pass, so
  that no [B, T, V] array exists.
  """
  b, t, _ = hidden_BxTxD.shape
  devices = head.mesh.size if head.mesh else 1
  column = max(1, b * head.matrix_VxD.shape[0] // devices)
  chunks = -(-t // max(1, chunk_logits(*head.matrix_VxD.shape) // column))
  size = -(-t // chunks)

  def cut(x_BxTx):
    """[chunks, B * size, ...], each chunk some columns of all rows, so that a device has its
    own."""
    padded = jnp.pad(x_BxTx, ((0, 0), (0, chunks * size - t), *[(0, 0)] * (x_BxTx.ndim - 2)))
    return (
      padded.reshape(b, chunks, size, *x_BxTx.shape[2:])
      .swapaxes(0, 1)
      .reshape(chunks, -1, *x_BxTx.shape[2:])
    )

  # The backward pass has the sums, so that a pass over the recomputed logits suffices.
  @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("sums"))
  def one(hidden_NxD, targets_N):
    logits = sampling_logits(hidden_NxD, head, sampling, targets_N)
    # Not by a log-softmax, an array as large as the logits, of which one column would be read.
    top_N = checkpoint_name(jax.lax.stop_gradient(logits.max(-1)), "sums")
    below = logits - top_N[:, None]
    weights = jnp.exp(below)
    total_N = checkpoint_name(weights.sum(-1), "sums")
    # The inner `where`, not one around the product, keeps the gradient finite: 0 * -inf is no
    # number.
    mean_N = jnp.sum(weights * jnp.where(below == -jnp.inf, 0.0, below), -1) / total_N
    log_N = jnp.log(total_N)
    # Not of `below`, which would have to be written for it.
    target_N = jnp.take_along_axis(logits, targets_N[:, None], -1)[:, 0]
    return target_N - top_N - log_N, log_N - mean_N

  logps, entropy = jax.lax.map(lambda args: one(*args), (cut(hidden_BxTxD), cut(targets_BxT)))
  return tuple(
    x.reshape(chunks, b, size).swapaxes(0, 1).reshape(b, -1)[:, :t] for x in (logps, entropy)
  )
