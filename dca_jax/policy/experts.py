"""A mixture of experts (Shazeer et al. 2017) in the place of a layer's MLP, or beside it.

Arrays: N tokens, E experts, C of them chosen for each token, D width, F hidden size of an expert.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dca_jax.policy.config import ACTIVATIONS, PolicyConfig
from dca_jax.policy.layers import RMSNorm, Weight, param


class _Matrices(nn.Module):
  """A matrix of every expert."""

  shape: tuple[int, ...]
  axes: tuple[str, ...]

  @nn.compact
  def __call__(self, dtype: str) -> jax.Array:
    init = nn.initializers.normal(self.shape[1] ** -0.5)
    return param(self, "kernel", init, ("experts", *self.axes), self.shape).astype(dtype)


class Experts(nn.Module):
  """Gated MLPs, of which every token takes the C that a router finds likeliest: as Qwen3's do, or
  beside an MLP, as Gemma 4's.

  Whatever the load, no token is left out and none is added, so what a token gets does not depend on
  the others. Devices along `tensor` have E / tensor experts each.
  """

  config: PolicyConfig
  mesh: Mesh | None = None

  @nn.compact
  def __call__(self, x_BxTxD, routed_BxTxD):
    c = self.config
    share_BxTxC, chosen_BxTxC = self._route(routed_BxTxD.astype(jnp.float32))
    matrices = self._matrices()
    mix = functools.partial(_mix, ACTIVATIONS[c.activation])
    if self.mesh is None or self.mesh.size == 1:
      return mix(0, x_BxTxD, share_BxTxC, chosen_BxTxC, matrices)

    def part(x, share, chosen, matrices):
      first = jax.lax.axis_index("tensor") * matrices[0].shape[0]
      return jax.lax.psum(mix(first, x, share, chosen, matrices), "tensor")

    rows = P(("data", "fsdp"))
    specs = rows, rows, rows, P("tensor")
    run = jax.shard_map(part, mesh=self.mesh, in_specs=specs, out_specs=rows, check_vma=False)
    return run(x_BxTxD, share_BxTxC, chosen_BxTxC, matrices)

  def _route(self, x_BxTxD):
    """The chosen experts of every token, and what each of them counts."""
    c = self.config
    if c.experts_beside:
      x_BxTxD = RMSNorm(c, name="router_norm")(x_BxTxD) * c.width**-0.5
    router = Weight((c.width, c.experts), ("embed", "router"), mesh=self.mesh, name="router")
    share_BxTxC, chosen_BxTxC = jax.lax.top_k(jax.nn.softmax(router(x_BxTxD)), c.experts_per_token)
    if c.experts_sum_to_one:
      share_BxTxC /= share_BxTxC.sum(-1, keepdims=True)
    if c.experts_beside:
      share_BxTxC *= param(self, "scale", nn.initializers.ones, ("router",), (c.experts,))[
        chosen_BxTxC
      ]
    return share_BxTxC, chosen_BxTxC

  def _matrices(self) -> tuple[jax.Array, ...]:
    """Those of gate and up, or both as one, and of down."""
    c, into, out = self.config, ("embed", "mlp"), ("mlp", "embed")
    if f := c.experts_beside:
      return (
        _Matrices((c.experts, c.width, 2 * f), into, name="experts_gate_up")(c.dtype),
        _Matrices((c.experts, f, c.width), out, name="experts_down")(c.dtype),
      )
    return (
      _Matrices((c.experts, c.width, c.mlp), into, name="expert_gate")(c.dtype),
      _Matrices((c.experts, c.width, c.mlp), into, name="expert_up")(c.dtype),
      _Matrices((c.experts, c.mlp, c.width), out, name="expert_down")(c.dtype),
    )


def _mix(activate, first, x_BxTxD, share_BxTxC, chosen_BxTxC, matrices):
  """What experts `first` to `first` + E - 1 add to every token.

  Tokens are sorted by expert, so that each expert's lie together, and `ragged_dot` multiplies them
  with its matrix. Choices of other devices' experts come last: nothing is computed for them, and
  what stands there counts nowhere, whatever it is.
  """
  *into, down_ExFxD = matrices
  experts, choices = down_ExFxD.shape[0], chosen_BxTxC.shape[-1]
  x_NxD = x_BxTxD.reshape(-1, x_BxTxD.shape[-1])
  expert = chosen_BxTxC.reshape(-1) - first
  expert = jnp.where((expert >= 0) & (expert < experts), expert, experts)
  order = jnp.argsort(expert)
  sizes_E = jnp.bincount(expert, length=experts + 1)[:experts]
  ours = (jnp.arange(order.size) < sizes_E.sum())[:, None]
  rows = jnp.where(ours, x_NxD[order // choices], 0)
  hidden = [jax.lax.ragged_dot(rows, matrix, sizes_E) for matrix in into]
  gate, up = hidden if len(hidden) == 2 else jnp.split(hidden[0], 2, -1)
  out = jnp.where(ours, jax.lax.ragged_dot(activate(gate) * up, down_ExFxD, sizes_E), 0)
  back = out[jnp.argsort(order)].reshape(*share_BxTxC.shape, -1)
  return (back * share_BxTxC[..., None]).sum(-2).astype(x_BxTxD.dtype)
