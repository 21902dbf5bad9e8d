"""Attention over a block's own keys and, shared by a whole group of rows, the keys of their common
prompt.

`attend` is plain JAX and serves decoding too. `flash_attend` does the same for whole blocks with a
kernel of the accelerator, which never holds all scores.
"""

import typing

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

LANES = 128
"""Blocks of tokens, and the heads of splash attention, are padded to a multiple of this."""


class KeyValue(typing.NamedTuple):
  """Keys and values of one layer, laid out so that both products of decoding read them in order."""

  k: jax.Array
  """[rows, K, H, positions]."""
  v: jax.Array
  """[rows, K, positions, H]."""


def attend(
  q_BxTxNxH: jax.Array,
  own: KeyValue,
  own_mask: jax.Array,
  prompt: KeyValue | None,
  prompt_mask: jax.Array | None,
  scale: float | None = None,
  soft_cap: float = 0.0,
) -> jax.Array:
  """Softmax attention with grouped queries, in float32 where it sums.

  Rows come in groups: B = P * G, and rows p * G to (p + 1) * G - 1 share prompt p, whose keys are
  read without being copied G times. Groups of rows and of heads are folded into the rows of plain
  matrix products, which is several times faster on a CPU than the equivalent einsum. Own keys and
  the prompt's share one softmax, so this is one function, longer than others.

  Args:
    q_BxTxNxH: queries, N = K * heads per key.
    own: keys and values of the block itself (U = T) or of a cache (U >= T), with B rows.
    own_mask: true where query t may read own key u, [T, U], or [B, T, U] where rows differ.
    prompt: keys and values of the prompts, with P rows and S positions.
    prompt_mask: true where query t may read token s of its prompt, [P, T, S], or [B, T, S] where
      the rows of a group differ; [., 1, S] where it is the same for all t.
    scale: of the scores; head_dim^-1/2 when left out.
    soft_cap: scores are squeezed between -soft_cap and soft_cap (Gemma 2); 0 leaves them.

  Returns:
    [B, T, N, H], in the dtype of the queries.
  """
  b, t, n, h = q_BxTxNxH.shape
  kv_heads = own.k.shape[1]
  r = n // kv_heads
  q = (
    (q_BxTxNxH * (scale or h**-0.5)).reshape(b, t, kv_heads, r, h).transpose(0, 2, 3, 1, 4)
  )  # B K R T H

  own_scores = _scores(q.reshape(b, kv_heads, r * t, h), own.k, soft_cap).reshape(
    b, kv_heads, r, t, -1
  )
  own_mask = own_mask[:, None, None] if own_mask.ndim == 3 else own_mask
  own_scores = jnp.where(own_mask, own_scores, -jnp.inf)
  top = own_scores.max(-1)
  if prompt is not None:
    assert prompt_mask is not None
    p = prompt.k.shape[0]
    g = b // p

    def fold(x):  # (P G) K R T _ -> P K (G R T) _
      x = x.reshape(p, g, *x.shape[1:])
      return x.swapaxes(1, 2).reshape(p, kv_heads, g * r * t, x.shape[-1])

    def unfold(x):  # P K (G R T) _ -> (P G) K R T _
      return (
        x.reshape(p, kv_heads, g, r, t, x.shape[-1])
        .swapaxes(1, 2)
        .reshape(b, kv_heads, r, t, x.shape[-1])
      )

    # [P, 1, 1 or (G R T), S]: in the order of the folded rows.
    folded_mask = prompt_mask.reshape(p, -1, 1, *prompt_mask.shape[1:])
    if folded_mask.shape[1] > 1 or folded_mask.shape[3] > 1:
      folded_mask = jnp.broadcast_to(folded_mask, (p, g, r, t, folded_mask.shape[-1]))
    folded_mask = folded_mask.reshape(p, 1, -1, folded_mask.shape[-1])
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
  scores = jnp.matmul(q, k, preferred_element_type=jnp.float32)
  return soft_cap * jnp.tanh(scores / soft_cap) if soft_cap else scores


def _mix(weights, v):
  return jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)


def choose_kernel(
  mesh: Mesh | None, tokens: int, head_dim: int, dtype: str, soft_cap: float
) -> str:
  """`splash` on TPUs, `cudnn` on GPUs where it can, `plain` elsewhere and for short blocks, whose
  scores are small."""
  if mesh is None or tokens < 2 * LANES:
    return "plain"
  device = mesh.devices.flat[0]
  generation = str(getattr(device, "compute_capability", "")).split(".")[
    0
  ]  # Of NVIDIA a number; 8 is Ampere.
  fits = dtype == "bfloat16" and head_dim <= 128 and head_dim % 8 == 0 and not soft_cap
  if generation.isdigit() and int(generation) >= 8 and fits:
    return "cudnn"
  return "splash" if device.platform == "tpu" else "plain"


