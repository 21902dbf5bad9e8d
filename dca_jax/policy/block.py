"""A layer of the transformer, and the round of layers after which their shapes repeat.

Arrays are named as in `transformer.py`.
"""

import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dca_jax.policy.attention import KeyValue, attend, choose_kernel, flash_attend
from dca_jax.policy.config import ACTIVATIONS, REMAT, PolicyConfig
from dca_jax.policy.experts import Experts
from dca_jax.policy.layers import RMSNorm, Weight, normed, param, rotate


class Kind(typing.NamedTuple):
  """What a layer has that others of its shapes have not; for the scan, with an axis in front."""

  windowed: typing.Any = None
  rotated: typing.Any = None
  embedded: typing.Any = None
  """[B, T, E], what its own embedding has of each token."""


class View(typing.NamedTuple):
  """What the tokens of a block may read, and where they are."""

  rope: tuple[jax.Array, jax.Array]
  own_mask: jax.Array
  """[T, U], or [B, T, U] where rows differ."""
  prompt_mask: jax.Array | None
  """As `attend` takes it."""


class Block(nn.Module):
  """Attention and gated MLP, each behind a norm and added to the stream.

  Called with a `clock` it decodes: it writes its keys into `own`, a ring, at `clock`, and reads all
  of the ring. A shared layer has no keys, and reads `own`. Otherwise a layer reads its own. `views`
  holds what layers read that read everything and, where it depends on `kind.windowed`, what the
  others read. Returns the new stream [B, T, D] and the keys and values that it read beside the
  prompt's.
  """

  config: PolicyConfig
  mesh: Mesh | None = None
  layer: int = 0
  """Its number, or that of one of its shapes."""

  @nn.compact
  def __call__(self, x_BxTxD, prompt, kind: Kind, views, start_B, own=None, clock=None):
    c, view, by_kind = self._own, views[0], len(views) > 1
    if by_kind:
      view = jax.tree.map(lambda whole, near: jnp.where(kind.windowed, near, whole), *views)
    if kind.rotated is not None:
      cos, sin = view.rope
      rope = jnp.where(kind.rotated, cos, 1), jnp.where(kind.rotated, sin, 0)
      view = view._replace(rope=rope)

    y = RMSNorm(c, name="attention_norm")(x_BxTxD) if c.pre_norms else x_BxTxD
    q = rotate(self._normed("q", "heads", self._heads("q", "heads")(y)), view.rope)
    if not c.is_shared(self.layer):
      own = self._keys(y, view.rope, own, clock)
    limits = (c.query_scalar or c.head_dim) ** -0.5, c.attention_soft_cap
    kernel = c.attention
    if kernel == "auto":
      kernel = choose_kernel(self.mesh, q.shape[1], c.head_dim, c.dtype, c.attention_soft_cap)
    if clock is None and kernel != "plain":

      def flash(window):
        return lambda: flash_attend(q, own, prompt, start_B, window, *limits, kernel, self.mesh)

      always = flash(c.window if self.layer in c.windowed else 0)
      y = jax.lax.cond(kind.windowed, flash(c.window), flash(0)) if by_kind else always()
    else:
      y = attend(q, own, view.own_mask, prompt, view.prompt_mask, *limits)
    shape, axes = (c.heads, c.head_dim, c.width), ("heads", "head_dim", "embed")
    y = self._weight("o", shape, axes, inputs=2)(y)
    x_BxTxD += RMSNorm(c, name="post_attention_norm")(y) if c.post_norms else y
    x_BxTxD = self._mlp(x_BxTxD)
    if kind.embedded is not None:
      x_BxTxD = self._embedded(x_BxTxD, kind.embedded)
    if c.layer_scale:
      scale = param(self, "layer_scale", nn.initializers.ones, ("scalar",), (1,))
      x_BxTxD *= jax.lax.stop_gradient(scale).astype(x_BxTxD.dtype)
    return x_BxTxD, own

  @property
  def _own(self) -> PolicyConfig:
    return self.config.of_layer(self.layer)

  def _weight(self, name, shape, axes, inputs=1, bias=False):
    c = self._own
    rank = c.lora_rank if name in c.lora_targets else 0
    return Weight(shape, axes, inputs, c.dtype, bias, rank, c.lora_scale, self.mesh, name=name)

  def _heads(self, name, heads):
    c = self._own
    shape, axes = (c.width, getattr(c, heads), c.head_dim), ("embed", heads, "head_dim")
    return self._weight(name, shape, axes, bias=c.qkv_bias)

  def _normed(self, name, heads, x):
    c = self._own
    axes = (heads, "head_dim") if c.qk_norm_whole else ("head_dim",)
    return RMSNorm(c, axes, name=f"{name}_norm")(x) if c.qk_norm else x

  def _keys(self, y, rope, ring: KeyValue | None, clock) -> KeyValue:
    """The layer's own keys and values, or the ring with them in it."""
    c = self._own
    k = self._heads("k", "kv_heads")(y)
    v = k if c.global_k_eq_v else self._heads("v", "kv_heads")(y)
    k = self._normed("k", "kv_heads", k)
    if c.v_norm:
      v = normed(v, c.norm_eps).astype(v.dtype)
    own = KeyValue(rotate(k, rope).transpose(0, 2, 3, 1), v.swapaxes(1, 2))
    if ring is None:
      return own
    write, place = jax.lax.dynamic_update_slice_in_dim, clock % ring.v.shape[2]
    return KeyValue(write(ring.k, own.k, place, 3), write(ring.v, own.v, place, 2))

  def _mlp(self, x_BxTxD):
    c = self._own
    y = RMSNorm(c, name="mlp_norm")(x_BxTxD) if c.pre_norms else x_BxTxD
    if c.mlp_is_experts:
      y = Experts(c, self.mesh, name="experts")(y, y)
    else:
      gate = self._weight("gate", (c.width, c.mlp), ("embed", "mlp"))(y)
      up = self._weight("up", (c.width, c.mlp), ("embed", "mlp"))(y)
      hidden = ACTIVATIONS[c.activation](gate) * up
      y = self._weight("down", (c.mlp, c.width), ("mlp", "embed"))(hidden)
    if c.experts_beside:
      more = Experts(c, self.mesh, name="experts")(
        RMSNorm(c, name="pre_experts_norm")(x_BxTxD), x_BxTxD
      )
      y = RMSNorm(c, name="mlp_out_norm")(y) + RMSNorm(c, name="post_experts_norm")(more)
    return x_BxTxD + (RMSNorm(c, name="post_mlp_norm")(y) if c.post_norms else y)

  def _embedded(self, x_BxTxD, embedded_BxTxE):
    """The stream and, through a gate, what the layer's own embedding has of each token."""
    c = self._own
    sizes, axes = (c.width, c.layer_embedding), ("embed", "embedded")
    gate = self._weight("embedded_gate", sizes, axes)(x_BxTxD)
    y = ACTIVATIONS[c.activation](gate) * embedded_BxTxE
    y = self._weight("embedded_out", sizes[::-1], axes[::-1])(y)
    return x_BxTxD + RMSNorm(c, name="post_embedded_norm")(y)


