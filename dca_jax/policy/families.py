"""Families of language models: what their config.json means for the policy, and what their tensors
are called."""

import json
import pathlib
import re
from typing import Any, Protocol, cast

from dca_jax.doors import find
from dca_jax.errors import UserError
from dca_jax.policy.config import STACKS, PolicyConfig
from dca_jax.policy.published import FAMILIES, Fields, sizes

_OUTSIDE = {
  "embedding": "model.embed_tokens.weight",
  "layer_embedding": "model.embed_tokens_per_layer.weight",
  "layer_projection": "model.per_layer_model_projection.weight",
  "layer_projection_norm": "model.per_layer_projection_norm.weight",
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
  "embedded_gate": "per_layer_input_gate",
  "embedded_out": "per_layer_projection",
  "post_embedded_norm": "post_per_layer_input_norm",
  "mlp_out_norm": "post_feedforward_layernorm_1",
  "pre_experts_norm": "pre_feedforward_layernorm_2",
  "post_experts_norm": "post_feedforward_layernorm_2",
  "router": "mlp.gate",
  **{f"expert_{name}": f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")},
}

# Parameters that are no weight of a module there, by the module or by their own name.
_BARE = {
  "layer_scale": "layer_scalar",
  "router_norm": "router.scale",
  "experts": "router.per_expert_scale",
  "experts_gate_up": "experts.gate_up_proj",
  "experts_down": "experts.down_proj",
}

# model_type of a model that reads pictures too -> its architecture and that of its text part.
_MULTIMODAL = {
  "gemma3": ("Gemma3ForConditionalGeneration", "gemma3_text"),
  "gemma4": ("Gemma4ForConditionalGeneration", "gemma4_text"),
  "gemma4_unified": ("Gemma4UnifiedForConditionalGeneration", "gemma4_unified_text"),
}
_OTHER_SENSES = (
  "vision_tower.",
  "multi_modal_projector.",
  "audio_tower.",
  "vision_embedder.",
  "embed_vision.",
  "embed_audio.",
)
# What a layer that reads another's keys may have in a file all the same.
_KEYS = re.compile(r"model\.layers\.(\d+)\.self_attn\.[kv]_(proj|norm)\.weight")


class Family(Protocol):
  """What a published model means. `from_json` and `tensor_name` are those of the built-in
  families."""

  def read(self, given: dict[str, Any], where: str, dtype: str) -> PolicyConfig:
    """The policy that a config.json describes; raises UserError where it is not supported."""

  def tensor_name(self, config: PolicyConfig, path: tuple[str, ...]) -> str:
    """The name of a parameter in the model's files; `{}` is the layer's number, and a second one
    the expert's."""


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
  layer's number, and a second one the expert's."""
  if path[0] not in STACKS:
    return _OUTSIDE[path[0]]
  *_, name, kind = path
  if bare := _BARE.get(kind) or _BARE.get(name):
    return f"model.layers.{{}}.{bare}"
  mlp_norm = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
  by_family = {"mlp_norm": mlp_norm} | ({"router": "router.proj"} if config.experts_beside else {})
  module = by_family.get(name) or _MODULES[name]
  if kind.startswith("lora_"):
    return f"base_model.model.model.layers.{{}}.{module}.lora_{kind[-1].upper()}.weight"
  return f"model.layers.{{}}.{module}.{'bias' if kind == 'bias' else 'weight'}"


def text_part(given: dict[str, Any]) -> dict[str, Any]:
  """The config.json of what a multimodal model is for text; any other one as it is."""
  whole, kind = _MULTIMODAL.get(given.get("model_type", ""), (None, ""))
  text = given.get("text_config")
  if not kind or type(text) is not dict or given.get("architectures") not in (None, [whole]):
    return given
  parts = {"text_config", "vision_config", "audio_config"}
  parts |= {"mm_tokens_per_image", "vision_soft_tokens_per_image"}
  own = {k: v for k, v in given.items() if k not in parts and not k.endswith("_token_index")}
  named = {"model_type": kind, "architectures": [FAMILIES[kind].architecture]}
  return own | text | named


def text_tensor(name: str) -> str:
  """What a tensor of a multimodal model is called in its text part; empty where it has none."""
  return (
    "" if any(part in name for part in _OTHER_SENSES) else name.replace("language_model.", "", 1)
  )


def counts_for_nothing(config: PolicyConfig, name: str) -> bool:
  """Whether a tensor that a model need not have may be left unread: the head of a tied model, old
  Llamas' rotary frequencies, keys of layers that read others' keys."""
  keys = _KEYS.fullmatch(name)
  tied = config.tied and name == family_of(config).tensor_name(config, ("head",))
  shared = keys is not None and config.is_shared(int(keys[1]))
  return tied or shared or name.endswith("rotary_emb.inv_freq")


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
  given = text_part(given)
  kind, architectures = given.get("model_type"), given.get("architectures")
  family = FAMILIES.get(kind or "")
  if family is None or architectures not in (None, [family.architecture]):
    supported = ", ".join(family.architecture for family in FAMILIES.values())
    what = f"the architecture {architectures or kind} is not supported (these are: {supported})"
    raise Fields(given, where).refuse(what)
  fields = Fields(family.left_out | given, where)
  fields.drop("model_type", "architectures")
  settings = sizes(fields) | family.settings
  settings |= {
    "tied": fields.take("tie_word_embeddings", False),
    "norm_eps": float(fields.number("rms_norm_eps", 1e-6)),
  }
  for part in family.parts:
    settings |= part(fields, settings["depth"])
  fields.check_rest()
  config = PolicyConfig(dtype=dtype, **settings)
  for key, why in config.check().items():
    raise fields.refuse(f"what it says about {key} {why}")
  return config
