"""Families of language models: what their config.json means for the policy, and what their tensors are called.

Read is what decides numbers. A field that is not known is refused by name, because it might.
"""

import dataclasses
import json
import pathlib
from typing import Any

from dca_jax.errors import UserError
from dca_jax.policy.transformer import PolicyConfig

_GEMMA = {"activation": "gelu_tanh", "norm_plus_one": True, "post_norms": True, "scale_embedding": True}

# model_type -> the architecture, and the options that every model of the family has.
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
  "llama": ("LlamaForCausalLM", {}),
  "qwen2": ("Qwen2ForCausalLM", {"qkv_bias": True}),
  "qwen3": ("Qwen3ForCausalLM", {"qk_norm": True}),
  "gemma2": ("Gemma2ForCausalLM", _GEMMA),
  "gemma3_text": ("Gemma3ForCausalLM", _GEMMA | {"qk_norm": True}),
}

# Fields that must have one value where they stand.
_FIXED = {
  "attention_bias": False,
  "mlp_bias": False,
  "use_bidirectional_attention": False,
  "use_mrope": False,
  "hidden_act": "silu",
}

# Fields that change no number of a forward pass.
_HARMLESS = {
  "_name_or_path",
  "_sliding_window_pattern",  # Stands beside layer_types, which says the same.
  "attention_dropout",
  "bos_token_id",
  "cache_implementation",
  "chunk_size_feed_forward",
  "dtype",
  "eos_token_id",
  "id2label",
  "initializer_range",
  "is_encoder_decoder",
  "label2id",
  "max_position_embeddings",
  "output_attentions",
  "output_hidden_states",
  "pad_token_id",
  "pretraining_tp",
  "problem_type",
  "return_dict",
  "torch_dtype",
  "transformers_version",
  "unsloth_fixed",
  "unsloth_version",
  "use_cache",
}

