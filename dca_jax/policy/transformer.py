"""The policy: a decoder-only transformer, one definition for training and for sampling.

Arrays: P prompts, G completions of each, B = P * G rows, S prompt tokens, T completion tokens, D
width, N query heads, K key heads, H head size, V vocabulary, L layers.

A prompt is run once and its keys are shared by its whole group, when sampling and when training
alike. In training the layers are scanned and rematerialised (one compiled layer, little memory); in
decoding they are unrolled, each with a cache of its own, because a cache that goes through a scan
is copied at every token.
"""

import functools
import operator
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dca_jax.policy.attention import LANES, KeyValue
from dca_jax.policy.block import Block, Kind, Round, View, scanned
from dca_jax.policy.config import PolicyConfig
from dca_jax.policy.layers import RMSNorm, Weight, param, rotations
from dca_jax.policy.logprobs import Head
from dca_jax.policy.sharding import constrain


class Prompts(typing.NamedTuple):
  """P prompts that have been read: what their continuations need of them."""

  last_PxD: jax.Array
  """The hidden states that predict the first tokens after them."""
  cache: tuple[KeyValue, ...]
  """Of every layer that has keys, [L, P, K, H, S] and [L, P, K, S, H]; where layers differ in
  shape, first of windowed ones, with axes for rounds and for layers of a round, then of others."""
  lengths_P: jax.Array

  @property
  def mask_PxS(self) -> jax.Array:
    """True where a prompt has a token."""
    return jnp.arange(self.cache[-1].v.shape[3]) < self.lengths_P[:, None]


def by_layer(stacks: tuple[KeyValue, ...]) -> tuple[KeyValue, ...]:
  """`Prompts.cache`, or what is laid out as that, layer by layer."""
  layers: list[KeyValue] = []
  for i in range(stacks[-1].v.shape[0]):
    of_round = [jax.tree.map(lambda x, i=i: x[i], stack) for stack in stacks]
    if len(stacks) > 1:
      windowed = range(stacks[0].v.shape[1])
      layers += [jax.tree.map(lambda x, j=j: x[j], of_round[0]) for j in windowed]
    layers.append(of_round[-1])
  return tuple(layers)


def by_round(layers: tuple[KeyValue, ...], n: int) -> tuple[KeyValue, ...]:
  """The inverse of `by_layer`, for rounds of `n` layers."""
  last = jax.tree.map(lambda *x: jnp.stack(x), *layers[n - 1 :: n])
  if n == 1:
    return (last,)
  windowed = [layer for i, layer in enumerate(layers) if (i + 1) % n]

  def rounds(*x):
    whole = jnp.stack(x)
    return whole.reshape(-1, n - 1, *whole.shape[1:])

  return jax.tree.map(rounds, *windowed), last


