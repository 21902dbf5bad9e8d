"""Makes tests/policy/reference: tiny random checkpoints of every family, and the logits that
transformers gives them.

The tests need the files, not this script. It needs torch and transformers,
in an environment of their own:

  python tests/policy/make_reference.py [NAME ...]
"""

import json
import pathlib
import shutil
import sys

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).with_name("reference")
LENGTHS = (1, 7, 64, 200)
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 500.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64,
}
YARN = {
  "rope_type": "yarn",
  "rope_theta": 1e4,
  "factor": 4.0,
  "original_max_position_embeddings": 64,
}
FULL, NEAR = "full_attention", "sliding_attention"

# name -> config, whether its config.json is in the older spelling, type of its weights. Windows are
# far shorter than the longest row.
MODELS = {
  "llama_scaled": (
    transformers.LlamaConfig(
      **SIZES, num_hidden_layers=2, num_key_value_heads=2, rope_parameters=LLAMA3, rms_norm_eps=1e-5
    ),
    False,
    "float32",
  ),
  "llama_tied": (
    transformers.LlamaConfig(
      **SIZES,
      num_hidden_layers=2,
      num_key_value_heads=1,
      head_dim=16,
      tie_word_embeddings=True,
      rope_parameters=LLAMA3,
    ),
    True,
    "bfloat16",
  ),
  "qwen2": (
    transformers.Qwen2Config(
      **SIZES, num_hidden_layers=2, num_key_value_heads=2, tie_word_embeddings=True
    ),
    True,
    "bfloat16",
  ),
  "qwen2_windowed": (
    transformers.Qwen2Config(
      **SIZES,
      num_hidden_layers=3,
      num_key_value_heads=1,
      use_sliding_window=True,
      sliding_window=9,
      max_window_layers=1,
      rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    ),
    False,
    "float32",
  ),
  "qwen3": (
    transformers.Qwen3Config(
      **SIZES, num_hidden_layers=2, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True
    ),
    False,
    "bfloat16",
  ),
  "qwen3_untied": (
    transformers.Qwen3Config(
      **SIZES,
      num_hidden_layers=2,
      num_key_value_heads=4,
      head_dim=8,
      rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
    ),
    True,
    "float32",
  ),
  "gemma2": (
    transformers.Gemma2Config(
      **SIZES,
      num_hidden_layers=3,
      num_key_value_heads=2,
      head_dim=16,
      query_pre_attn_scalar=24,
      sliding_window=8,
      attn_logit_softcapping=4.0,
      final_logit_softcapping=6.0,
    ),
    False,
    "bfloat16",
  ),
  "gemma2_old": (
    transformers.Gemma2Config(
      **SIZES,
      num_hidden_layers=2,
      num_key_value_heads=4,
      head_dim=8,
      query_pre_attn_scalar=8,
      sliding_window=5,
      attn_logit_softcapping=None,
      final_logit_softcapping=30.0,
    ),
    True,
    "float32",
  ),
  "gemma3": (
    transformers.Gemma3TextConfig(
      **SIZES,
      num_hidden_layers=3,
      num_key_value_heads=1,
      head_dim=16,
      query_pre_attn_scalar=16,
      sliding_window=8,
      layer_types=[FULL, NEAR, NEAR],
      rope_parameters={
        FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        NEAR: {"rope_type": "default", "rope_theta": 1e3},
      },
    ),
    False,
    "float32",
  ),
  "gemma3_old": (
    transformers.Gemma3TextConfig(
      **SIZES,
      num_hidden_layers=4,
      num_key_value_heads=2,
      head_dim=8,
      query_pre_attn_scalar=12,
      sliding_window=5,
      layer_types=[NEAR, NEAR, FULL, NEAR],
      final_logit_softcapping=10.0,
      rope_parameters={
        FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
        NEAR: {"rope_type": "default", "rope_theta": 1e4},
      },
    ),
    True,
    "bfloat16",
  ),
  "gemma": (
    transformers.GemmaConfig(**SIZES, num_hidden_layers=2, num_key_value_heads=1, head_dim=16),
    True,
    "float32",
  ),
  # Its text part is what counts, and its config.json leaves out what transformers knows.
  "gemma3_pictures": (
    transformers.Gemma3Config(
      text_config={
        **SIZES,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": [NEAR, FULL, NEAR],
        "rope_parameters": {
          FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
          NEAR: {"rope_type": "default", "rope_theta": 1e4},
        },
      },
      vision_config={
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "image_size": 16,
        "patch_size": 8,
      },
      mm_tokens_per_image=4,
      image_token_index=63,
      boi_token_index=62,
      eoi_token_index=61,
    ),
    False,
    "bfloat16",
  ),
  # Other heads in global layers, whose values are their keys.
  "gemma4": (
    transformers.Gemma4TextConfig(
      **SIZES,
      num_hidden_layers=6,
      num_key_value_heads=2,
      head_dim=8,
      global_head_dim=16,
      num_global_key_value_heads=1,
      attention_k_eq_v=True,
      hidden_size_per_layer_input=0,
      sliding_window=8,
      layer_types=[NEAR, NEAR, FULL] * 2,
      final_logit_softcapping=10.0,
    ),
    False,
    "float32",
  ),
  # Of several senses, without encoders for them.
  "gemma4_unified": (
    transformers.Gemma4UnifiedConfig(
      text_config={
        **SIZES,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": 8,
        "layer_types": [NEAR, FULL] * 2,
        "final_logit_softcapping": 10.0,
        "pad_token_id": 0,
      },
      # None of the rows has one of these.
      image_token_id=64,
      audio_token_id=65,
      video_token_id=66,
      boi_token_id=67,
      eoi_token_id=68,
      boa_token_id=69,
      eoa_token_index=70,
    ),
    False,
    "float32",
  ),
  # Experts beside an MLP.
  "gemma4_moe": (
    transformers.Gemma4TextConfig(
      **SIZES,
      num_hidden_layers=4,
      num_key_value_heads=2,
      head_dim=8,
      global_head_dim=16,
      num_global_key_value_heads=2,
      attention_k_eq_v=True,
      hidden_size_per_layer_input=0,
      sliding_window=8,
      layer_types=[NEAR, FULL] * 2,
      final_logit_softcapping=30.0,
      enable_moe_block=True,
      num_experts=8,
      top_k_experts=3,
      moe_intermediate_size=24,
    ),
    False,
    "bfloat16",
  ),
  # Layers with embeddings of their own, and the last ones without keys; a model of several senses.
  "gemma4_shared": (
    transformers.Gemma4Config(
      text_config={
        **SIZES,
        "num_hidden_layers": 6,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "global_head_dim": 16,
        "vocab_size_per_layer_input": SIZES["vocab_size"],
        "hidden_size_per_layer_input": 4,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "sliding_window": 8,
        "layer_types": [NEAR, FULL] * 3,
        "final_logit_softcapping": 30.0,
        "pad_token_id": 0,
      },
      # None of the rows has one of these.
      image_token_id=64,
      audio_token_id=65,
      video_token_id=66,
      boi_token_id=67,
      eoi_token_id=68,
      boa_token_id=69,
      eoa_token_index=70,
    ),
    False,
    "bfloat16",
  ),
  "mistral": (
    transformers.MistralConfig(
      **SIZES, num_hidden_layers=2, num_key_value_heads=2, sliding_window=9
    ),
    True,
    "float32",
  ),
  "smollm3": (
    transformers.SmolLM3Config(
      **SIZES, num_hidden_layers=3, num_key_value_heads=2, no_rope_layers=[1, 0, 1], pad_token_id=0
    ),
    False,
    "float32",
  ),
  "olmo2": (
    transformers.Olmo2Config(**SIZES, num_hidden_layers=2, num_key_value_heads=2),
    False,
    "float32",
  ),
  "qwen3_moe": (
    transformers.Qwen3MoeConfig(
      **SIZES,
      num_hidden_layers=2,
      num_key_value_heads=2,
      head_dim=8,
      num_experts=8,
      num_experts_per_tok=3,
      moe_intermediate_size=24,
      norm_topk_prob=True,
      rope_parameters=YARN,
    ),
    False,
    "float32",
  ),
}


