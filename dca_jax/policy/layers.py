"""What layers are made of: matrices, norms and rotary positions."""

import math
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from dca_jax.policy.config import PolicyConfig
from dca_jax.policy.sharding import constrain


def param(
  module: nn.Module, name: str, init, axes: tuple[str, ...], shape: tuple[int, ...]
) -> jax.Array:
  """A float32 parameter that carries its logical axis names while it is boxed."""
  return typing.cast(
    jax.Array, module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
  )


class Weight(nn.Module):
  """One named matrix, applied as a plain two-dimensional product, whose backward pass is much
  faster on a CPU."""

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  inputs: int = 1
  """How many leading axes of `shape` are contracted."""
  dtype: str = "float32"
  bias: bool = False
  lora_rank: int = 0
  lora_scale: float = 1.0
  mesh: Mesh | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    fan_in, fan_out = math.prod(self.shape[: self.inputs]), math.prod(self.shape[self.inputs :])
    init = nn.initializers.normal(fan_in**-0.5)
    kernel = param(self, "kernel", init, self.axes, self.shape)
    leading = x.shape[: x.ndim - self.inputs]
    x = x.reshape(-1, fan_in)
    y = x @ kernel.astype(self.dtype).reshape(fan_in, fan_out)
    if r := self.lora_rank:
      zeros, ins, outs = nn.initializers.zeros, slice(self.inputs), slice(self.inputs, None)
      a = param(self, "lora_a", init, (*self.axes[ins], "rank"), (*self.shape[ins], r))
      b = param(self, "lora_b", zeros, ("rank", *self.axes[outs]), (r, *self.shape[outs]))
      low = checkpoint_name(x @ a.astype(self.dtype).reshape(fan_in, r), "projection")
      y += self.lora_scale * low @ b.astype(self.dtype).reshape(r, fan_out)
    y = checkpoint_name(y, "projection").reshape(*leading, *self.shape[self.inputs :])
    if self.bias:
      zeros, axes = nn.initializers.zeros, self.axes[self.inputs :]
      y += param(self, "bias", zeros, axes, self.shape[self.inputs :]).astype(self.dtype)
    return constrain(y, self.mesh, "rows", *[None] * (len(leading) - 1), *self.axes[self.inputs :])


class RMSNorm(nn.Module):
  """Root-mean-square norm in float32 (Zhang and Sennrich 2019)."""

  config: PolicyConfig
  axes: tuple[str, ...] = ("embed",)
  """The last ones of what comes in; the mean is over all of them."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    init = nn.initializers.zeros if c.norm_plus_one else nn.initializers.ones
    over = tuple(range(-len(self.axes), 0))
    scale = param(self, "scale", init, self.axes, x.shape[over[0] :])
    scale = 1 + scale.astype(jnp.float32) if c.norm_plus_one else scale
    return (normed(x, c.norm_eps, over) * scale).astype(x.dtype)


def normed(x: jax.Array, eps: float, over: tuple[int, ...] = (-1,)) -> jax.Array:
  """`x` in float32, divided by its root mean square over these axes."""
  x32 = x.astype(jnp.float32)
  return x32 * jax.lax.rsqrt(jnp.mean(x32**2, over, keepdims=True) + eps)


def rotations(positions_BxT, config: PolicyConfig, windowed: bool = False):
  """Cosines and sines [B, T, 1, H / 2] of the rotary position embedding (Su et al. 2021),
  half-rotation form."""
  local = windowed and config.local_rope_theta > 0
  theta, scaling = (
    (config.local_rope_theta, ()) if local else (config.rope_theta, config.rope_scaling)
  )
  frequencies = theta ** -(jnp.arange(0, config.head_dim, 2) / config.head_dim)
  if not windowed and config.global_rotated < 1:
    turning = int(config.global_rotated * config.head_dim) // 2
    frequencies = jnp.where(jnp.arange(frequencies.size) < turning, frequencies, 0)
  attention = 1.0
  if scaling:
    kept = jnp.float32(0)
    if len(scaling) == 4:
      low, high, original = scaling[1:]
      kept = jnp.clip((original * frequencies / (2 * math.pi) - low) / (high - low), 0, 1)
    elif len(scaling) == 5:
      *between, attention = scaling[1:]
      kept = _kept_by_yarn(config.head_dim, theta, *between)
    frequencies *= kept + (1 - kept) / scaling[0]
  angles = positions_BxT[..., None, None] * frequencies
  return attention * jnp.cos(angles), attention * jnp.sin(angles)


def _kept_by_yarn(size: int, theta: float, slow: float, fast: float, original: float):
  """How far each frequency stays what it is (Peng et al. 2023, section 3.2); as transformers does,
  by its number, between the whole numbers around those that turn `fast` and `slow` times."""

  def number(turns):
    return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

  first, last = max(math.floor(number(fast)), 0), min(math.ceil(number(slow)), size - 1)
  return 1 - jnp.clip((jnp.arange(size // 2) - first) / max(last - first, 0.001), 0, 1)


def rotate(x_BxTxNxH, rope):
  cos, sin = rope
  a, b = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, -1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BxTxNxH.dtype)
