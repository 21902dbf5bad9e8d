"""The policy: a decoder-only transformer, one definition for training and for sampling.

Arrays: P prompts, G completions of each, B = P * G rows, S prompt tokens, T completion tokens, D width, N query heads,
K key heads, H head size, V vocabulary, L layers.

A prompt is run once and its keys are shared by its whole group, when sampling and when training alike. In training the
layers are scanned and rematerialised, but for their projections (one compiled layer, little memory); in decoding they
are unrolled, each with a cache of its own, because a cache that goes through a scan is copied at every token.
"""

import dataclasses
from collections.abc import Sequence
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from dca_jax.policy.attention import KeyValue, attend


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
  """The `policy` section."""

  width: int = 64
  depth: int = 3
  heads: int = 2
  kv_heads: int = 1
  head_dim: int = 32
  mlp: int = 192
  """Hidden size of the gated MLP."""
  rope_theta: float = 10_000.0
  qk_norm: bool = False
  """Normalise queries and keys in each head, as Qwen3 and Gemma 3 do; it bears much higher learning rates."""
  dtype: str = "float32"
  """Type of activations and matrix products; weights are kept in float32."""

  def check(self) -> dict[str, str]:
    bad = {k: "must be positive" for k in ("width", "depth", "heads", "kv_heads", "mlp") if getattr(self, k) < 1}
    if self.head_dim < 2 or self.head_dim % 2:
      bad["head_dim"] = "must be even and positive, for rotary positions"
    if self.kv_heads > 0 and self.heads % self.kv_heads:
      bad["heads"] = f"must be a multiple of policy.kv_heads ({self.kv_heads})"
    if self.rope_theta <= 1:
      bad["rope_theta"] = "must be above 1"
    if self.dtype not in ("float32", "bfloat16"):
      bad["dtype"] = "must be 'float32' or 'bfloat16'"
    return bad


def _param(module: nn.Module, name: str, init, axes: tuple[str, ...], shape: tuple[int, ...]) -> jax.Array:
  """A float32 parameter that carries its logical axis names while it is boxed."""
  return cast(jax.Array, module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32))


class Weight(nn.Module):
  """One named matrix, applied as a plain two-dimensional product, whose backward pass is much faster on a CPU."""

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  inputs: int = 1
  """How many leading axes of `shape` are contracted."""
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    fan_in, fan_out = _product(self.shape[: self.inputs]), _product(self.shape[self.inputs :])
    init = nn.initializers.normal(fan_in**-0.5)
    kernel = _param(self, "kernel", init, self.axes, self.shape)
    leading = x.shape[: x.ndim - self.inputs]
    y = x.reshape(-1, fan_in) @ kernel.astype(self.dtype).reshape(fan_in, fan_out)
    return y.reshape(*leading, *self.shape[self.inputs :])


class RMSNorm(nn.Module):
  """Root-mean-square norm in float32 (Zhang and Sennrich 2019)."""

  axis: str = "embed"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = _param(self, "scale", nn.initializers.ones, (self.axis,), x.shape[-1:])
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + 1e-6) * scale).astype(x.dtype)


