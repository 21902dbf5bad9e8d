"""The policy: a decoder-only transformer, one definition for training and for sampling.

Arrays: P prompts, G completions of each, B = P * G rows, S prompt tokens, T completion tokens, D
width, N query heads, K key heads, H head size, V vocabulary, L layers.

A prompt is run once and its keys are shared by its whole group, when sampling and when training
alike. In training the layers are scanned and rematerialised (one compiled layer, little memory); in
decoding they are unrolled, each with a cache of its own, because a cache that goes through a scan
is copied at every token.
"""

import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dca_jax.policy.attention import LANES, KeyValue, attend, choose_kernel, flash_attend
from dca_jax.policy.config import ACTIVATIONS, REMAT, PolicyConfig
from dca_jax.policy.experts import Experts
from dca_jax.policy.layers import RMSNorm, Weight, param, rotate, rotations
from dca_jax.policy.logprobs import Head
from dca_jax.policy.sharding import constrain


class Kind(typing.NamedTuple):
  """What a layer is, where layers differ; for the scan, arrays [L]."""

  windowed: typing.Any = None
  rotated: typing.Any = None


class Block(nn.Module):
  """Attention and gated MLP, each behind a norm and added to the stream.

  Called with `cache` and `clock` it decodes: it writes its keys into the cache, a ring, at `clock`,
  and reads all of the ring; otherwise it reads its own. `views` holds what layers read that read
  everything and, where there are windowed ones, what those read. Returns the new stream [B, T, D]
  and the keys and values that it read beside the prompt's.
  """

  config: PolicyConfig
  mesh: Mesh | None = None

  @nn.compact
  def __call__(self, x_BxTxD, prompt, kind: Kind, views, start_B, cache=None, clock=None):
    c = self.config
    both = len(views) > 1
    view = (
      jax.tree.map(lambda whole, near: jnp.where(kind.windowed, near, whole), *views)
      if both
      else views[0]
    )
    rope, own_mask_TxU, prompt_mask_PxTxS = view
    if kind.rotated is not None:
      rope = jnp.where(kind.rotated, rope[0], 1), jnp.where(kind.rotated, rope[1], 0)

    def weight(name, shape, axes, inputs=1, bias=False):
      rank = c.lora_rank if name in c.lora_targets else 0
      return Weight(shape, axes, inputs, c.dtype, bias, rank, c.lora_scale, self.mesh, name=name)

    y = RMSNorm(c, name="attention_norm")(x_BxTxD) if c.pre_norms else x_BxTxD
    q = weight(
      "q", (c.width, c.heads, c.head_dim), ("embed", "heads", "head_dim"), bias=c.qkv_bias
    )(y)
    k = weight(
      "k", (c.width, c.kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"), bias=c.qkv_bias
    )(y)
    v = weight(
      "v", (c.width, c.kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"), bias=c.qkv_bias
    )(y)
    if c.qk_norm:
      whole = c.qk_norm_whole
      q = RMSNorm(c, ("heads", "head_dim") if whole else ("head_dim",), name="q_norm")(q)
      k = RMSNorm(c, ("kv_heads", "head_dim") if whole else ("head_dim",), name="k_norm")(k)
    own = KeyValue(rotate(k, rope).transpose(0, 2, 3, 1), v.swapaxes(1, 2))
    if cache is not None:
      write, place = jax.lax.dynamic_update_slice_in_dim, clock % cache.v.shape[2]
      own = KeyValue(write(cache.k, own.k, place, 3), write(cache.v, own.v, place, 2))
    q, limits = rotate(q, rope), ((c.query_scalar or c.head_dim) ** -0.5, c.attention_soft_cap)
    kernel = c.attention
    if kernel == "auto":
      kernel = choose_kernel(self.mesh, q.shape[1], c.head_dim, c.dtype, c.attention_soft_cap)
    if cache is None and kernel != "plain":

      def flash(window):
        return lambda: flash_attend(q, own, prompt, start_B, window, *limits, kernel, self.mesh)

      y = jax.lax.cond(kind.windowed, flash(c.window), flash(0)) if both else flash(0)()
    else:
      y = attend(q, own, own_mask_TxU, prompt, prompt_mask_PxTxS, *limits)
    y = weight("o", (c.heads, c.head_dim, c.width), ("heads", "head_dim", "embed"), inputs=2)(y)
    x_BxTxD += RMSNorm(c, name="post_attention_norm")(y) if c.post_norms else y

    y = RMSNorm(c, name="mlp_norm")(x_BxTxD) if c.pre_norms else x_BxTxD
    if c.experts:
      y = Experts(c, self.mesh, name="experts")(y)
    else:
      gate = weight("gate", (c.width, c.mlp), ("embed", "mlp"))(y)
      up = weight("up", (c.width, c.mlp), ("embed", "mlp"))(y)
      y = weight("down", (c.mlp, c.width), ("mlp", "embed"))(ACTIVATIONS[c.activation](gate) * up)
    x_BxTxD += RMSNorm(c, name="post_mlp_norm")(y) if c.post_norms else y
    return x_BxTxD, own


class Prompts(typing.NamedTuple):
  """P prompts that have been read: what their continuations need of them."""

  last_PxD: jax.Array
  """The hidden states that predict the first tokens after them."""
  cache: KeyValue
  """Of every layer, [L, P, K, H, S] and [L, P, K, S, H]."""
  lengths_P: jax.Array

  @property
  def mask_PxS(self) -> jax.Array:
    """True where a prompt has a token."""
    return jnp.arange(self.cache.v.shape[3]) < self.lengths_P[:, None]


class Context(typing.NamedTuple):
  """What B rows that decode have read; rows p * G to (p + 1) * G - 1 share prompt p of P."""

  prompt: tuple[KeyValue, ...]
  """Of every layer, with P rows."""
  prompt_lengths_P: jax.Array
  cache: tuple[KeyValue, ...]
  """Of every layer a ring with B rows (`empty_cache`)."""
  clock: jax.Array
  """Tokens that the rings were given so far: the place of the next is `clock` modulo their size."""
  read_B: jax.Array
  """Tokens that each row has read itself. They are the newest of its ring."""


class Policy(nn.Module):
  """The transformer. `init_params` makes its parameters; the other public methods are pure
  functions of them."""

  config: PolicyConfig
  vocab_size: int
  """How many ids are tokens, and can be sampled."""
  mesh: Mesh | None = None
  """Of the devices over which rows and parameters are spread."""

  @property
  def rows(self) -> int:
    return self.config.vocab_size or self.vocab_size

  def setup(self):
    init = nn.initializers.normal(self.config.width**-0.5)
    shape = (self.rows, self.config.width)
    self.embedding_VxD = param(self, "embedding", init, ("vocab", "embed"), shape)
    if not self.config.tied:
      self.head_VxD = param(self, "head", init, ("vocab", "embed"), shape)
    self.blocks = nn.scan(
      nn.remat(Block, prevent_cse=False, policy=REMAT[self.config.remat]),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(0, 0, nn.broadcast, nn.broadcast),
      length=self.config.depth,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(self.config, self.mesh)
    self.final_norm = RMSNorm(self.config)

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
    c, steps_T = self.config, jnp.arange(tokens_BxT.shape[1])
    views = _views(c, start_B, steps_T, steps_T, prompt_mask_PxS)
    layers = range(c.depth)
    kind = Kind(
      jnp.array([i in c.windowed for i in layers]) if c.windowed else None,
      jnp.array([i not in c.unrotated for i in layers]) if c.unrotated else None,
    )
    x, own = self.blocks(self._embed(tokens_BxT), prompt, kind, views, start_B)
    return self.final_norm(x), own

  def _embed(self, tokens):
    x = constrain(
      self.embedding_VxD[tokens].astype(self.config.dtype), self.mesh, "rows", None, "embed"
    )
    return x * self.config.width**0.5 if self.config.scale_embedding else x

  def _finish(self, x):
    return self.final_norm(x)

  # What the rest of the program calls.

  def init_params(self, key: jax.Array):
    """Parameters, boxed with their logical axis names (`nn.unbox` takes the names off)."""
    params = self.clone(mesh=None).init(key, jnp.zeros((1, 2), jnp.int32))["params"]

    def cast(path, x):
      return (
        x
        if any(str(getattr(key, "key", "")).startswith("lora_") for key in path)
        else x.astype(self.config.kept)
      )

    return jax.tree_util.tree_map_with_path(cast, params)

  def head(self, params) -> Head:
    """What makes logits of the hidden states."""
    matrix_VxD = params["embedding" if self.config.tied else "head"]
    return Head(matrix_VxD, self.config.logit_soft_cap, self.vocab_size, self.mesh)

  def completion_hidden(self, params, prompts_PxS, prompt_lengths_P, completions_BxT) -> jax.Array:
    """Hidden states [B, T, D] from which each completion token is predicted; prompts are run once
    per group.

    Row p * G + g is completion g of prompt p.
    """
    prompts = self.read_prompts(params, prompts_PxS, prompt_lengths_P)
    return self.continuation_hidden(params, prompts, completions_BxT)

  def read_prompts(self, params, prompts_PxS, prompt_lengths_P) -> Prompts:
    """Runs the prompts once; what stands behind their lengths is never read."""
    hidden_PxSxD, cache = typing.cast(typing.Any, self.apply({"params": params}, prompts_PxS))
    last_PxD = jnp.take_along_axis(hidden_PxSxD, prompt_lengths_P[:, None, None] - 1, 1)[:, 0]
    return Prompts(last_PxD, cache, prompt_lengths_P)

  def continuation_hidden(self, params, prompts: Prompts, completions_BxT) -> jax.Array:
    """`completion_hidden` after prompts that have been read."""
    groups = completions_BxT.shape[0] // prompts.lengths_P.shape[0]
    start_B = jnp.repeat(prompts.lengths_P, groups)
    # Nothing is predicted from the last token; it is read where else the kernels would pad.
    t = completions_BxT.shape[1]
    tokens = completions_BxT[:, : t - (t % LANES > 0)]
    read = tokens, start_B, prompts.cache, prompts.mask_PxS
    hidden, _ = self.apply({"params": params}, *read)
    first = jnp.repeat(prompts.last_PxD, groups, 0)[:, None]
    return jnp.concatenate([first, hidden[:, : t - 1]], 1)

  def read_continuations(
    self, params, prompts: Prompts, tokens_PxU, lengths_P
  ) -> tuple[jax.Array, KeyValue]:
    """Runs one continuation of each prompt.

    Returns:
      The hidden states [P, D] that predict what comes after them, and their own keys and values in
      every layer, [L, P, K, H, U] and [L, P, K, U, H].
    """
    read = tokens_PxU, prompts.lengths_P, prompts.cache, prompts.mask_PxS
    hidden_PxUxD, own = typing.cast(typing.Any, self.apply({"params": params}, *read))
    ends_P = jnp.maximum(lengths_P, 1) - 1
    return jnp.take_along_axis(hidden_PxUxD, ends_P[:, None, None], 1)[:, 0], own

  # Decoding.

  def empty_cache(self, rows: int, size: int) -> tuple[KeyValue, ...]:
    """Of every layer a ring for `size` tokens of each row; a windowed layer never needs more than
    its window."""
    c = self.config

    def ring(size: int) -> KeyValue:
      shape = rows, c.kv_heads, size, c.head_dim
      return KeyValue(jnp.zeros(shape, c.dtype).swapaxes(2, 3), jnp.zeros(shape, c.dtype))

    return tuple(ring(min(size, c.window) if i in c.windowed else size) for i in range(c.depth))

  def layers(self, params) -> list:
    """The parameters of each layer, matrices as products take them, so that decoding lays none out
    anew at every token."""

    def flat(path, x):
      if x.ndim < 3 or path[0].key not in ("q", "k", "v", "o"):
        return x
      return x.reshape(-1, x.shape[-1]) if path[0].key == "o" else x.reshape(x.shape[0], -1)

    def layer(i: int):
      return jax.tree.map_with_path(lambda path, a: flat(path, a[i]), params["blocks"])

    return [layer(i) for i in range(self.config.depth)]

  def decode(self, params, layers, context: Context, tokens_B) -> tuple[jax.Array, tuple]:
    """Reads one token of every row.

    Args:
      layers: what `layers` returned.

    Returns:
      Hidden states [B, D] that predict the next tokens, and the cache with this one's keys in it.
    """
    c, (prompt, prompt_lengths_P, cache, clock, read_B) = self.config, context
    groups = tokens_B.shape[0] // prompt_lengths_P.shape[0]
    position_B = jnp.repeat(prompt_lengths_P, groups) + read_B
    places_S = jnp.arange(prompt[0].v.shape[2])
    prompt_mask_Px1xS = (places_S < prompt_lengths_P[:, None])[:, None]
    near_Bx1xS = (position_B[:, None] - places_S < c.window)[:, None]
    near_Bx1xS &= jnp.repeat(prompt_mask_Px1xS, groups, 0)
    x = self.apply({"params": params}, tokens_B[:, None], method="_embed")
    updated = []
    for i, (block, keys, own) in enumerate(zip(layers, prompt, cache, strict=True)):
      windowed, size = i in c.windowed, own.v.shape[2]
      age_U = (clock - jnp.arange(size)) % size
      own_mask_Bx1xU = (age_U <= read_B[:, None])[:, None]
      if windowed:
        own_mask_Bx1xU &= age_U < c.window
      mask = near_Bx1xS if windowed else prompt_mask_Px1xS
      view = rotations(position_B[:, None], c, windowed), own_mask_Bx1xU, mask
      layer, kind = Block(c, self.mesh, parent=None), Kind(rotated=i not in c.unrotated)
      block = jax.tree.map(lambda x, whole: x.reshape(whole.shape[1:]), block, params["blocks"])
      x, read = layer.apply({"params": block}, x, keys, kind, (view,), None, own, clock)
      updated.append(read)
    hidden_Bx1xD = typing.cast(jax.Array, self.apply({"params": params}, x, method="_finish"))
    return hidden_Bx1xD[:, 0], tuple(updated)


def _views(config: PolicyConfig, start_B, queries_T, keys_U, prompt_mask_PxS) -> tuple[tuple, ...]:
  """(rope, own mask [T, U], prompt mask [P, T or 1, S]) of layers that read everything and, if any,
  of windowed ones.

  Token t of a row is at position `start_B` + t; `queries_T` and `keys_U` count the tokens of the
  block.
  """
  positions_BxT = queries_T if start_B is None else start_B[:, None] + queries_T
  back_TxU = queries_T[:, None] - keys_U
  prompt_mask = None if prompt_mask_PxS is None else prompt_mask_PxS[:, None]
  views = [(rotations(positions_BxT, config), back_TxU >= 0, prompt_mask)]
  if config.windowed:
    near_TxU = (back_TxU >= 0) & (back_TxU < config.window)
    if prompt_mask_PxS is not None:
      prompts, s = prompt_mask_PxS.shape
      positions_PxT = positions_BxT.reshape(prompts, -1, queries_T.size)[
        :, 0
      ]  # A group's rows begin together.
      prompt_mask = prompt_mask & (positions_PxT[..., None] - jnp.arange(s) < config.window)
    views.append((rotations(positions_BxT, config, windowed=True), near_TxU, prompt_mask))
  return tuple(views)
