"""Log-probabilities of the distribution that the sampler draws from: one definition for the sampler and the learner."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dca_jax.policy.sharding import constrain

# Logits that a device holds at once, in float32: 64 MiB, or those of one token of each row.
CHUNK_LOGITS = 2**24


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are drawn: logits are divided by `temperature`, then cut to the `top_k` and `top_p` likeliest."""

  temperature: float = 1.0
  top_k: int = 0
  """0 keeps all."""
  top_p: float = 1.0
  """1 keeps all; otherwise the smallest set of tokens whose probability reaches top_p (Holtzman et al. 2020)."""


@flax.struct.dataclass
class Head:
  """What makes logits of hidden states."""

  matrix_VxD: jax.Array
  soft_cap: float = flax.struct.field(pytree_node=False, default=0.0)
  """Logits are squeezed between -soft_cap and soft_cap; 0 leaves them."""
  vocab_size: int | None = flax.struct.field(pytree_node=False, default=None)
  """How many ids are tokens. A matrix may have more rows, whose ids nothing can decode: they are cut."""
  mesh: Mesh | None = flax.struct.field(pytree_node=False, default=None)


def sampling_logits(hidden, head: Head, sampling: Sampling, targets=None) -> jax.Array:
  """Float32 logits [..., V] of hidden states [..., D], of the sampled distribution; tokens that are cut are -inf.

  `targets` [...], where given, are never cut: after an update a token that was sampled can leave the top k, and its
  log-probability must stay finite for the importance ratio and the gradient.
  """
  logits = jnp.matmul(hidden, head.matrix_VxD.T.astype(hidden.dtype), preferred_element_type=jnp.float32)
  names = "rows", *[None] * (logits.ndim - 2), "vocab"
  logits = constrain(logits, head.mesh, *names, vocab=logits.shape[-1])
  if head.soft_cap:
    logits = head.soft_cap * jnp.tanh(logits / head.soft_cap)
  logits = logits / sampling.temperature
  vocab = logits.shape[-1]
  if head.vocab_size is not None and head.vocab_size < vocab:
    logits = jnp.where(jnp.arange(vocab) < head.vocab_size, logits, -jnp.inf)
  if not 0 < sampling.top_k < vocab and sampling.top_p >= 1:
    return logits
  ordered = -jnp.sort(-logits, -1)
  floor = ordered[..., min(sampling.top_k or vocab, vocab) - 1]
  if sampling.top_p < 1:
    # Top-p acts on what top-k left, as the samplers of the field do.
    kept = jax.nn.softmax(jnp.where(ordered >= floor[..., None], ordered, -jnp.inf), -1)
    before = jnp.cumsum(kept, -1) - kept
    floor = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), -1, where=kept > 0, initial=jnp.inf)
  keep = logits >= floor[..., None]
  if targets is not None:
    keep |= jnp.arange(vocab) == targets[..., None]
  return jnp.where(keep, logits, -jnp.inf)


def token_logprobs(hidden_BxTxD, head: Head, targets_BxT, sampling: Sampling):
  """Log-probability of each target and the entropy of its distribution, both [B, T] and float32, in nats.

  Works through the columns of tokens in chunks and recomputes the logits in the backward pass, so that no [B, T, V]
  array exists.
  """
  t = hidden_BxTxD.shape[1]
  devices = head.mesh.size if head.mesh else 1
  column = max(1, hidden_BxTxD.shape[0] * head.matrix_VxD.shape[0] // devices)
  chunks = -(-t // max(1, CHUNK_LOGITS // column))
  size = -(-t // chunks)

  def cut(x_BxTx):
    padding = ((0, 0), (0, chunks * size - t), *[(0, 0)] * (x_BxTx.ndim - 2))
    return jnp.pad(x_BxTx, padding).reshape(x_BxTx.shape[0], chunks, size, *x_BxTx.shape[2:]).swapaxes(0, 1)

  @jax.checkpoint
  def one(hidden_BxCxD, targets_BxC):
    logits = sampling_logits(hidden_BxCxD, head, sampling, targets_BxC)
    logps = jax.nn.log_softmax(logits, -1)
    # The inner `where`, not one around the product, keeps the gradient finite: 0 * -inf is not a number.
    entropy = -jnp.sum(jnp.exp(logps) * jnp.where(logits == -jnp.inf, 0.0, logps), -1)
    return jnp.take_along_axis(logps, targets_BxC[..., None], -1)[..., 0], entropy

  logps, entropy = jax.lax.map(lambda args: one(*args), (cut(hidden_BxTxD), cut(targets_BxT)))
  return tuple(x.swapaxes(0, 1).reshape(len(hidden_BxTxD), -1)[:, :t] for x in (logps, entropy))