class Block(nn.Module):
  """Attention and gated MLP, each behind a norm and added to the stream.

  Called with `cache` and `index` it writes its keys at `index` and reads the whole cache; otherwise it reads its own.
  Returns the new stream [B, T, D] and the keys and values that it read beside the prompt's.
  """

  config: PolicyConfig

  @nn.compact
  def __call__(self, x_BxTxD, prompt, rope, own_mask_TxU, prompt_mask_PxS, cache=None, index=None):
    c = self.config

    def weight(name, shape, axes, inputs=1):
      return Weight(shape, axes, inputs, c.dtype, name=name)

    y = RMSNorm(name="attention_norm")(x_BxTxD)
    q = weight("q", (c.width, c.heads, c.head_dim), ("embed", "heads", "head_dim"))(y)
    k = weight("k", (c.width, c.kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"))(y)
    v = weight("v", (c.width, c.kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"))(y)
    if c.qk_norm:
      q, k = RMSNorm("head_dim", name="q_norm")(q), RMSNorm("head_dim", name="k_norm")(k)
    own = KeyValue(_rotate(k, rope).swapaxes(1, 2), v.swapaxes(1, 2))
    if cache is not None:
      own = KeyValue(
        *(jax.lax.dynamic_update_slice_in_dim(c, new, index, 2) for c, new in zip(cache, own, strict=True))
      )
    y = attend(_rotate(q, rope), own, own_mask_TxU, prompt, prompt_mask_PxS)
    x_BxTxD += weight("o", (c.heads, c.head_dim, c.width), ("heads", "head_dim", "embed"), inputs=2)(y)

    y = RMSNorm(name="mlp_norm")(x_BxTxD)
    gate = weight("gate", (c.width, c.mlp), ("embed", "mlp"))(y)
    up = weight("up", (c.width, c.mlp), ("embed", "mlp"))(y)
    x_BxTxD += weight("down", (c.mlp, c.width), ("mlp", "embed"))(nn.silu(gate) * up)
    return x_BxTxD, own


class Policy(nn.Module):
  """The transformer. `init_params` makes its parameters; the other public methods are pure functions of them."""

  config: PolicyConfig
  vocab_size: int

  def setup(self):
    init = nn.initializers.normal(self.config.width**-0.5)
    shape = (self.vocab_size, self.config.width)
    self.embedding_VxD = _param(self, "embedding", init, ("vocab", "embed"), shape)
    self.blocks = nn.scan(
      nn.remat(Block, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
      length=self.config.depth,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(self.config)
    self.final_norm = RMSNorm()

  def __call__(self, tokens_BxT, start_B=None, prompt=None, prompt_mask_PxS=None):
    """Runs a block of tokens that begins at position `start_B` of its rows.

    Args:
      tokens_BxT: token ids.
      start_B: position of the first token of each row; 0 when left out.
      prompt: keys and values of the prompts, [L, P, K, S, H], or None.
      prompt_mask_PxS: true where prompt p has a token.

    Returns:
      The hidden states [B, T, D] and the block's own keys and values [L, B, K, T, H].
    """
    t = tokens_BxT.shape[1]
    positions_BxT = jnp.arange(t) + (0 if start_B is None else start_B[:, None])
    rope = _rope(positions_BxT, self.config)
    causal_TxT = jnp.tril(jnp.ones((t, t), bool))
    x, own = self.blocks(self._embed(tokens_BxT), prompt, rope, causal_TxT, prompt_mask_PxS)
    return self.final_norm(x), own

  def _embed(self, tokens):
    return self.embedding_VxD[tokens].astype(self.config.dtype)

  def _finish(self, x):
    return self.final_norm(x)

  # What the rest of the program calls.

  def init_params(self, key: jax.Array):
    """Parameters, boxed with their logical axis names (`nn.unbox` takes the names off)."""
    return self.init(key, jnp.zeros((1, 2), jnp.int32))["params"]

  def completion_hidden(self, params, prompts_PxS, prompt_lengths_P, completions_BxT) -> jax.Array:
    """Hidden states [B, T, D] from which each completion token is predicted; prompts are run once per group.

    Row p * G + g is completion g of prompt p. The first token is predicted from the prompt's last state, so the last
    completion token is never read.
    """
    groups = completions_BxT.shape[0] // prompts_PxS.shape[0]
    last_PxD, prompt, mask_PxS = self._read_prompts(params, prompts_PxS, prompt_lengths_P)
    start_B = jnp.repeat(prompt_lengths_P, groups)
    hidden, _ = self.apply({"params": params}, completions_BxT[:, :-1], start_B, prompt, mask_PxS)
    return jnp.concatenate([jnp.repeat(last_PxD, groups, 0)[:, None], hidden], 1)

  def _read_prompts(self, params, prompts_PxS, prompt_lengths_P):
    """The last hidden state of each prompt [P, D], the prompts' keys and values, and their mask [P, S]."""
    hidden_PxSxD, prompt = self.apply({"params": params}, prompts_PxS)
    last_PxD = jnp.take_along_axis(hidden_PxSxD, prompt_lengths_P[:, None, None] - 1, 1)[:, 0]
    return last_PxD, prompt, jnp.arange(prompts_PxS.shape[1]) < prompt_lengths_P[:, None]

  def decoder(self, params, prompts_PxS, prompt_lengths_P, groups: int, length: int):
    """Runs the prompts and prepares to write `groups` completions of up to `length` tokens for each.

    Returns:
      The hidden states [P, D] that predict the first tokens, an empty cache, and `step(cache, index, tokens_B)`, which
      reads token number `index` of every row and returns (hidden states [B, D], cache).
    """
    c = self.config
    last_PxD, prompt, mask_PxS = self._read_prompts(params, prompts_PxS, prompt_lengths_P)
    start_B = jnp.repeat(prompt_lengths_P, groups)
    layers = [jax.tree.map(lambda a, i=i: a[i], (params["blocks"], prompt)) for i in range(c.depth)]
    empty = jnp.zeros((start_B.shape[0], c.kv_heads, length, c.head_dim), c.dtype)

    def step(cache: Sequence[KeyValue], index: jax.Array, tokens_B: jax.Array):
      rope = _rope((start_B + index)[:, None], c)
      mask_1xT = jnp.arange(length)[None] <= index
      x = self.apply({"params": params}, tokens_B[:, None], method="_embed")
      updated = []
      for (block, keys), own in zip(layers, cache, strict=True):
        x, read = Block(c).apply({"params": block}, x, keys, rope, mask_1xT, mask_PxS, own, index)
        updated.append(read)
      return self.apply({"params": params}, x, method="_finish")[:, 0], tuple(updated)  # type: ignore[call-overload]

    return last_PxD, (KeyValue(empty, empty),) * c.depth, step


def _rope(positions_BxT, config: PolicyConfig):
  """Cosines and sines [B, T, 1, H / 2] of the rotary position embedding (Su et al. 2021), half-rotation form."""
  frequencies = config.rope_theta ** -(jnp.arange(0, config.head_dim, 2) / config.head_dim)
  angles = positions_BxT[..., None, None] * frequencies
  return jnp.cos(angles), jnp.sin(angles)


def _rotate(x_BxTxNxH, rope):
  cos, sin = rope
  a, b = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, -1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BxTxNxH.dtype)


def _product(sizes) -> int:
  n = 1
  for size in sizes:
    n *= size
  return n