def in_older_spelling(config: dict) -> dict:
  """What the same model's config.json looks like on the hub."""
  config = {key: value for key, value in config.items() if key != "_sliding_window_pattern"}
  config["torch_dtype"] = config.pop("dtype")
  rope = config.pop("rope_parameters")
  if config["model_type"] == "gemma3_text":
    config["rope_local_base_freq"] = rope[NEAR]["rope_theta"]
    config["sliding_window_pattern"] = config["layer_types"].index(FULL) + 1
    rope = rope[FULL]
  config["rope_theta"] = rope.pop("rope_theta")
  config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
  config.pop("layer_types", None)
  return config


def make(name: str, config, old: bool, dtype: str) -> None:
  folder = FOLDER / name
  torch.manual_seed(sum(map(ord, name)))
  model = transformers.AutoModelForCausalLM.from_config(config)
  newest = "gemma4" in config.model_type  # Its scores are not divided by anything.
  plus_one = "gemma" in config.model_type and not newest
  with torch.no_grad():
    for parameter in model.parameters():
      # So large that attention is far from uniform, and every bias and norm shows.
      large = parameter * (8 if newest else 12)
      parameter.copy_(torch.randn_like(parameter) * 0.3 if parameter.ndim == 1 else large)
      if parameter.ndim == 1 and not plus_one:
        parameter.add_(1.0)
    for key, buffer in model.named_buffers():
      if key.endswith("layer_scalar"):
        buffer.copy_(torch.rand_like(buffer) + 0.5)
  model.to(getattr(torch, dtype)).save_pretrained(
    folder, max_shard_size="50KB" if dtype == "bfloat16" else "1GB"
  )
  path = folder / "config.json"
  if old:
    path.write_text(json.dumps(in_older_spelling(json.loads(path.read_text())), indent=2) + "\n")

  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager"
  )
  rng = np.random.default_rng(0)
  rows = [rng.integers(SIZES["vocab_size"], size=n) for n in LENGTHS]
  longest = max(LENGTHS)
  tokens = torch.tensor(np.stack([np.pad(row, (longest - len(row), 0)) for row in rows]))
  mask = torch.tensor(np.stack([np.arange(longest) >= longest - n for n in LENGTHS]).astype(int))
  with torch.no_grad():
    logits = model(
      tokens, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)
    ).logits.numpy()
  kept = {f"logits_{n}": logits[i, longest - n :] for i, n in enumerate(LENGTHS)}
  np.savez_compressed(
    folder / "reference.npz", **kept, **{f"tokens_{len(r)}": r.astype(np.int32) for r in rows}
  )
  print(name, f"|logits| up to {np.abs(logits[-1]).max():.2f}, spread {logits[-1].std():.2f}")


if __name__ == "__main__":
  for name in sys.argv[1:] or MODELS:
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    make(name, *MODELS[name])
