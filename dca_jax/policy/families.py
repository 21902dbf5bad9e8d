"""Families of language models: what their config.json means for the policy, and what their tensors
are called."""

import json
import pathlib
from typing import Any, Protocol, cast

from dca_jax.doors import find
from dca_jax.errors import UserError
from dca_jax.policy.transformer import PolicyConfig

_GEMMA = {
  "activation": "gelu_tanh",
  "norm_plus_one": True,
  "post_norms": True,
  "scale_embedding": True,
}

# model_type -> the architecture, and the options that every model of the family has.
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
  "llama": ("LlamaForCausalLM", {}),
  "qwen2": ("Qwen2ForCausalLM", {"qkv_bias": True}),
  "qwen3": ("Qwen3ForCausalLM", {"qk_norm": True}),
  "gemma2": ("Gemma2ForCausalLM", _GEMMA),
  "gemma3_text": ("Gemma3ForCausalLM", _GEMMA | {"qk_norm": True}),
}

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
  "pretraining_tp",
  "repetition_penalty",
  "return_dict",
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
}

_OUTSIDE = {
  "embedding": "model.embed_tokens.weight",
  "head": "lm_head.weight",
  "final_norm": "model.norm.weight",
}

# A layer's modules; the two norms around an MLP are named after its family.
_MODULES = {
  **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")},
  **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
  **{name: f"self_attn.{name}" for name in ("q_norm", "k_norm")},
  "attention_norm": "input_layernorm",
  "post_attention_norm": "post_attention_layernorm",
  "post_mlp_norm": "post_feedforward_layernorm",
}


class Family(Protocol):
  """What a published model means. `from_json` and `tensor_name` are those of the built-in
  families."""

  def read(self, given: dict[str, Any], where: str, dtype: str) -> PolicyConfig:
    """The policy that a config.json describes; raises UserError where it is not supported."""

  def tensor_name(self, config: PolicyConfig, path: tuple[str, ...]) -> str:
    """The name of a parameter in the model's files; `{}` is the layer's number."""


def family_of(config: PolicyConfig) -> Family:
  """The family that `policy.family` names; UserError where there is none."""
  if not config.family:
    return _BuiltIn()
  kind = find(config.family, "policy.family")
  if not all(callable(getattr(kind, name, None)) for name in ("read", "tensor_name")):
    raise UserError(
      f"policy.family: {config.family} must be a class with methods read and tensor_name"
    )
  return cast(Family, kind())


class _BuiltIn:
  def read(self, given: dict[str, Any], where: str, dtype: str) -> PolicyConfig:
    return from_json(given, where, dtype)

  def tensor_name(self, config: PolicyConfig, path: tuple[str, ...]) -> str:
    return tensor_name(config, path)


def tensor_name(config: PolicyConfig, path: tuple[str, ...]) -> str:
  """The name of a parameter in the files of a model, or of an adapter in those of peft; `{}` is the
  layer's number."""
  if path[0] != "blocks":
    return _OUTSIDE[path[0]]
  mlp_norm = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
  module = mlp_norm if path[1] == "mlp_norm" else _MODULES[path[1]]
  if path[2].startswith("lora_"):
    return f"base_model.model.model.layers.{{}}.{module}.lora_{path[2][-1].upper()}.weight"
  return f"model.layers.{{}}.{module}.{'bias' if path[2] == 'bias' else 'weight'}"