# rope_type -> the fields that make `rope_scaling`, in its order.
_ROPE = {
  "default": (),
  "linear": ("factor",),
  "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
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


def tensor_name(config: PolicyConfig, path: tuple[str, ...]) -> str:
  """The name of a parameter in the files of a model; where it is one of the layers', `{}` is for the layer's number."""
  if path[0] != "blocks":
    return {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight", "final_norm": "model.norm.weight"}[path[0]]
  mlp_norm = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
  module = mlp_norm if path[1] == "mlp_norm" else _MODULES[path[1]]
  return f"model.layers.{{}}.{module}.{'bias' if path[2] == 'bias' else 'weight'}"


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Raises UserError where the file is missing or is no JSON object."""
  try:
    given = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path} is unreadable ({error}); policy.pretrained needs a complete Hugging Face folder") from error
  if not isinstance(given, dict):
    raise UserError(f"{path} holds no JSON object; policy.pretrained needs a complete Hugging Face folder")
  return given


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
    value = take(key, *default)
    if type(value) not in (int, float):
      raise refuse(f"{key} must be a number, not {value!r}")
    return value

  def rope(fields) -> tuple[float, tuple[float, ...]]:
    left = {k: v for k, v in fields.items() if v is not None}
    kinds = left.pop("type", "default"), left.pop("rope_type", None)
    kind = kinds[1] or kinds[0]
    if kind not in _ROPE:
      raise refuse(f"the rope_type {kind!r} is not supported")
    numbers = [left.pop(key, None) for key in ("rope_theta", *_ROPE[kind])]
    if left or not all(type(x) in (int, float) for x in numbers):
      raise refuse(f"cannot read the rotary positions {fields}" + (f", whose {min(left)} is not known" if left else ""))
    return float(numbers[0]), tuple(map(float, numbers[1:]))

  kind = take("model_type", None)
  architectures = take("architectures", None)
  if kind not in _FAMILIES or architectures not in (None, [_FAMILIES[kind][0]]):
    supported = ", ".join(name for name, _ in _FAMILIES.values())
    raise refuse(f"the architecture {architectures or kind} is not supported (these are: {supported})")
  gemma, gemma3 = kind.startswith("gemma"), kind == "gemma3_text"

  sizes = {"width": number("hidden_size"), "depth": number("num_hidden_layers"), "heads": number("num_attention_heads")}
  sizes |= {"mlp": number("intermediate_size"), "vocab_size": number("vocab_size")}
  default = (None,) if kind == "llama" else ()
  sizes["kv_heads"] = take("num_key_value_heads", *default) or sizes["heads"]
  default = (None,) if kind in ("llama", "qwen2") else ()
  sizes["head_dim"] = take("head_dim", *default) or sizes["width"] // sizes["heads"]
  options = dict(_FAMILIES[kind][1], tied=take("tie_word_embeddings", gemma), norm_eps=float(number("rms_norm_eps", 1e-6)))

  if gemma:
    options["query_scalar"] = float(number("query_pre_attn_scalar"))
    default = (None,) if gemma3 else ()
    options["attention_soft_cap"] = float(take("attn_logit_softcapping", *default) or 0)
    options["logit_soft_cap"] = float(take("final_logit_softcapping", *default) or 0)
    take("hidden_act", None)  # What counts is hidden_activation.
    if (activation := take("hidden_activation", "gelu_pytorch_tanh")) != "gelu_pytorch_tanh":
      raise refuse(f"hidden_activation {activation!r} is not supported")

  whole = {"rope_theta": take("rope_theta", 1e6 if gemma3 else 1e4)}
  parameters = take("rope_parameters", None)
  if gemma3:
    near = {"rope_theta": take("rope_local_base_freq", 1e4)}
    nested = parameters or {"full_attention": take("rope_scaling", None) or {}, "sliding_attention": {}}
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
    every = number("sliding_window_pattern", 6) if gemma3 else 2
    uses = gemma or take("use_sliding_window", False)
    window, first, types = take("sliding_window", None), take("max_window_layers", 0), take("layer_types", None)
    if types is None and gemma:
      types = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(sizes["depth"])]
    elif types is None:
      slides = uses and window is not None
      types = ["sliding_attention" if slides and i >= first else "full_attention" for i in range(sizes["depth"])]
    if len(types) != sizes["depth"] or not set(types) <= {"sliding_attention", "full_attention"}:
      raise refuse(f"layer_types must name 'sliding_attention' or 'full_attention' for each of {sizes['depth']} layers")
    options["windowed"] = tuple(i for i, name in enumerate(types) if name == "sliding_attention")
    options["window"] = (uses and window) or 0
    if not options["windowed"]:
      options |= {"window": 0, "local_rope_theta": 0.0}

  for key, value in _FIXED.items():
    if take(key, None) not in (None, value):
      raise refuse(f"{key} = {given[key]!r} is not supported")
  if unknown := sorted(key for key, value in rest.items() if value is not None and key not in _HARMLESS):
    raise refuse(f"the field {unknown[0]} is not known, and may change what the model computes")

  config = PolicyConfig(dtype=dtype, **sizes, **options)
  for key, value in dataclasses.asdict(config).items():
    if type(value) is not type(getattr(PolicyConfig, key)):
      raise refuse(f"what it says about {key} is {value!r}")
  for key, why in config.check().items():
    raise refuse(f"what it says about {key} {why}")
  return config


def to_json(config: PolicyConfig) -> dict[str, Any]:
  """A config.json for a policy that began from nothing; `from_json` reads the same policy where a family has it."""
  kind = "qwen3" if config.qk_norm else "llama"
  given = {
    "architectures": [_FAMILIES[kind][0]],
    "model_type": kind,
    "attention_bias": False,
    "head_dim": config.head_dim,
    "hidden_act": "silu",
    "hidden_size": config.width,
    "intermediate_size": config.mlp,
    "num_attention_heads": config.heads,
    "num_hidden_layers": config.depth,
    "num_key_value_heads": config.kv_heads,
    "rms_norm_eps": config.norm_eps,
    "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
    "tie_word_embeddings": config.tied,
    "vocab_size": config.vocab_size,
  }
  if from_json(given, "config.json", config.dtype) != config:
    raise UserError("no family of Hugging Face has the options of this run's policy section, so it cannot be exported")
  return given
