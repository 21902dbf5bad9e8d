"""A mixture of experts (Shazeer et al. 2017) in the place of a layer's MLP.

Arrays: N tokens, E experts, C of them chosen for each token, D width, F hidden size of an expert.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dca_jax.policy.config import ACTIVATIONS, PolicyConfig
from dca_jax.policy.layers import Weight, param


class _Matrices(nn.Module):
  """A matrix of every expert."""

  shape: tuple[int, ...]
  axes: tuple[str, ...]

  @nn.compact
  def __call__(self, dtype: str) -> jax.Array:
    init = nn.initializers.normal(self.shape[1] ** -0.5)
    return param(self, "kernel", init, ("experts", *self.axes), self.shape).astype(dtype)


class Experts(nn.Module):
  """Gated MLPs, of which every token takes the C that a router finds likeliest, as Qwen3's does.

  Whatever the load, no token is left out and none is added, so what a token gets does not depend on
  the others. Devices along `tensor` have E / tensor experts each.
  """

  config: PolicyConfig
  mesh: Mesh | None = None

  @nn.compact
  def __call__(self, x_BxTxD):
    c = self.config
    router = Weight((c.width, c.experts), ("embed", "router"), mesh=self.mesh, name="router")
    shares = jax.nn.softmax(router(x_BxTxD.astype(jnp.float32)))
    share_BxTxC, chosen_BxTxC = jax.lax.top_k(shares, c.experts_per_token)
    if c.experts_sum_to_one:
      share_BxTxC /= share_BxTxC.sum(-1, keepdims=True)
    into, out = (c.experts, c.width, c.mlp), (c.experts, c.mlp, c.width)
    matrices = (
      _Matrices(into, ("embed", "mlp"), name="expert_gate")(c.dtype),
      _Matrices(into, ("embed", "mlp"), name="expert_up")(c.dtype),
      _Matrices(out, ("mlp", "embed"), name="expert_down")(c.dtype),
    )
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


def _mix(activate, first, x_BxTxD, share_BxTxC, chosen_BxTxC, matrices):
  """What experts `first` to `first` + E - 1 add to every token.

  Tokens are sorted by expert, so that each expert's lie together, and `ragged_dot` multiplies them
  with its matrix. Choices of other devices' experts come last: nothing is computed for them, and
  what stands there counts nowhere, whatever it is.
  """
  gate_ExDxF, up_ExDxF, down_ExFxD = matrices
  experts, choices = gate_ExDxF.shape[0], chosen_BxTxC.shape[-1]
  x_NxD = x_BxTxD.reshape(-1, x_BxTxD.shape[-1])
  expert = chosen_BxTxC.reshape(-1) - first
  expert = jnp.where((expert >= 0) & (expert < experts), expert, experts)
  order = jnp.argsort(expert)
  sizes_E = jnp.bincount(expert, length=experts + 1)[:experts]
  ours = (jnp.arange(order.size) < sizes_E.sum())[:, None]
  rows = jnp.where(ours, x_NxD[order // choices], 0)
  hidden = activate(jax.lax.ragged_dot(rows, gate_ExDxF, sizes_E))
  hidden *= jax.lax.ragged_dot(rows, up_ExDxF, sizes_E)
  out = jnp.where(ours, jax.lax.ragged_dot(hidden, down_ExFxD, sizes_E), 0)
  back = out[jnp.argsort(order)].reshape(*share_BxTxC.shape, -1)
  return (back * share_BxTxC[..., None]).sum(-2).astype(x_BxTxD.dtype)