def flash_attend(
  q_BxTxNxH: jax.Array,
  own: KeyValue,
  prompt: KeyValue | None,
  prompt_lengths_B: jax.Array | None,
  window: int,
  scale: float,
  soft_cap: float,
  kernel: str,
  mesh: Mesh | None,
) -> jax.Array:
  """`attend` for a block whose query t reads its own keys up to t, by a kernel of the accelerator.

  The keys of a row are laid in one line, prompt before block, without a gap between, so that a
  window is one of places. Takes what `attend` takes, and what the masks there were made from.

  Args:
    prompt_lengths_B: of each row's prompt.
    window: positions that a query reads, its own included; 0 for all.
    kernel: `splash` (interpreted where there is no TPU), or, without soft cap, `cudnn` or its plain
      form, `xla`.
    mesh: over which rows and heads are spread; each device works on its own.
  """

  def local(q, own, prompt, lengths_B):
    b, t, _, h = q.shape
    wide = -h % LANES if kernel == "splash" else 0
    q = jnp.pad(q * scale, ((0, 0), (0, -t % LANES), (0, 0), (0, wide)))
    k, v = own.k.swapaxes(2, 3), own.v
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, -t % LANES), (0, wide))) for x in (k, v))
    first_B = jnp.zeros(b, jnp.int32)
    if prompt is not None:
      groups, gap = b // prompt.v.shape[0], -prompt.v.shape[2] % LANES
      places = prompt.v.shape[2] + gap
      first_B = places - lengths_B

      def before(x_PxKxSxH, own):
        x = jnp.pad(x_PxKxSxH, ((0, 0), (0, 0), (gap, 0), (0, wide)))
        x = jax.vmap(lambda x, by: jnp.roll(x, by, 1))(x, first_B[::groups] - gap)
        return jnp.concatenate([jnp.repeat(x, groups, 0), own], 2)

      k, v = before(prompt.k.swapaxes(2, 3), k), before(prompt.v, v)
    if kernel == "splash":
      return _splash(q, k, v, first_B, window, soft_cap, mesh)[:, :t, :, :h]
    return _dot_product(q, k, v, first_B, window, kernel)[:, :t]

  if mesh is None or mesh.size == 1:
    return local(q_BxTxNxH, own, prompt, prompt_lengths_B)
  rows = ("data", "fsdp")
  specs = P(rows, None, "tensor"), P(rows, "tensor"), P(rows, "tensor"), P(rows)
  run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
  return run(q_BxTxNxH, own, prompt, prompt_lengths_B)


def _splash(q_BxTxNxH, k_BxKxUxH, v_BxKxUxH, first_B, window, soft_cap, mesh):
  (b, t, n, _), u = q_BxTxNxH.shape, k_BxKxUxH.shape[2]
  one = (
    splash.LocalMask((t, u), (window - 1, 0), u - t) if window else splash.CausalMask((t, u), u - t)
  )
  q_size, size = (next(s for s in (512, 256, LANES) if x % s == 0) for x in (t, u))
  run = splash.make_splash_mha_single_device(
    splash.MultiHeadMask([one] * n),
    block_sizes=splash.BlockSizes(q_size, size, size, q_size, size, size, q_size, size),
    attn_logits_soft_cap=soft_cap or None,
    interpret=mesh is None or mesh.devices.flat[0].platform != "tpu",
  )
  # Segments keep what lies before a row's first key out.
  segments = splash.SegmentIds(
    jnp.ones((b, t), jnp.int32), (jnp.arange(u) >= first_B[:, None]).astype(jnp.int32)
  )
  return jax.vmap(run)(q_BxTxNxH.swapaxes(1, 2), k_BxKxUxH, v_BxKxUxH, segments).swapaxes(1, 2)


def _dot_product(q_BxTxNxH, k_BxKxUxH, v_BxKxUxH, first_B, window, implementation):
  t, keys_U = q_BxTxNxH.shape[1], jnp.arange(k_BxKxUxH.shape[2])
  back_TxU = jnp.arange(t)[:, None] + keys_U.size - t - keys_U
  mask_BxTxU = (
    (back_TxU >= 0) & (back_TxU < (window or keys_U.size)) & (keys_U >= first_B[:, None, None])
  )
  k, v = k_BxKxUxH.swapaxes(1, 2), v_BxKxUxH.swapaxes(1, 2)
  return jax.nn.dot_product_attention(
    q_BxTxNxH, k, v, mask=mask_BxTxU[:, None], scale=1.0, implementation=implementation
  )