class Context(typing.NamedTuple):
  """What B rows that decode have read; rows p * G to (p + 1) * G - 1 share prompt p of P."""

  prompt: tuple[KeyValue, ...]
  """Of every layer that has keys, with P rows."""
  prompt_lengths_P: jax.Array
  cache: tuple[KeyValue, ...]
  """Of the same layers a ring with B rows (`empty_cache`)."""
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
    c = self.config
    self.embedding_VxD = self._by_token("embedding", c.width)
    if not c.tied:
      self.head_VxD = self._by_token("head", c.width)
    if c.layer_embedding:
      shape, axes = (c.width, c.depth * c.layer_embedding), ("embed", "embedded")
      self.layer_embedding_VxLE = self._by_token("layer_embedding", shape[1], c.layer_embedding)
      self.layer_projection = Weight(shape, axes, 1, c.dtype, mesh=self.mesh)
      self.layer_projection_norm = RMSNorm(c, ("embedded",))
    own = c.depth - c.kv_shared
    by_round: tuple = (0, 0, nn.broadcast, nn.broadcast)
    self.blocks = scanned(Round, by_round, own // c.round, "layers")(c, self.mesh)
    if c.kv_shared:
      by_round = (nn.broadcast, 0, *[nn.broadcast] * 3)
      rounds = scanned(Round, by_round, c.kv_shared // c.round, "layers")
      self.shared_blocks = rounds(c, self.mesh, own)
    self.final_norm = RMSNorm(c)

  def _by_token(self, name: str, size: int, part: int = 0):
    init = nn.initializers.normal((part or size) ** -0.5)
    return param(self, name, init, ("vocab", "embed"), (self.rows, size))

  def __call__(self, tokens_BxT, start_B=None, prompt=None, prompt_mask_PxS=None):
    """Runs a block of tokens that begins at position `start_B` of its rows.

    Args:
      tokens_BxT: token ids.
      start_B: position of the first token of each row; 0 when left out.
      prompt: keys and values of the prompts (`Prompts.cache`), or None.
      prompt_mask_PxS: true where prompt p has a token.

    Returns:
      The hidden states [B, T, D] and the block's own keys and values, laid out as `Prompts.cache`.
    """
    c, steps_T = self.config, jnp.arange(tokens_BxT.shape[1])
    views = _views(c, start_B, steps_T, steps_T, prompt_mask_PxS)
    x, embedded = self._embed(tokens_BxT)
    kinds = functools.partial(_kinds, c, embedded)
    prompts, first = prompt or (None,) * min(c.round, 2), c.depth - c.kv_shared
    x, own = self.blocks(x, prompts, kinds(0, first), views, start_B)
    if c.kv_shared:
      read = [_last(stacks) for stacks in zip(own, prompts, strict=True)]
      x, _ = self.shared_blocks(x, None, kinds(first, c.depth), views, start_B, read)
    return self.final_norm(x), own

  def _embed(self, tokens):
    """The stream [B, T, D] with which layers begin, and what embeddings of their own have for them,
    [L, B, T, E] or None."""
    c, mesh = self.config, self.mesh
    x = constrain(self.embedding_VxD[tokens].astype(c.dtype), mesh, "rows", None, "embed")
    x = x * c.width**0.5 if c.scale_embedding else x
    if not (e := c.layer_embedding):
      return x, None
    of_token = self.layer_embedding_VxLE[tokens].astype(c.dtype) * e**0.5
    of_token = constrain(of_token, mesh, "rows", None, None).reshape(*tokens.shape, c.depth, e)
    of_stream = (self.layer_projection(x) * c.width**-0.5).reshape(of_token.shape)
    both = (self.layer_projection_norm(of_stream) + of_token) * 2**-0.5
    return x, both.transpose(2, 0, 1, 3)

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
  ) -> tuple[jax.Array, tuple[KeyValue, ...]]:
    """Runs one continuation of each prompt.

    Returns:
      The hidden states [P, D] that predict what comes after them, and their own keys and values,
      laid out as `Prompts.cache`, with U places.
    """
    read = tokens_PxU, prompts.lengths_P, prompts.cache, prompts.mask_PxS
    hidden_PxUxD, own = typing.cast(typing.Any, self.apply({"params": params}, *read))
    ends_P = jnp.maximum(lengths_P, 1) - 1
    return jnp.take_along_axis(hidden_PxUxD, ends_P[:, None, None], 1)[:, 0], own

  # Decoding.

  def empty_cache(self, rows: int, size: int) -> tuple[KeyValue, ...]:
    """Of every layer that has keys a ring for `size` tokens of each row; a windowed layer never
    needs more than its window."""
    c = self.config

    def ring(layer: int) -> KeyValue:
      own = c.of_layer(layer)
      shape = rows, own.kv_heads, min(size, c.window) if layer in c.windowed else size, own.head_dim
      return KeyValue(jnp.zeros(shape, c.dtype).swapaxes(2, 3), jnp.zeros(shape, c.dtype))

    return tuple(ring(i) for i in range(c.depth - c.kv_shared))

  def layers(self, params) -> list:
    """The parameters of each layer, matrices as products take them, so that decoding lays none out
    anew at every token."""

    def flat(path, x):
      if x.ndim < 3 or path[0].key not in ("q", "k", "v", "o"):
        return x
      return x.reshape(-1, x.shape[-1]) if path[0].key == "o" else x.reshape(x.shape[0], -1)

    layers = range(self.config.depth)
    return [jax.tree.map_with_path(flat, self._layer(params, i)) for i in layers]

  def _layer(self, params, i: int):
    """The parameters of a layer."""
    keys, index = self.config.place(i)
    return jax.tree.map(lambda a: a[index], functools.reduce(operator.getitem, keys, params))

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
    embed = self.apply({"params": params}, tokens_B[:, None], method="_embed")
    x, embedded = typing.cast(typing.Any, embed)
    updated: list[KeyValue] = []
    for i, block in enumerate(layers):
      windowed, shared, source = i in c.windowed, c.is_shared(i), c.kv_source(i)
      own = updated[source] if shared else cache[i]
      size, of_layer = own.v.shape[2], c.of_layer(i)
      age_U = (clock - jnp.arange(size)) % size
      own_mask_Bx1xU = (age_U <= read_B[:, None])[:, None]
      if windowed:
        own_mask_Bx1xU &= age_U < c.window
      mask = near_Bx1xS if windowed else prompt_mask_Px1xS
      view = View(rotations(position_B[:, None], of_layer, windowed), own_mask_Bx1xU, mask)
      layer = Block(c, self.mesh, i, parent=None)
      kind = Kind(None, i not in c.unrotated, None if embedded is None else embedded[i])
      shapes = jax.eval_shape(lambda i=i: self._layer(params, i))
      block = jax.tree.map(lambda x, whole: x.reshape(whole.shape), block, shapes)
      read = prompt[source], kind, (view,), None, own, clock
      x, keys = typing.cast(typing.Any, layer.apply({"params": block}, x, *read))
      if not shared:
        updated.append(keys)
    hidden_Bx1xD = typing.cast(jax.Array, self.apply({"params": params}, x, method="_finish"))
    return hidden_Bx1xD[:, 0], tuple(updated)


def _kinds(config: PolicyConfig, embedded_LxBxTxE, first: int, end: int) -> tuple[Kind, ...]:
  """Of layers `first` to `end` - 1, as `Round` takes them."""
  c, own = config, None if embedded_LxBxTxE is None else embedded_LxBxTxE[first:end]
  if c.round > 1:
    if own is None:
      return Kind(), Kind()
    rounds = own.reshape(-1, c.round, *own.shape[1:])
    return Kind(embedded=rounds[:, :-1]), Kind(embedded=rounds[:, -1])
  windowed = jnp.array([i in c.windowed for i in range(first, end)]) if c.windowed else None
  rotated = jnp.array([i not in c.unrotated for i in range(first, end)]) if c.unrotated else None
  return (Kind(windowed, rotated, own),)


def _last(stacks):
  """What the last layer has of stacks by layers, or by rounds and layers, of keys and values."""
  return jax.tree.map(lambda x: x[(-1,) * (x.ndim - 4)], stacks)


def _views(config: PolicyConfig, start_B, queries_T, keys_U, prompt_mask_PxS) -> tuple[View, ...]:
  """What layers see that read everything and, if any, what windowed ones do.

  Token t of a row is at position `start_B` + t; `queries_T` and `keys_U` count the tokens of the
  block.
  """
  c, layers = config, range(config.depth)
  positions_BxT = queries_T if start_B is None else start_B[:, None] + queries_T
  back_TxU = queries_T[:, None] - keys_U
  prompt_mask = None if prompt_mask_PxS is None else prompt_mask_PxS[:, None]
  whole = c.of_layer(next((i for i in layers if i not in c.windowed), 0))
  views = [View(rotations(positions_BxT, whole), back_TxU >= 0, prompt_mask)]
  if c.windowed:
    near_TxU = (back_TxU >= 0) & (back_TxU < c.window)
    if prompt_mask_PxS is not None:
      prompts, s = prompt_mask_PxS.shape
      # A group's rows begin together.
      positions_PxT = positions_BxT.reshape(prompts, -1, queries_T.size)[:, 0]
      prompt_mask = prompt_mask & (positions_PxT[..., None] - jnp.arange(s) < c.window)
    near = c.of_layer(c.windowed[0])
    views.append(View(rotations(positions_BxT, near, windowed=True), near_TxU, prompt_mask))
  return tuple(views)
