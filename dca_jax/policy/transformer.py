"""The policy: a decoder-only transformer, one definition for training and for sampling.

Arrays: P prompts, G completions of each, B = P * G rows, S prompt tokens, T completion tokens, D
width, N query heads, K key heads, H head size, V vocabulary, L layers.

A prompt is run once and its keys are shared by its whole group, when sampling and when training
alike. In training the layers are scanned and rematerialised (one compiled layer, little memory); in
decoding they are unrolled, each with a cache of its own, because a cache that goes through a scan
is copied at every token.
"""

import dataclasses
import math
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dca_jax.checks import at_least, one_of, positive
from dca_jax.doors import door
from dca_jax.policy.attention import KeyValue, attend, choose_kernel, flash_attend
from dca_jax.policy.logprobs import Head
from dca_jax.policy.sharding import constrain


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
  """The `policy` section. Its defaults make a small policy that begins from nothing."""

  pretrained: str = ""
  """A Hugging Face folder or hub id to start from; its config.json then decides every key but
  `dtype`, `weights`, `remat`, `attention` and those of LoRA."""
  family: str = door("")
  """What config.json and the tensors' names mean: empty for the built-in families, which go by its
  `model_type`; or your own, MODULE:CLASS."""
  lora_rank: int = 0
  """Rank of the adapters, which alone are trained; 0 trains everything. What they adapt is kept in
  `dtype`."""
  lora_alpha: float = 16.0
  """Adapters count alpha / rank."""
  lora_targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
  """Which matrices of a layer have adapters."""
  vocab_size: int = 0
  """Rows of the embedding; 0 makes one for each token of the tokenizer. Ids that are no token are
  never sampled."""
  tied: bool = True
  """The embedding is also the output matrix."""
  width: int = 64
  depth: int = 3
  heads: int = 2
  kv_heads: int = 1
  head_dim: int = 32
  mlp: int = 192
  """Hidden size of the gated MLP."""
  activation: str = "silu"
  """`silu` or `gelu_tanh`, of the MLP's gate."""
  rope_theta: float = 10_000.0
  rope_scaling: tuple[float, ...] = ()
  """(factor,) divides all rotary frequencies. (factor, low, high, original), as in Llama 3.1,
  divides those that turn less than `low` times in `original` positions, leaves those that turn more
  than `high` times, and blends between."""
  window: int = 0
  """Positions that a windowed layer reads, its own included."""
  windowed: tuple[int, ...] = ()
  """Layers, counted from 0, that read a window and not all before them."""
  local_rope_theta: float = 0.0
  """Of the windowed layers, without scaling; 0: they rotate as the others do."""
  qkv_bias: bool = False
  query_scalar: float = 0.0
  """Attention scores are divided by its square root; 0 stands for head_dim."""
  attention_soft_cap: float = 0.0
  """Attention scores are squeezed between -cap and cap (Gemma 2); 0 leaves them."""
  logit_soft_cap: float = 0.0
  scale_embedding: bool = False
  """Multiply what is read from the embedding by width^1/2 (Gemma)."""
  norm_eps: float = 1e-6
  norm_plus_one: bool = False
  """Norms scale by 1 + weight (Gemma)."""
  post_norms: bool = False
  """Norms behind attention and MLP too (Gemma 2)."""
  qk_norm: bool = False
  """Normalise queries and keys in each head, as Qwen3 and Gemma 3 do; it bears much higher learning
  rates."""
  dtype: str = "float32"
  """Type of activations and matrix products."""
  weights: str = "float32"
  """Type that trained weights are kept in; `bfloat16` needs half the memory for them, and every
  update rounds at random, so that changes too small to show are right on average. Adapters are
  always float32."""
  remat: str = "projections"
  """What the forward pass of an update keeps for the backward pass: `all`, `projections` (results
  of the matrix products with weights), or `layers` (what goes into each layer), which takes least
  memory and a third more time."""
  attention: str = "auto"
  """`plain`, or a kernel for blocks of tokens (decoding is plain): `splash` for TPUs, `cudnn` for
  GPUs in bfloat16. `auto` takes what the devices have."""

  def check(self) -> dict[str, str]:
    bad = positive(self, "width", "depth", "heads", "kv_heads", "mlp", "lora_alpha")
    bad |= at_least(0, self, "vocab_size", "local_rope_theta", "query_scalar", "norm_eps")
    bad |= at_least(0, self, "attention_soft_cap", "logit_soft_cap") | one_of(
      self, "activation", *_ACTIVATIONS
    )
    bad |= one_of(self, "dtype", "float32", "bfloat16") | one_of(
      self, "weights", "float32", "bfloat16"
    )
    bad |= one_of(self, "remat", *_REMAT) | one_of(
      self, "attention", "auto", "plain", "splash", "cudnn"
    )
    if self.head_dim < 2 or self.head_dim % 2:
      bad["head_dim"] = "must be even and positive, for rotary positions"
    if self.kv_heads > 0 and self.heads % self.kv_heads:
      bad["heads"] = f"must be a multiple of policy.kv_heads ({self.kv_heads})"
    if self.rope_theta <= 1:
      bad["rope_theta"] = "must be above 1"
    scaling = self.rope_scaling
    if (
      len(scaling) not in (0, 1, 4)
      or min(scaling, default=1) <= 0
      or (scaling[1:] and scaling[1] >= scaling[2])
    ):
      bad["rope_scaling"] = (
        "must be (), (factor,) or (factor, low, high, original), positive, with low below high"
      )
    if not all(type(i) is int and 0 <= i < self.depth for i in self.windowed):
      bad["windowed"] = f"must be layers from 0 to {self.depth - 1}"
    if self.windowed and self.window < 1:
      bad["window"] = "must be at least 1 with policy.windowed"
    if self.lora_rank < 0 or (self.lora_rank and not self.pretrained):
      bad["lora_rank"] = "must be 0, or positive with policy.pretrained"
    if not self.lora_targets or set(self.lora_targets) - _MATRICES:
      bad["lora_targets"] = f"must be some of {', '.join(sorted(_MATRICES))}"
    if self.weights == "bfloat16" and not self.pretrained:
      bad["weights"] = "can be 'bfloat16' only with policy.pretrained"
    if self.attention == "cudnn" and (self.dtype != "bfloat16" or self.attention_soft_cap):
      bad["attention"] = (
        "can be 'cudnn' only with policy.dtype 'bfloat16' and without policy.attention_soft_cap"
      )
    return bad

  def unused(self) -> dict[str, str]:
    adapted = dict.fromkeys(("lora_alpha", "lora_targets"), "policy.lora_rank is 0")
    if self.lora_rank:
      adapted = {
        "weights": "policy.lora_rank is not 0, and what is not trained is kept in policy.dtype"
      }
    if self.pretrained:
      keys = [
        field.name for field in dataclasses.fields(self) if field.name not in (*FREE, "pretrained")
      ]
      return adapted | dict.fromkeys(keys, "policy.pretrained is set, whose config.json decides it")
    adapted["family"] = "policy.pretrained is empty"
    windows = (
      {}
      if self.windowed
      else dict.fromkeys(("window", "local_rope_theta"), "policy.windowed names no layer")
    )
    return adapted | windows

  @property
  def kept(self) -> str:
    """Type in which weights are kept, but for adapters."""
    return self.dtype if self.lora_rank else self.weights

  @property
  def lora_scale(self) -> float:
    return self.lora_alpha / max(1, self.lora_rank)


