"""Attention over a block's own keys and, shared by a whole group of rows, the keys of their common prompt."""

import typing

import jax
import jax.numpy as jnp


class KeyValue(typing.NamedTuple):
  """Keys and values of one layer, head-major: [rows, K, positions, H]."""

  k: jax.Array
  v: jax.Array


def attend(
  q_BxTxNxH: jax.Array,
  own: KeyValue,
  own_mask_TxU: jax.Array,
  prompt: KeyValue | None,
  prompt_mask_PxTxS: jax.Array | None,
  scale: float | None = None,
  soft_cap: float = 0.0,
) -> jax.Array:
  """Softmax attention with grouped queries, in float32 where it sums.

  Rows come in groups: B = P * G, and rows p * G to (p + 1) * G - 1 share prompt p, whose keys are read without being
  copied G times. Groups of rows and of heads are folded into the rows of plain matrix products, which is several times
  faster on a CPU than the equivalent einsum.

  Args:
    q_BxTxNxH: queries, N = K * heads per key.
    own: keys and values of the block itself (U = T) or of a cache (U >= T), with B rows.
    own_mask_TxU: true where query t may read own key u.
    prompt: keys and values of the prompts, with P rows and S positions.
    prompt_mask_PxTxS: true where query t may read token s of its prompt; [P, 1, S] where that is the same for all t.
    scale: of the scores; head_dim^-1/2 when left out.
    soft_cap: scores are squeezed between -soft_cap and soft_cap (Gemma 2); 0 leaves them.

  Returns:
    [B, T, N, H], in the dtype of the queries.
  """
  b, t, n, h = q_BxTxNxH.shape
  kv_heads = own.k.shape[1]
  r = n // kv_heads
  q = (q_BxTxNxH * (scale or h**-0.5)).reshape(b, t, kv_heads, r, h).transpose(0, 2, 3, 1, 4)  # B K R T H

  own_scores = _scores(q.reshape(b, kv_heads, r * t, h), own.k, soft_cap).reshape(b, kv_heads, r, t, -1)
  own_scores = jnp.where(own_mask_TxU, own_scores, -jnp.inf)
  top = own_scores.max(-1)
  if prompt is not None:
    assert prompt_mask_PxTxS is not None
    p = prompt.k.shape[0]
    g = b // p

    def fold(x):  # (P G) K R T _ -> P K (G R T) _
      x = x.reshape(p, g, *x.shape[1:])
      return x.swapaxes(1, 2).reshape(p, kv_heads, g * r * t, x.shape[-1])

    def unfold(x):  # P K (G R T) _ -> (P G) K R T _
      return x.reshape(p, kv_heads, g, r, t, x.shape[-1]).swapaxes(1, 2).reshape(b, kv_heads, r, t, x.shape[-1])

    folded_mask = jnp.tile(prompt_mask_PxTxS, (1, g * r if prompt_mask_PxTxS.shape[1] > 1 else 1, 1))[:, None]
    prompt_scores = jnp.where(folded_mask, _scores(fold(q), prompt.k, soft_cap), -jnp.inf)
    top = jnp.maximum(top, unfold(prompt_scores.max(-1, keepdims=True))[..., 0])
  top = jax.lax.stop_gradient(top)[..., None]

  own_weights = jnp.exp(own_scores - top)
  total = own_weights.sum(-1, keepdims=True)
  out = _mix(own_weights.reshape(b, kv_heads, r * t, -1), own.v).reshape(b, kv_heads, r, t, h)
  if prompt is not None:
    prompt_weights = jnp.exp(prompt_scores - fold(top))
    total += unfold(prompt_weights.sum(-1, keepdims=True))
    out += unfold(_mix(prompt_weights, prompt.v))
  return (out / total).astype(q.dtype).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def _scores(q, k, soft_cap):
  scores = jnp.matmul(q, k.swapaxes(-1, -2), preferred_element_type=jnp.float32)
  return soft_cap * jnp.tanh(scores / soft_cap) if soft_cap else scores


def _mix(weights, v):
  return jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
