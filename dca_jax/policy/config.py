"""The `policy` section."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from dca_jax.checks import at_least, one_of, positive
from dca_jax.doors import door, local


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
  """The `policy` section. Its defaults make a small policy that begins from nothing."""

  pretrained: str = local()
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
  """Size of a token's embedding and of the stream that layers add to."""
  depth: int = 3
  """How many layers there are."""
  heads: int = 2
  """Query heads of a layer; a multiple of `kv_heads`."""
  kv_heads: int = 1
  """Key heads of a layer, and as many of values; each serves heads / kv_heads query heads."""
  head_dim: int = 32
  """Size of each head's queries, keys and values; even, for rotary positions."""
  mlp: int = 192
  """Hidden size of the gated MLP, or of each expert's."""
  experts: int = 0
  """MLPs of a layer among which a router chooses for every token (a mixture of experts); 0: one MLP
  for all."""
  experts_per_token: int = 8
  """So many of the experts, the likeliest, are added, each times its probability."""
  experts_beside: int = 0
  """Hidden size of experts that stand beside each MLP and have a router as Gemma 4's; 0: they stand
  in its place."""
  experts_sum_to_one: bool = True
  """Divide the probabilities of the chosen ones by their sum."""
  activation: str = "silu"
  """`silu` or `gelu_tanh`, of the MLP's gate."""
  rope_theta: float = 10_000.0
  """Base of the rotary frequencies: pair i of a head turns by rope_theta^(-2i / head_dim) radians
  from one position to the next, before `rope_scaling`."""
  rope_scaling: tuple[float, ...] = ()
  """(factor,) divides all rotary frequencies. (factor, low, high, original), as in Llama 3.1,
  divides those that turn less than `low` times in `original` positions, leaves those that turn more
  than `high` times, and blends between. (factor, slow, fast, original, attention), as YaRN does,
  blends by the number of the frequency and multiplies cosines and sines by `attention`."""
  window: int = 0
  """Positions that a windowed layer reads, its own included."""
  windowed: tuple[int, ...] = ()
  """Layers, counted from 0, that read a window and not all before them."""
  local_rope_theta: float = 0.0
  """`rope_theta` of the windowed layers, without scaling; 0: they rotate as the others do."""
  unrotated: tuple[int, ...] = ()
  """Layers, counted from 0, without rotary positions (SmolLM3)."""
  global_head_dim: int = 0
  """Head size of layers that are not windowed; 0: as of the others. Where it is set, each round of
  windowed layers must end with one that is not (Gemma 4)."""
  global_kv_heads: int = 0
  """Key heads of layers that are not windowed; 0: as of the others."""
  global_k_eq_v: bool = False
  """Layers that are not windowed have no matrix of values: those are the keys before their norm."""
  global_rotated: float = 1.0
  """Share of the rotary frequencies, the fastest, that layers that are not windowed rotate by."""
  kv_shared: int = 0
  """So many of the last layers have no keys and values of their own, and read those of the last
  layer before them that is windowed as they are, or not (Gemma 4 E2B and E4B)."""
  shared_mlp_double: bool = False
  """The MLPs of the layers of `kv_shared` are twice as wide (Gemma 4 E2B)."""
  layer_embedding: int = 0
  """Size of a second embedding, of every token and layer, that a gate adds to the stream behind
  each MLP (Gemma 4 E2B and E4B); 0: there is none."""
  layer_scale: bool = False
  """The stream behind each layer is multiplied by a number of the layer, which is not trained."""
  qkv_bias: bool = False
  """Add a bias to queries, keys and values (Qwen2)."""
  query_scalar: float = 0.0
  """Attention scores are divided by the square root of this; 0 stands for head_dim."""
  attention_soft_cap: float = 0.0
  """Attention scores are squeezed between -cap and cap (Gemma 2); 0 leaves them."""
  logit_soft_cap: float = 0.0
  """Logits are squeezed between -cap and cap, before the temperature (Gemma 2); 0 leaves them."""
  scale_embedding: bool = False
  """Multiply what is read from the embedding by width^1/2 (Gemma)."""
  norm_eps: float = 1e-6
  """Added to the mean square under the root of every norm."""
  norm_plus_one: bool = False
  """Norms scale by 1 + weight (Gemma)."""
  pre_norms: bool = True
  """Norms before attention and MLP."""
  post_norms: bool = False
  """Norms behind attention and MLP (Gemma 2 has both, OLMo 2 only these)."""
  qk_norm: bool = False
  """Normalise queries and keys in each head, as Qwen3 and Gemma 3 do; it bears much higher learning
  rates."""
  qk_norm_whole: bool = False
  """With `qk_norm`: normalise queries and keys over all heads together (OLMo 2)."""
  v_norm: bool = False
  """Normalise values in each head, without a scale (Gemma 4)."""
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
    bad |= positive(self, "experts_per_token")
    bad |= at_least(
      0, self, "vocab_size", "local_rope_theta", "query_scalar", "norm_eps", "experts"
    )
    bad |= at_least(0, self, "global_kv_heads", "layer_embedding", "experts_beside")
    bad |= at_least(0, self, "attention_soft_cap", "logit_soft_cap") | one_of(
      self, "activation", *ACTIVATIONS
    )
    bad |= one_of(self, "dtype", "float32", "bfloat16") | one_of(
      self, "weights", "float32", "bfloat16"
    )
    bad |= one_of(self, "remat", *REMAT) | one_of(
      self, "attention", "auto", "plain", "splash", "cudnn"
    )
    if self.head_dim < 2 or self.head_dim % 2:
      bad["head_dim"] = "must be even and positive, for rotary positions"
    for key in ("kv_heads", "global_kv_heads"):
      if getattr(self, key) > 0 and self.heads % getattr(self, key):
        bad["heads"] = f"must be a multiple of policy.{key} ({getattr(self, key)})"
    if self.rope_theta <= 1:
      bad["rope_theta"] = "must be above 1"
    scaling = self.rope_scaling
    if (
      len(scaling) not in (0, 1, 4, 5)
      or min(scaling, default=1) <= 0
      or (scaling[1:] and scaling[1] >= scaling[2])
    ):
      bad["rope_scaling"] = (
        "must be (), (factor,), (factor, low, high, original) or (factor, slow, fast, original,"
        " attention), positive, with low below high"
      )
    for key in ("windowed", "unrotated"):
      if not all(type(i) is int and 0 <= i < self.depth for i in getattr(self, key)):
        bad[key] = f"must be layers from 0 to {self.depth - 1}"
    if 0 < self.experts < self.experts_per_token:
      bad["experts_per_token"] = f"must be at most policy.experts ({self.experts})"
    if self.windowed and self.window < 1:
      bad["window"] = "must be at least 1 with policy.windowed"
    if self.lora_rank < 0 or (self.lora_rank and not self.pretrained):
      bad["lora_rank"] = "must be 0, or positive with policy.pretrained"
    if not self.lora_targets or set(self.lora_targets) - _MATRICES:
      bad["lora_targets"] = f"must be some of {', '.join(sorted(_MATRICES))}"
    elif self.lora_rank and self.mlp_is_experts and set(self.lora_targets) - _ATTENTION:
      bad["lora_targets"] = "can only be some of q, k, v and o where the MLPs are experts"
    if self.weights == "bfloat16" and not self.pretrained:
      bad["weights"] = "can be 'bfloat16' only with policy.pretrained"
    if self.attention == "cudnn" and (self.dtype != "bfloat16" or self.attention_soft_cap):
      bad["attention"] = (
        "can be 'cudnn' only with policy.dtype 'bfloat16' and without policy.attention_soft_cap"
      )
    return bad | self._check_rounds()

  def _check_rounds(self) -> dict[str, str]:
    """What makes layers differ in shape."""
    bad, n = {}, self.round
    every_nth = tuple(i for i in range(self.depth) if (i + 1) % n)
    if n > 1 and (self.depth % n or self.windowed != every_nth):
      bad["windowed"] = (
        "must be all layers but every n-th, and policy.depth a multiple of n, with"
        " policy.global_head_dim, global_kv_heads, global_k_eq_v or kv_shared"
      )
    if (n > 1 or self.kv_shared) and self.unrotated:
      bad["unrotated"] = "must be () where layers differ in shape"
    if self.global_head_dim < 0 or self.global_head_dim % 2:
      bad["global_head_dim"] = "must be 0, or even and positive, for rotary positions"
    if not 0 < self.global_rotated <= 1:
      bad["global_rotated"] = "must be above 0 and at most 1"
    if not 0 <= self.kv_shared < self.depth or self.kv_shared % n:
      bad["kv_shared"] = f"must be below policy.depth ({self.depth}) and a multiple of {n}"
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
    windows = {} if self.windowed else dict.fromkeys(_OF_WINDOWS, "policy.windowed names no layer")
    if not self.kv_shared:
      adapted["shared_mlp_double"] = "policy.kv_shared is 0"
    if not self.experts:
      chosen = ("experts_per_token", "experts_sum_to_one", "experts_beside")
      adapted |= dict.fromkeys(chosen, "policy.experts is 0")
    if not self.qk_norm:
      adapted["qk_norm_whole"] = "policy.qk_norm is False"
    return adapted | windows

  @property
  def round(self) -> int:
    """Layers after which the shapes of layers repeat; 1 where all have the same."""
    own = self.global_head_dim or self.global_kv_heads or self.global_k_eq_v or self.kv_shared
    whole = (i for i in range(self.depth) if i not in self.windowed)
    return 1 + next(whole, self.depth) if own and self.windowed else 1

  @property
  def mlp_is_experts(self) -> bool:
    return self.experts > 0 and not self.experts_beside

  def is_shared(self, layer: int) -> bool:
    """Whether a layer reads the keys of another."""
    return layer >= self.depth - self.kv_shared

  def kv_source(self, layer: int) -> int:
    """The layer whose keys it reads: itself, or the last with keys that is windowed as it is."""
    if not self.is_shared(layer):
      return layer
    own, windowed = range(self.depth - self.kv_shared), layer in self.windowed
    return max(i for i in own if (i in self.windowed) == windowed)

  def of_layer(self, layer: int) -> "PolicyConfig":
    """What a layer is: the same with its sizes as those of all."""
    changes: dict[str, Any] = {}
    if layer in self.windowed:
      changes |= {"global_k_eq_v": False, "global_rotated": 1.0}
    elif self.windowed:
      changes["head_dim"] = self.global_head_dim or self.head_dim
      changes["kv_heads"] = self.global_kv_heads or self.kv_heads
    if self.shared_mlp_double and self.is_shared(layer):
      changes["mlp"] = 2 * self.mlp
    return dataclasses.replace(self, **changes) if self.round > 1 or self.kv_shared else self

  def place(self, layer: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Where the parameters of a layer are: the keys of a stack, and its index there."""
    first = self.depth - self.kv_shared
    stack, i = ("shared_blocks", layer - first) if self.is_shared(layer) else ("blocks", layer)
    if self.round == 1:
      return (stack,), (i,)
    i, j = divmod(i, self.round)
    return ((stack, "windowed"), (i, j)) if layer in self.windowed else ((stack, "last"), (i,))

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
REMAT = {
  "all": jax.checkpoint_policies.everything_saveable,
  "projections": jax.checkpoint_policies.save_only_these_names("projection"),
  "layers": jax.checkpoint_policies.nothing_saveable,
}
STACKS = ("blocks", "shared_blocks")
"""Of the parameters, those that layers have."""
_OF_WINDOWS = (
  "window",
  "local_rope_theta",
  "global_head_dim",
  "global_kv_heads",
  "global_k_eq_v",
  "global_rotated",
)
_ATTENTION = {"q", "k", "v", "o"}
_MATRICES = _ATTENTION | {"gate", "up", "down"}
ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": nn.gelu}