# Whatever the model.
FREE = (
  "family",
  "dtype",
  "weights",
  "remat",
  "attention",
  "lora_rank",
  "lora_alpha",
  "lora_targets",
)
_REMAT = {
  "all": jax.checkpoint_policies.everything_saveable,
  "projections": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "layers": jax.checkpoint_policies.nothing_saveable,
}
_MATRICES = {"q", "k", "v", "o", "gate", "up", "down"}
_ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": nn.gelu}


def _param(
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
    kernel = _param(self, "kernel", init, self.axes, self.shape)
    leading = x.shape[: x.ndim - self.inputs]
    x = x.reshape(-1, fan_in)
    y = x @ kernel.astype(self.dtype).reshape(fan_in, fan_out)
    if r := self.lora_rank:
      zeros, ins, outs = nn.initializers.zeros, slice(self.inputs), slice(self.inputs, None)
      a = _param(self, "lora_a", init, (*self.axes[ins], "rank"), (*self.shape[ins], r))
      b = _param(self, "lora_b", zeros, ("rank", *self.axes[outs]), (r, *self.shape[outs]))
      y += (
        self.lora_scale
        * (x @ a.astype(self.dtype).reshape(fan_in, r))
        @ b.astype(self.dtype).reshape(r, fan_out)
      )
    y = y.reshape(*leading, *self.shape[self.inputs :])
    if self.bias:
      zeros, axes = nn.initializers.zeros, self.axes[self.inputs :]
      y += _param(self, "bias", zeros, axes, self.shape[self.inputs :]).astype(self.dtype)
    return constrain(y, self.mesh, "rows", *[None] * (len(leading) - 1), *self.axes[self.inputs :])


class RMSNorm(nn.Module):
  """Root-mean-square norm in float32 (Zhang and Sennrich 2019)."""

  config: PolicyConfig
  axis: str = "embed"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    init = nn.initializers.zeros if c.norm_plus_one else nn.initializers.ones
    scale = _param(self, "scale", init, (self.axis,), x.shape[-1:])
    scale = 1 + scale.astype(jnp.float32) if c.norm_plus_one else scale
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + c.norm_eps) * scale).astype(
      x.dtype
    )


