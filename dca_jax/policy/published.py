"""What the fields of a config.json mean, family by family."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from dca_jax.errors import UserError

# Fields that are supported with one value only; None: only where they are null.
_FIXED: dict[str, Any] = {
  "attention_bias": False,
  "mlp_bias": False,
  "use_bidirectional_attention": False,
  "use_mrope": False,
  "rope_interleaved": False,
  "partial_rotary_factor": 1.0,
  "hidden_act": "silu",
  "hidden_activation": "gelu_pytorch_tanh",
  "quantization_config": None,
  "auto_map": None,
}

# Fields that change no number of a forward pass. The rest is sorted in `_is_note`.
_NOTES = {
  "attention_dropout",
  "attn_implementation",
  "cache_implementation",
  "chunk_size_feed_forward",
  "do_sample",
  "dtype",
  "id2label",
  "initializer_range",
  "is_llama_config",
  "label2id",
  "max_length",
  "max_position_embeddings",
  "model_max_length",
  "output_router_logits",
  "pretraining_tp",
  "repetition_penalty",
  "return_dict",
  "router_aux_loss_coef",
  "task_specific_params",
  "temperature",
  "tokenizer_class",
  "top_k",
  "top_p",
  "torch_dtype",
  "transformers.js_config",
  "transformers_version",
  "use_cache",
}

# rope_type -> the fields that make `rope_scaling`, in its order.
_ROPE = {
  "default": (),
  "linear": ("factor",),
  "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
  "yarn": (
    "factor",
    "beta_slow",
    "beta_fast",
    "original_max_position_embeddings",
    "attention_factor",
  ),
}


class Fields:
  """The fields of a config.json. Each is taken out where it is read; what is left was not read."""

  def __init__(self, given: dict[str, Any], where: str):
    self._rest, self._where = dict(given), where

  def refuse(self, what: str) -> UserError:
    return UserError(f"{self._where}: {what}; choose another model for policy.pretrained")

  def take(self, key: str, *default: Any) -> Any:
    if key not in self._rest and not default:
      raise self.refuse(f"the field {key} is missing")
    return self._rest.pop(key, *default)

  def drop(self, *keys: str) -> None:
    """Leaves fields unread that count for nothing."""
    for key in keys:
      self._rest.pop(key, None)

  def number(self, key: str, *default: float) -> Any:
    value = self.take(key, *default) or 0  # A null is 0.
    if type(value) not in (int, float):
      raise self.refuse(f"{key} must be a number, not {value!r}")
    return value

  def check_rest(self) -> None:
    """Raises UserError where a field that was not taken may change what the model computes."""
    for key, value in _FIXED.items():
      if (found := self.take(key, None)) not in (None, value):
        raise self.refuse(f"{key} = {found!r} is not supported")
    for key, value in self._rest.items():
      if not _is_note(key, value):
        raise UserError(
          f"{self._where}: the field {key} = {str(value)[:60]!r} is not known, and may change what"
          " the model computes; if it is only a note, remove it there; if not, choose another model"
          " for policy.pretrained"
        )


def _is_note(key: str, value: Any) -> bool:
  """Whether a field that nothing here reads cannot change what the model computes.

  Libraries keep notes for themselves under a leading underscore or their own name. A field of any
  other name may belong to an architecture that is not ours, unless it is empty or off.
  """
  off = value is None or value is False or value in ("", [], {})
  return off or key in _NOTES or key.startswith(("_", "unsloth_")) or key.endswith("_token_id")


class Published(NamedTuple):
  """A family that is built in."""

  architecture: str
  settings: dict[str, Any]
  """What every model of it has."""
  left_out: dict[str, Any]
  """Fields that may be missing in a config.json, and what they are then; where transformers has
  another default, it is right for a model of one size."""
  parts: tuple[Callable[["Fields", int], dict[str, Any]], ...]
  """Functions that read further settings of a model with so many layers."""


def sizes(fields: Fields) -> dict[str, Any]:
  """They are checked when the shapes of the weights are."""
  sizes = {
    "width": fields.number("hidden_size"),
    "depth": fields.number("num_hidden_layers"),
    "heads": fields.number("num_attention_heads"),
    "mlp": fields.number("intermediate_size"),
    "vocab_size": fields.number("vocab_size"),
  }
  sizes["kv_heads"] = fields.number("num_key_value_heads") or sizes["heads"]
  own = fields.number("head_dim")
  sizes["head_dim"] = own or sizes["width"] // max(1, sizes["heads"])
  return sizes


def _rotations(fields: Fields, depth: int) -> dict[str, Any]:
  """The settings of rotary positions."""
  base = {"rope_theta": fields.take("rope_theta", 1e4)}
  parameters = fields.take("rope_parameters", None)
  if parameters is None:
    parameters = fields.take("rope_scaling", None) or {}
  theta, scaling = _rope(fields, base | parameters)
  return {"rope_theta": theta, "rope_scaling": scaling}


def _two_rotations(fields: Fields, depth: int) -> dict[str, Any]:
  """Those of Gemma 3 and 4, whose windowed layers have a base of their own."""
  far = {"rope_theta": fields.take("rope_theta", 1e6)}
  near = {"rope_theta": fields.take("rope_local_base_freq", 1e4)}
  parameters = fields.take("rope_parameters", None)
  if not parameters:
    scaling = fields.take("rope_scaling", None) or {}
    parameters = {"full_attention": scaling, "sliding_attention": {}}
  if set(parameters) != {"full_attention", "sliding_attention"}:
    raise fields.refuse("rope_parameters must hold full_attention and sliding_attention")
  whole, rotated = dict(parameters["full_attention"]), 1.0
  if whole.get("rope_type") == "proportional":
    rotated = float(whole.pop("partial_rotary_factor", 1.0))
    whole["rope_type"] = "default"
  local, scaled = _rope(fields, near | parameters["sliding_attention"])
  if scaled:
    raise fields.refuse("rope_parameters of sliding_attention must have the rope_type 'default'")
  theta, scaling = _rope(fields, far | whole)
  return {
    "rope_theta": theta,
    "rope_scaling": scaling,
    "local_rope_theta": local,
    "global_rotated": rotated,
  }


def _rope(fields: Fields, parameters: dict[str, Any]) -> tuple[float, tuple[float, ...]]:
  """The base of rotary positions, and the numbers of their scaling in the order of `_ROPE`."""
  left = {k: v for k, v in parameters.items() if v is not None}
  older = left.pop("type", "default")
  kind = left.pop("rope_type", older)
  if kind not in _ROPE or not left.keys() <= {"rope_theta", *_ROPE[kind]}:
    what = f"rotary positions of the rope_type {kind!r} with {', '.join(sorted(left))}"
    raise fields.refuse(f"{what} are not supported")
  if kind == "yarn" and "factor" in left:
    attention = 1 + 0.1 * math.log(max(1, left["factor"]))
    left = {"beta_slow": 1, "beta_fast": 32, "attention_factor": attention} | left
  if missing := {"rope_theta", *_ROPE[kind]} - left.keys():
    raise fields.refuse(f"the rotary positions lack {min(missing)}")
  return float(left["rope_theta"]), tuple(float(left[key]) for key in _ROPE[kind])


def _scores(fields: Fields, depth: int) -> dict[str, Any]:
  """How Gemma 2 and 3 scale and cap scores and logits."""
  return {
    "query_scalar": float(fields.number("query_pre_attn_scalar")),
    "attention_soft_cap": float(fields.number("attn_logit_softcapping")),
    "logit_soft_cap": float(fields.number("final_logit_softcapping")),
  }


def _gelu(fields: Fields, depth: int) -> dict[str, Any]:
  fields.drop("hidden_act")  # hidden_activation counts, or is as in all Gemmas.
  return {"activation": "gelu_tanh"}


def _late_windows(fields: Fields, depth: int) -> dict[str, Any]:
  first = fields.number("max_window_layers", 28)
  return _windows(fields, [i >= first for i in range(depth)])


def _every_second(fields: Fields, depth: int) -> dict[str, Any]:
  return _windows(fields, [i % 2 == 0 for i in range(depth)], always=True)


def _all_but_some(fields: Fields, depth: int) -> dict[str, Any]:
  period = fields.number("_sliding_window_pattern", 6)
  every = fields.number("sliding_window_pattern", period)
  return _windows(fields, [(i + 1) % every > 0 for i in range(depth)], always=True)


def _all_windowed(fields: Fields, depth: int) -> dict[str, Any]:
  fields.drop("max_window_layers")
  return _windows(fields, [True] * depth)


def _unrotated(fields: Fields, depth: int) -> dict[str, Any]:
  """Layers without rotary positions; if any are windowed, it is those."""
  every = fields.number("no_rope_layer_interval", 4)
  rotated = fields.take("no_rope_layers", None) or [(i + 1) % every > 0 for i in range(depth)]
  unrotated = tuple(i for i, one in enumerate(rotated[:depth]) if not one)
  fields.drop("max_window_layers")
  windows = _windows(fields, [i in unrotated for i in range(depth)])
  return {"unrotated": unrotated, **windows}


def _windows(fields: Fields, near: list[bool], always: bool = False) -> dict[str, Any]:
  """Which layers see a window of the last tokens, and how long it is.

  Args:
    near: whether a layer does, unless the file says it layer by layer.
    always: there are such layers whatever the file says of the window.
  """
  window = fields.number("sliding_window", 4096) * bool(fields.take("use_sliding_window", always))
  slides: list[bool | None] = [one and (always or window > 0) for one in near]
  if types := fields.take("layer_types", None):
    slides = [{"full_attention": False, "sliding_attention": True}.get(name) for name in types]
    if len(slides) != len(near) or None in slides:
      what = f"layer_types must name {len(near)} layers, of full_attention or sliding_attention"
      raise fields.refuse(what)
  windowed = tuple(i for i, slide in enumerate(slides) if slide)
  return {"windowed": windowed, "window": window if windowed else 0}


def _global_layers(fields: Fields, depth: int) -> dict[str, Any]:
  """Gemma 4, in which layers that are not windowed have other heads; transformers 5 says so layer
  by layer."""
  windows = _all_but_some(fields, depth)
  k_eq_v = bool(fields.take("attention_k_eq_v", False))
  own = {
    "head_dim": fields.number("global_head_dim", 512),
    "num_key_value_heads": fields.number("num_global_key_value_heads", 0) * k_eq_v,
  }
  if (by_layer := fields.take("per_layer_config", None)) is not None:
    whole = {str(i) for i in range(depth) if i not in windows["windowed"]}
    own = dict(next(iter(by_layer.values()), {}))
    known = own.keys() <= {"head_dim", "num_key_value_heads"}
    if by_layer.keys() != whole or not known or any(one != own for one in by_layer.values()):
      raise fields.refuse("per_layer_config must say the same of all layers of full_attention")
  return windows | {
    "global_k_eq_v": k_eq_v,
    "global_head_dim": own.get("head_dim", 0),
    "global_kv_heads": own.get("num_key_value_heads", 0),
  }


def _gemma_4(fields: Fields, depth: int) -> dict[str, Any]:
  """The rest of Gemma 4."""
  if (pictures := fields.take("use_bidirectional_attention", None)) not in (None, "vision"):
    raise fields.refuse(f"use_bidirectional_attention = {pictures!r} is not supported")
  # The rows of the second embedding are checked when the shapes of the weights are.
  fields.drop("vocab_size_per_layer_input")
  experts = {
    "experts": fields.number("num_experts", 0),
    "experts_per_token": fields.number("top_k_experts", 0),
    "experts_beside": fields.number("moe_intermediate_size", 0),
  }
  return (experts if fields.take("enable_moe_block", False) else {}) | {
    "kv_shared": fields.number("num_kv_shared_layers"),
    "shared_mlp_double": bool(fields.take("use_double_wide_mlp", False)),
    "layer_embedding": fields.number("hidden_size_per_layer_input"),
    "logit_soft_cap": float(fields.number("final_logit_softcapping", 0)),
  }


def _experts(fields: Fields, depth: int) -> dict[str, Any]:
  """Experts in all layers, whose hidden size has a field of its own."""
  if fields.number("decoder_sparse_step", 1) != 1 or fields.take("mlp_only_layers", None):
    raise fields.refuse("layers with experts beside layers without are not supported")
  return {
    "experts": fields.number("num_experts", 0) or fields.number("num_local_experts"),
    "experts_per_token": fields.number("num_experts_per_tok"),
    "experts_sum_to_one": fields.take("norm_topk_prob", False),
    "mlp": fields.number("moe_intermediate_size"),
  }


_EQUAL_HEADS = {"num_key_value_heads": None}
_EVEN_HEADS = {"head_dim": None}
_WINDOW = {"use_sliding_window": True}
_TIED = {"tie_word_embeddings": True}
_GEMMA = {"norm_plus_one": True, "scale_embedding": True}
_GEMMA_2 = _GEMMA | {"post_norms": True}
# What the 4B leaves out, and larger ones in part.
_GEMMA_3_4B = {
  "vocab_size": 262_208,
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "head_dim": 256,
  "query_pre_attn_scalar": 256,
  "attn_logit_softcapping": None,
  "final_logit_softcapping": None,
}
_GEMMA_4 = {
  "scale_embedding": True,
  "post_norms": True,
  "qk_norm": True,
  "v_norm": True,
  "layer_scale": True,
  "query_scalar": 1.0,
}
# What transformers takes where a config.json does not say it.
_GEMMA_4_LEFT_OUT = {
  "head_dim": 256,
  "sliding_window": 512,
  "hidden_size_per_layer_input": 256,
  "num_kv_shared_layers": 0,
  "rope_parameters": {
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    "sliding_attention": {},
  },
}
_GEMMA_4_PARTS = (_gelu, _two_rotations, _global_layers, _gemma_4)
_OLMO_2 = {"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_whole": True}

FAMILIES = {  # By model_type.
  "llama": Published("LlamaForCausalLM", {}, _EQUAL_HEADS | _EVEN_HEADS, (_rotations,)),
  "mistral": Published(
    "MistralForCausalLM", {}, _EVEN_HEADS | _WINDOW, (_rotations, _all_windowed)
  ),
  "smollm3": Published(
    "SmolLM3ForCausalLM",
    {},
    _EVEN_HEADS | _TIED | {"rope_theta": 2e6},
    (_rotations, _unrotated),
  ),
  "olmo2": Published(
    "Olmo2ForCausalLM",
    _OLMO_2,
    _EQUAL_HEADS | _EVEN_HEADS | {"rms_norm_eps": 1e-5},
    (_rotations,),
  ),
  "qwen2": Published(
    "Qwen2ForCausalLM", {"qkv_bias": True}, _EVEN_HEADS, (_rotations, _late_windows)
  ),
  "qwen3": Published("Qwen3ForCausalLM", {"qk_norm": True}, {}, (_rotations, _late_windows)),
  "qwen3_moe": Published(
    "Qwen3MoeForCausalLM",
    {"qk_norm": True},
    _EVEN_HEADS,
    (_rotations, _all_windowed, _experts),
  ),
  "gemma": Published("GemmaForCausalLM", _GEMMA, _TIED, (_gelu, _rotations)),
  "gemma2": Published(
    "Gemma2ForCausalLM", _GEMMA_2, _TIED, (_gelu, _scores, _rotations, _every_second)
  ),
  "gemma3_text": Published(
    "Gemma3ForCausalLM",
    _GEMMA_2 | {"qk_norm": True},
    _TIED | _GEMMA_3_4B,
    (_gelu, _scores, _two_rotations, _all_but_some),
  ),
  "gemma4_text": Published(
    "Gemma4ForCausalLM",
    _GEMMA_4,
    _TIED | _GEMMA_4_LEFT_OUT,
    _GEMMA_4_PARTS,
  ),
  "gemma4_unified_text": Published(  # 12B.
    "Gemma4UnifiedForCausalLM",
    _GEMMA_4,
    _TIED | _GEMMA_4_LEFT_OUT | {"sliding_window": 1024, "hidden_size_per_layer_input": 0},
    _GEMMA_4_PARTS,
  ),
}
