"""Families of language models: what their config.json means for the policy, and what their tensors are called."""

import json
import pathlib
from typing import Any, Protocol, cast

import numpy as np

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

# Fields that must have one value where they stand; None: that say nothing.
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
  """What a published model means; see `from_json` and `tensor_name`, which are those of the built-in families."""

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
  """The name of a parameter in the files of a model, or of an adapter in those of peft; `{}` is the layer's number."""
  if path[0] != "blocks":
    return _OUTSIDE[path[0]]
  mlp_norm = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
  module = mlp_norm if path[1] == "mlp_norm" else _MODULES[path[1]]
  if path[2].startswith("lora_"):
    return f"base_model.model.model.layers.{{}}.{module}.lora_{path[2][-1].upper()}.weight"
  return f"model.layers.{{}}.{module}.{'bias' if path[2] == 'bias' else 'weight'}"


def _is_note(key: str, value) -> bool:
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
  """The policy that a config.json describes, in the spelling of transformers 5 or in the older one of the hub.

  Args:
    where: the file, for messages.
    dtype: of activations, which is ours to choose.

  Raises:
    UserError: the architecture is not supported, or a field is missing, unknown, or of a value that is not supported.
  """
  rest = dict(given)

  def refuse(what: str) -> UserError:
    return UserError(f"{where}: {what}; choose another model for policy.pretrained")

  def take(key: str, *default):
    if key not in rest and not default:
      raise refuse(f"the field {key} is missing")
    return rest.pop(key, *default)

  def number(key: str, *default):
    value = take(key, *default) or 0  # A null is 0.
    if type(value) not in (int, float):
      raise refuse(f"{key} must be a number, not {value!r}")
    return value

  def rope(fields) -> tuple[float, tuple[float, ...]]:
    left = {k: v for k, v in fields.items() if v is not None}
    older = left.pop("type", "default")
    kind = left.pop("rope_type", older)
    if kind not in _ROPE or not left.keys() <= {"rope_theta", *_ROPE[kind]}:
      raise refuse(
        f"rotary positions of the rope_type {kind!r} with {', '.join(sorted(left))} are not supported"
      )
    if missing := {"rope_theta", *_ROPE[kind]} - left.keys():
      raise refuse(f"the rotary positions lack {min(missing)}")
    return float(left["rope_theta"]), tuple(float(left[key]) for key in _ROPE[kind])

  kind = take("model_type", None)
  architectures = take("architectures", None)
  if kind not in _FAMILIES or architectures not in (None, [_FAMILIES[kind][0]]):
    supported = ", ".join(name for name, _ in _FAMILIES.values())
    raise refuse(
      f"the architecture {architectures or kind} is not supported (these are: {supported})"
    )
  gemma, gemma3 = kind.startswith("gemma"), kind == "gemma3_text"

  sizes = {
    "width": number("hidden_size"),
    "depth": number("num_hidden_layers"),
    "heads": number("num_attention_heads"),
  }
  sizes |= {"mlp": number("intermediate_size"), "vocab_size": number("vocab_size")}
  # These are checked when the shapes of the weights are.
  # They may be left out where they follow from the others; else transformers has those of one size.
  heads, head_dim = {"llama": ((0,), (0,)), "qwen2": ((), (0,))}.get(kind, ((), ()))
  sizes["kv_heads"] = number("num_key_value_heads", *heads) or sizes["heads"]
  sizes["head_dim"] = number("head_dim", *head_dim) or sizes["width"] // max(1, sizes["heads"])
  options = {**_FAMILIES[kind][1], "tied": take("tie_word_embeddings", gemma)}
  options["norm_eps"] = float(number("rms_norm_eps", 1e-6))
  if gemma:
    options["query_scalar"] = float(number("query_pre_attn_scalar"))
    options["attention_soft_cap"] = float(number("attn_logit_softcapping"))
    options["logit_soft_cap"] = float(number("final_logit_softcapping"))
    take("hidden_act", None)  # hidden_activation stands beside it and counts.

  whole = {"rope_theta": take("rope_theta", 1e6 if gemma3 else 1e4)}
  parameters = take("rope_parameters", None)
  if gemma3:
    near = {"rope_theta": take("rope_local_base_freq", 1e4)}
    nested = parameters or {
      "full_attention": take("rope_scaling", None) or {},
      "sliding_attention": {},
    }
    if set(nested) != {"full_attention", "sliding_attention"}:
      raise refuse("rope_parameters must hold full_attention and sliding_attention")
    parameters, local = nested["full_attention"], rope(near | nested["sliding_attention"])
    if local[1]:
      raise refuse("rope_parameters of sliding_attention must have the rope_type 'default'")
    options["local_rope_theta"] = local[0]
  elif parameters is None:
    parameters = take("rope_scaling", None) or {}
  options["rope_theta"], options["rope_scaling"] = rope(whole | parameters)

  if kind != "llama":
    window = number("sliding_window", 4096) * bool(take("use_sliding_window", gemma))
    first, period = number("max_window_layers", 28), number("_sliding_window_pattern", 6)
    every = number("sliding_window_pattern", period) if gemma3 else 2
    slides = [
      (i + 1) % every > 0 if gemma else window > 0 and i >= first for i in range(sizes["depth"])
    ]
    if types := take("layer_types", None):
      slides = [{"full_attention": False, "sliding_attention": True}.get(name) for name in types]
      if len(slides) != sizes["depth"] or None in slides:
        raise refuse(
          f"layer_types must name {sizes['depth']} layers, of full_attention or sliding_attention"
        )
    options |= {
      "windowed": tuple(np.flatnonzero(slides).tolist()),
      "window": window if any(slides) else 0,
    }

  for key, value in _FIXED.items():
    if take(key, None) not in (None, value):
      raise refuse(f"{key} = {given[key]!r} is not supported")
  for key, value in rest.items():
    if not _is_note(key, value):
      raise UserError(
        f"{where}: the field {key} = {str(value)[:60]!r} is not known, and may change what the model"
        " computes; if it is only a note, remove it there; if not, choose another model for"
        " policy.pretrained"
      )
  config = PolicyConfig(dtype=dtype, **sizes, **options)
  for key, why in config.check().items():
    raise refuse(f"what it says about {key} {why}")
  return config