class Round(nn.Module):
  """What is scanned: a layer, or where the shapes of layers differ, windowed ones, scanned
  themselves, and one that is not.

  Prompts, kinds and returned keys are tuples: (of windowed layers,) of the last layer. `read` holds
  what shared layers read, in the same order: keys and values of the block and of the prompts.
  """

  config: PolicyConfig
  mesh: Mesh | None = None
  first: int = 0
  """The layer with which its stack begins."""

  def setup(self):
    c, n = self.config, self.config.round
    layer = nn.remat(Block, prevent_cse=False, policy=REMAT[c.remat])
    self.last = layer(c, self.mesh, self.first + n - 1)
    if n == 1:
      nn.share_scope(self, self.last)  # Its parameters have no name of their own.
    else:
      read = nn.broadcast if c.is_shared(self.first) else 0
      axes = (read, 0, *[nn.broadcast] * 3)
      self.windowed = scanned(layer, axes, n - 1, "round")(c, self.mesh, self.first)

  def __call__(self, x_BxTxD, prompts, kinds, views, start_B, read=None):
    read = read or [(None, prompt) for prompt in prompts]
    keys = []
    if self.config.round > 1:
      own, prompt = read[0]
      x_BxTxD, own = self.windowed(x_BxTxD, prompt, kinds[0], views[1:], start_B, own)
      keys, views = [own], views[:1]
    own, prompt = read[-1]
    x_BxTxD, own = self.last(x_BxTxD, prompt, kinds[-1], views, start_B, own)
    return x_BxTxD, (*keys, own)


def scanned(module, in_axes, length: int, axis: str):
  """`module` so often, each with parameters of its own, which have an `axis` in front."""
  return nn.scan(
    module,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=in_axes,
    length=length,
    metadata_params={nn.PARTITION_NAME: axis},
  )