class Block(nn.Module):
  """Attention and gated MLP, each behind a norm and added to the stream.

  Called with `cache` and `clock` it decodes: it writes its keys into the cache, a ring, at `clock`,
  and reads all of the ring; otherwise it reads its own. `views` holds what layers read that read
  everything and, where there are windowed ones, what those read; `windowed` says which this layer
  is. Returns the new stream [B, T, D] and the keys and values that it read beside the prompt's.
  """

  config: PolicyConfig
  mesh: Mesh | None = None

  @nn.compact
  def __call__(self, x_BxTxD, prompt, windowed, views, start_B, cache=None, clock=None):
    c = self.config
    both = len(views) > 1
    view = (
      jax.tree.map(lambda whole, near: jnp.where(windowed, near, whole), *views)
      if both
      else views[0]
    )
    rope, own_mask_TxU, prompt_mask_PxTxS = view

    def weight(name, shape, axes, inputs=1, bias=False):
      rank = c.lora_rank if name in c.lora_targets else 0
      return Weight(shape, axes, inputs, c.dtype, bias, rank, c.lora_scale, self.mesh, name=name)

    y = RMSNorm(c, name="attention_norm")(x_BxTxD)
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
      q, k = RMSNorm(c, "head_dim", name="q_norm")(q), RMSNorm(c, "head_dim", name="k_norm")(k)
    own = KeyValue(_rotate(k, rope).transpose(0, 2, 3, 1), v.swapaxes(1, 2))
    if cache is not None:
      write, place = jax.lax.dynamic_update_slice_in_dim, clock % cache.v.shape[2]
      own = KeyValue(write(cache.k, own.k, place, 3), write(cache.v, own.v, place, 2))
    q, limits = _rotate(q, rope), ((c.query_scalar or c.head_dim) ** -0.5, c.attention_soft_cap)
    kernel = c.attention
    if kernel == "auto":
      kernel = choose_kernel(self.mesh, q.shape[1], c.head_dim, c.dtype, c.attention_soft_cap)
    if cache is None and kernel != "plain":

      def flash(window):
        return lambda: flash_attend(q, own, prompt, start_B, window, *limits, kernel, self.mesh)

      y = jax.lax.cond(windowed, flash(c.window), flash(0)) if both else flash(0)()
    else:
      y = attend(q, own, own_mask_TxU, prompt, prompt_mask_PxTxS, *limits)
    y = weight("o", (c.heads, c.head_dim, c.width), ("heads", "head_dim", "embed"), inputs=2)(y)
    x_BxTxD += RMSNorm(c, name="post_attention_norm")(y) if c.post_norms else y

    y = RMSNorm(c, name="mlp_norm")(x_BxTxD)
    gate = weight("gate", (c.width, c.mlp), ("embed", "mlp"))(y)
    up = weight("up", (c.width, c.mlp), ("embed", "mlp"))(y)
    y = weight("down", (c.mlp, c.width), ("mlp", "embed"))(_ACTIVATIONS[c.activation](gate) * up)
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
    self.embedding_VxD = _param(self, "embedding", init, ("vocab", "embed"), shape)
    if not self.config.tied:
      self.head_VxD = _param(self, "head", init, ("vocab", "embed"), shape)
    self.blocks = nn.scan(
      nn.remat(Block, prevent_cse=False, policy=_REMAT[self.config.remat]),
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
    windowed_L = jnp.array([i in c.windowed for i in range(c.depth)]) if c.windowed else None
    x, own = self.blocks(self._embed(tokens_BxT), prompt, windowed_L, views, start_B)
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
    read = completions_BxT[:, :-1], start_B, prompts.cache, prompts.mask_PxS
    hidden, _ = self.apply({"params": params}, *read)
    return jnp.concatenate([jnp.repeat(prompts.last_PxD, groups, 0)[:, None], hidden], 1)

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
    """The parameters of each layer."""
    return [jax.tree.map(lambda a, i=i: a[i], params["blocks"]) for i in range(self.config.depth)]

  def decode(self, params, layers, context: Context, tokens_B) -> tuple[jax.Array, tuple]:
    """Reads one token of every row.

    Args:
      layers: the parameters of each layer.

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
      view = _rope(position_B[:, None], c, windowed), own_mask_Bx1xU, mask
      layer = Block(c, self.mesh, parent=None)
      x, read = layer.apply({"params": block}, x, keys, None, (view,), None, own, clock)
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
  views = [(_rope(positions_BxT, config), back_TxU >= 0, prompt_mask)]
  if config.windowed:
    near_TxU = (back_TxU >= 0) & (back_TxU < config.window)
    if prompt_mask_PxS is not None:
      prompts, s = prompt_mask_PxS.shape
      positions_PxT = positions_BxT.reshape(prompts, -1, queries_T.size)[
        :, 0
      ]  # A group's rows begin together.
      prompt_mask = prompt_mask & (positions_PxT[..., None] - jnp.arange(s) < config.window)
    views.append((_rope(positions_BxT, config, windowed=True), near_TxU, prompt_mask))
  return tuple(views)


def _rope(positions_BxT, config: PolicyConfig, windowed: bool = False):
  """Cosines and sines [B, T, 1, H / 2] of the rotary position embedding (Su et al. 2021),
  half-rotation form."""
  local = windowed and config.local_rope_theta > 0
  theta, scaling = (
    (config.local_rope_theta, ()) if local else (config.rope_theta, config.rope_scaling)
  )
  frequencies = theta ** -(jnp.arange(0, config.head_dim, 2) / config.head_dim)
  if scaling:
    kept = jnp.float32(0)
    if len(scaling) > 1:
      low, high, original = scaling[1:]
      kept = jnp.clip((original * frequencies / (2 * math.pi) - low) / (high - low), 0, 1)
    frequencies *= kept + (1 - kept) / scaling[0]
  angles = positions_BxT[..., None, None] * frequencies
  return jnp.cos(angles), jnp.sin(angles)


def _rotate(x_BxTxNxH, rope):
  cos, sin = rope
  a, b = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, -1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BxTxNxH.dtype)