def _is_note(key: str, value: Any) -> bool:
  """Whether a field that nothing here reads cannot change what the model computes.

  Libraries keep notes for themselves under a leading underscore or their own name. A field of any
  other name may belong to an architecture that is not ours, unless it is empty or off.
  """
  off = value is None or value is False or value in ("", [], {})
  return off or key in _NOTES or key.startswith(("_", "unsloth_")) or key.endswith("_token_id")


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Raises UserError where the file is missing or is no JSON object."""
  try:
    given = json.loads(path.read_text(encoding="utf-8"))
    if type(given) is not dict:
      raise ValueError("no JSON object")
    return given
  except (OSError, ValueError) as error:
    raise UserError(f"{path} is unreadable ({error}); download the model again") from error


def from_json(given: dict[str, Any], where: str, dtype: str) -> PolicyConfig:
  """The policy that a config.json describes, in the spelling of transformers 5 or the older one.

  Args:
    where: the file, for messages.
    dtype: of activations, which is ours to choose.

  Raises:
    UserError: the architecture is not supported, or a field is missing, unknown, or of a value that
      is not supported.
  """
  fields = _Fields(given, where)
  kind, architectures = fields.take("model_type", None), fields.take("architectures", None)
  if kind not in _FAMILIES or architectures not in (None, [_FAMILIES[kind][0]]):
    supported = ", ".join(name for name, _ in _FAMILIES.values())
    what = f"the architecture {architectures or kind} is not supported (these are: {supported})"
    raise fields.refuse(what)
  gemma = kind.startswith("gemma")
  settings = _sizes(fields, kind)
  settings |= {**_FAMILIES[kind][1], "tied": fields.take("tie_word_embeddings", gemma)}
  settings["norm_eps"] = float(fields.number("rms_norm_eps", 1e-6))
  if gemma:
    settings["query_scalar"] = float(fields.number("query_pre_attn_scalar"))
    settings["attention_soft_cap"] = float(fields.number("attn_logit_softcapping"))
    settings["logit_soft_cap"] = float(fields.number("final_logit_softcapping"))
    fields.take("hidden_act", None)  # hidden_activation stands next to it and counts.
  settings |= _rotations(fields, kind)
  if kind != "llama":
    settings |= _windows(fields, kind, settings["depth"])
  fields.check_rest()
  config = PolicyConfig(dtype=dtype, **settings)
  for key, why in config.check().items():
    raise fields.refuse(f"what it says about {key} {why}")
  return config


class _Fields:
  """The fields of a config.json. Each is taken out where it is read; what is left was not read."""

  def __init__(self, given: dict[str, Any], where: str):
    self._rest, self._where = dict(given), where

  def refuse(self, what: str) -> UserError:
    return UserError(f"{self._where}: {what}; choose another model for policy.pretrained")

  def take(self, key: str, *default: Any) -> Any:
    if key not in self._rest and not default:
      raise self.refuse(f"the field {key} is missing")
    return self._rest.pop(key, *default)

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


def _sizes(fields: _Fields, kind: str) -> dict[str, Any]:
  """They are checked when the shapes of the weights are."""
  sizes = {
    "width": fields.number("hidden_size"),
    "depth": fields.number("num_hidden_layers"),
    "heads": fields.number("num_attention_heads"),
    "mlp": fields.number("intermediate_size"),
    "vocab_size": fields.number("vocab_size"),
  }
  # These may be left out where they follow from the others; elsewhere transformers has a default
  # that is right for a model of one size.
  heads, head_dim = {"llama": ((0,), (0,)), "qwen2": ((), (0,))}.get(kind, ((), ()))
  sizes["kv_heads"] = fields.number("num_key_value_heads", *heads) or sizes["heads"]
  own = fields.number("head_dim", *head_dim)
  sizes["head_dim"] = own or sizes["width"] // max(1, sizes["heads"])
  return sizes


def _rotations(fields: _Fields, kind: str) -> dict[str, Any]:
  """The settings of rotary positions; Gemma 3's windowed layers have a base of their own."""
  gemma3 = kind == "gemma3_text"
  settings: dict[str, Any] = {}
  base = {"rope_theta": fields.take("rope_theta", 1e6 if gemma3 else 1e4)}
  parameters = fields.take("rope_parameters", None)
  if gemma3:
    near = {"rope_theta": fields.take("rope_local_base_freq", 1e4)}
    if not parameters:
      far = fields.take("rope_scaling", None) or {}
      parameters = {"full_attention": far, "sliding_attention": {}}
    if set(parameters) != {"full_attention", "sliding_attention"}:
      raise fields.refuse("rope_parameters must hold full_attention and sliding_attention")
    settings["local_rope_theta"], scaling = _rope(fields, near | parameters["sliding_attention"])
    if scaling:
      raise fields.refuse("rope_parameters of sliding_attention must have the rope_type 'default'")
    parameters = parameters["full_attention"]
  elif parameters is None:
    parameters = fields.take("rope_scaling", None) or {}
  settings["rope_theta"], settings["rope_scaling"] = _rope(fields, base | parameters)
  return settings


def _rope(fields: _Fields, parameters: dict[str, Any]) -> tuple[float, tuple[float, ...]]:
  """The base of rotary positions, and the numbers of their scaling in the order of `_ROPE`."""
  left = {k: v for k, v in parameters.items() if v is not None}
  older = left.pop("type", "default")
  kind = left.pop("rope_type", older)
  if kind not in _ROPE or not left.keys() <= {"rope_theta", *_ROPE[kind]}:
    what = f"rotary positions of the rope_type {kind!r} with {', '.join(sorted(left))}"
    raise fields.refuse(f"{what} are not supported")
  if missing := {"rope_theta", *_ROPE[kind]} - left.keys():
    raise fields.refuse(f"the rotary positions lack {min(missing)}")
  return float(left["rope_theta"]), tuple(float(left[key]) for key in _ROPE[kind])


def _windows(fields: _Fields, kind: str, depth: int) -> dict[str, Any]:
  """Which layers see a window of the last tokens, and how long it is."""
  gemma = kind.startswith("gemma")
  window = fields.number("sliding_window", 4096) * bool(fields.take("use_sliding_window", gemma))
  first = fields.number("max_window_layers", 28)
  period = fields.number("_sliding_window_pattern", 6)
  every = fields.number("sliding_window_pattern", period) if kind == "gemma3_text" else 2
  slides: list[bool | None] = [
    (i + 1) % every > 0 if gemma else window > 0 and i >= first for i in range(depth)
  ]
  if types := fields.take("layer_types", None):
    slides = [{"full_attention": False, "sliding_attention": True}.get(name) for name in types]
    if len(slides) != depth or None in slides:
      what = f"layer_types must name {depth} layers, of full_attention or sliding_attention"
      raise fields.refuse(what)
  windowed = tuple(i for i, slide in enumerate(slides) if slide)
  return {"windowed": windowed, "window": window if windowed else 0}
