"""Pretrained weights: what is refused, and that what comes in goes out as it was."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dca_jax.commands import cli
from dca_jax.commands.export import export
from dca_jax.config import ConfigError
from dca_jax.devices.mesh import (
  MeshConfig,
  make_mesh,
  param_shapes,
  sampler_params,
  state_shardings,
)
from dca_jax.errors import UserError
from dca_jax.learner import LearnerConfig, make_optimizer
from dca_jax.loop import train
from dca_jax.policy import Head, Policy, PolicyConfig, Sampling, pretrained, sampling_logits, split
from dca_jax.policy.families import from_json

FOLDER = pathlib.Path(__file__).with_name("reference")
VOCAB = 64


def read(folder, mesh=None, tokens=VOCAB):
  policy = Policy(pretrained.resolve(PolicyConfig(pretrained=str(folder)), tokens), tokens)
  mesh = make_mesh(mesh or MeshConfig())
  return policy, pretrained.load(
    policy, folder, state_shardings(mesh, policy, make_optimizer(LearnerConfig(), 1)).params
  )


def tensors(folder):
  """All tensors of a folder, read with no code of ours."""
  return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def test_cudnn_is_refused_where_scores_are_capped():
  asked = PolicyConfig(pretrained=str(FOLDER / "gemma2"), dtype="bfloat16", attention="cudnn")
  with pytest.raises(
    UserError, match=r"policy\.attention can be 'cudnn' only .* without policy\.attention_soft_cap"
  ):
    pretrained.resolve(asked, VOCAB)
  assert (
    pretrained.resolve(dataclasses.replace(asked, attention="auto", remat="layers"), VOCAB).remat
    == "layers"
  )


@pytest.fixture
def copy(tmp_path):
  """A checkpoint in two files, to spoil."""
  return shutil.copytree(FOLDER / "gemma3_old", tmp_path / "model")


def change_config(folder, **changes):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def message(folder) -> str:
  with pytest.raises(UserError) as raised:
    read(folder)
  assert "\n" not in str(raised.value)
  return str(raised.value)


# Bad input.


def test_a_missing_file_is_named(copy):
  (copy / "model-00002-of-00002.safetensors").unlink()
  assert "model-00002-of-00002.safetensors is missing" in message(copy)


def test_a_folder_without_weights(copy):
  for path in copy.glob("model*"):
    path.unlink()
  assert "model.safetensors is missing" in message(copy)


@pytest.mark.parametrize("size", [-40, 100, 4, 0])
def test_a_file_that_is_cut_short_is_named(copy, size):
  path = copy / "model-00002-of-00002.safetensors"
  path.write_bytes(path.read_bytes()[:size])
  assert "model-00002-of-00002.safetensors is cut short or damaged" in message(copy)


def spoil(copy, change):
  for path in copy.glob("*.safetensors"):
    save_file(change(load_file(path)), path)


def test_a_missing_tensor_is_named(copy):
  name = "model.layers.2.self_attn.k_norm.weight"
  spoil(copy, lambda tensors: {k: v for k, v in tensors.items() if k != name})
  assert f"no tensor {name}" in message(copy)


def test_a_tensor_of_another_shape_is_named(copy):
  name = "model.layers.1.mlp.up_proj.weight"
  spoil(copy, lambda tensors: {k: v[:-1] if k == name else v for k, v in tensors.items()})
  said = message(copy)
  assert f"{name} has the shape (47, 32)" in said
  assert "it is (48, 32)" in said


def test_a_tensor_that_the_model_does_not_have_is_named(copy):
  extra = {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}
  spoil(copy, lambda tensors: tensors | extra)
  assert "model.layers.0.self_attn.q_proj.bias is a tensor" in message(copy)


def test_a_tied_head_that_is_written_out_is_not_read(copy):
  spoil(copy, lambda tensors: tensors | {"lm_head.weight": np.ones((VOCAB, 32), np.float32)})
  jax.tree.map(np.testing.assert_array_equal, read(copy)[1], read(FOLDER / "gemma3_old")[1])


LLAMA = json.loads((FOLDER / "llama_tied" / "config.json").read_text())
NEW = json.loads((FOLDER / "gemma3" / "config.json").read_text())
PICTURES = json.loads((FOLDER / "gemma3_pictures" / "config.json").read_text())
MOE = json.loads((FOLDER / "qwen3_moe" / "config.json").read_text())
GEMMA_4 = json.loads((FOLDER / "gemma4" / "config.json").read_text())
# How the hub says what transformers 5 says layer by layer.
HUB = {"per_layer_config": None, "global_head_dim": 16, "num_global_key_value_heads": 1}
NEAR, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
  ("given", "changes", "words"),
  [
    (
      LLAMA,
      {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]},
      "Phi3ForCausalLM",
    ),
    (
      LLAMA,
      {"architectures": ["LlamaForSequenceClassification"]},
      "LlamaForSequenceClassification",
    ),
    (LLAMA, {"attention_bias": True}, "attention_bias = True"),
    (LLAMA, {"mlp_bias": True}, "mlp_bias = True"),
    (LLAMA, {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    (LLAMA, {"num_experts": 8}, "num_experts"),
    (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
    (LLAMA, {"auto_map": {"AutoConfig": "modeling_x.X"}}, "auto_map"),
    (LLAMA, {"rope_interleaved": True}, "rope_interleaved = True"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    (LLAMA, {"sliding_window": 4096}, "sliding_window"),
    (LLAMA, {"hidden_size": "32"}, "hidden_size must be a number"),
    (LLAMA, {"num_attention_heads": 0}, "heads must be positive"),
    (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "'yarn'"),
    (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "lack original_max_position"),
    (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, "lack factor"),
    (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 1}}, "mscale"),
    (NEW, {"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
    (NEW, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    (NEW, {"layer_types": ["full_attention"]}, "layer_types"),
    (NEW, {"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "layer_types"),
    (NEW, {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, "rope_parameters"),
    (NEW, {"sliding_window": None}, "window must be at least 1"),
    (PICTURES, {"quantization_config": {"bits": 4}}, "quantization_config"),
    (PICTURES, {"architectures": ["Gemma3Other"]}, "Gemma3Other"),
    (PICTURES, {"text_config": None}, "Gemma3ForConditionalGeneration"),
    (GEMMA_4, {"use_bidirectional_attention": "all"}, "use_bidirectional_attention = 'all'"),
    (GEMMA_4, {"layer_types": [NEAR, FULL, NEAR, NEAR, FULL, FULL]}, "per_layer_config must say"),
    (GEMMA_4 | HUB, {"layer_types": [NEAR, FULL, NEAR, NEAR, FULL, FULL]}, "every n-th"),
    (GEMMA_4, {"per_layer_config": {"2": {"head_dim": 8}, "5": {"head_dim": 16}}}, "per_layer"),
    (GEMMA_4 | HUB, {"num_kv_shared_layers": 2}, "kv_shared must be below policy.depth (6)"),
    (GEMMA_4 | HUB, {"global_head_dim": 15}, "global_head_dim must be 0, or even"),
    (MOE, {"mlp_only_layers": [1]}, "layers with experts beside layers without"),
    (MOE, {"num_experts_per_tok": 9}, "experts_per_token must be at most policy.experts (8)"),
    (
      {key: value for key, value in NEW.items() if key != "rope_parameters"},
      {
        "rope_parameters": {
          "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
          "sliding_attention": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0},
        }
      },
      "of sliding_attention must have the rope_type 'default'",
    ),
  ],
)
def test_a_field_that_changes_numbers_is_refused_by_name(given, changes, words):
  with pytest.raises(UserError) as raised:
    from_json(given | changes, "config.json", "float32")
  assert words in str(raised.value)
  assert str(raised.value).startswith("config.json: ")


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "model_type"])
def test_a_field_that_is_missing(key):
  with pytest.raises(UserError, match=key if key != "model_type" else "not supported"):
    from_json(
      {k: v for k, v in LLAMA.items() if k not in (key, "architectures")}, "config.json", "float32"
    )


NOTES = {
  "use_cache": False,
  "eos_token_id": [1, 2],
  "attention_dropout": 0.1,
  "unsloth_fixed": True,
  "unsloth_version": "2025.3.19",
  "is_llama_config": True,
  "rope_interleaved": False,
  "_attn_implementation_autoset": True,
  "_model_name_or_path": "a/b",
  "transformers.js_config": {"dtype": "q4"},
  "return_dict": True,
  "quantization_config": None,
  "partial_rotary_factor": 1.0,
  "new_one": None,
  "new_two": False,
  "new_three": {},
}


def test_notes_change_nothing():
  assert from_json(LLAMA | NOTES, "", "float32") == from_json(LLAMA, "", "float32")


@pytest.mark.parametrize("value", [True, 1, 0, 0.0, "x", [0]], ids=str)
def test_a_field_that_may_change_a_number_is_refused_and_told_what_to_do(value):
  with pytest.raises(
    UserError,
    match=r"the field use_wider_mlp = .* is not known, .*; if it is only a note, remove it",
  ):
    from_json(LLAMA | {"use_wider_mlp": value}, "config.json", "float32")


SHORT = {
  "hidden_size": 32,
  "num_hidden_layers": 7,
  "num_attention_heads": 4,
  "intermediate_size": 8,
  "vocab_size": 9,
}


def test_what_a_config_leaves_out_is_as_transformers_has_it():
  read = functools.partial(from_json, where="", dtype="float32")
  expected = PolicyConfig(
    width=32, depth=7, heads=4, kv_heads=4, head_dim=8, mlp=8, vocab_size=9, tied=False
  )
  assert read({"model_type": "llama", **SHORT}) == expected
  none = dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"))
  heads = {"num_key_value_heads": 2, "head_dim": 4}
  gemma = read({"model_type": "gemma3_text", "query_pre_attn_scalar": 8, **none, **heads, **SHORT})
  assert (gemma.tied, gemma.rope_theta, gemma.local_rope_theta) == (True, 1e6, 1e4)
  assert (gemma.window, gemma.windowed) == (4096, (0, 1, 2, 3, 4, 6))
  qwen = read({"model_type": "qwen2", "num_key_value_heads": 2, **SHORT})
  assert (qwen.head_dim, qwen.kv_heads, qwen.rope_theta) == (8, 2, 1e4)


@pytest.mark.parametrize(
  ("kind", "key"),
  [("qwen2", "num_key_value_heads"), ("qwen3", "num_key_value_heads"), ("qwen3", "head_dim")],
)
def test_sizes_that_follow_from_nothing_must_be_there(kind, key):
  given = {"model_type": kind, "num_key_value_heads": 2, "head_dim": 4, **SHORT}
  with pytest.raises(UserError, match=f"the field {key} is missing"):
    from_json({k: value for k, value in given.items() if k != key}, "config.json", "float32")


@pytest.mark.parametrize(
  ("changes", "window", "windowed"),
  [
    ({}, 0, ()),
    ({"use_sliding_window": False, "max_window_layers": 2}, 0, ()),
    ({"use_sliding_window": True, "max_window_layers": 5}, 3, (5, 6)),
    ({"use_sliding_window": True}, 0, ()),
    ({"use_sliding_window": True, "max_window_layers": 0}, 3, (0, 1, 2, 3, 4, 5, 6)),
    ({"use_sliding_window": True, "max_window_layers": 7}, 0, ()),
    ({"use_sliding_window": True, "layer_types": ["full_attention"] * 7}, 0, ()),
  ],
  ids=str,
)
def test_windows_of_qwen_layers(changes, window, windowed):
  given = {"model_type": "qwen2", "num_key_value_heads": 4, "sliding_window": 3, **SHORT, **changes}
  config = from_json(given, "", "float32")
  assert (config.window, config.windowed) == (window, windowed)


@pytest.mark.parametrize(
  ("kind", "changes", "expected"),
  [
    ("mistral", {}, {"window": 4096, "windowed": (0, 1, 2, 3, 4, 5, 6)}),
    ("mistral", {"sliding_window": None}, {}),
    ("smollm3", {}, {"unrotated": (3,), "tied": True, "rope_theta": 2e6}),
    (
      "smollm3",
      {"use_sliding_window": True, "sliding_window": 8, "no_rope_layer_interval": 3},
      {"unrotated": (2, 5), "window": 8, "windowed": (2, 5), "tied": True, "rope_theta": 2e6},
    ),
  ],
  ids=str,
)
def test_layers_that_differ(kind, changes, expected):
  given = {"model_type": kind, "num_key_value_heads": 4, **SHORT, **changes}
  plain = from_json({"model_type": "llama", **SHORT}, "", "float32")
  assert from_json(given, "", "float32") == dataclasses.replace(plain, **expected)


def test_either_spelling_of_the_window_pattern_counts():
  old = {
    key: value for key, value in NEW.items() if key not in ("layer_types", "sliding_window_pattern")
  }
  plain, private = (
    {**old, key: 2} for key in ("sliding_window_pattern", "_sliding_window_pattern")
  )
  read = [from_json(given, "", "float32") for given in (plain, private)]
  assert read[0] == read[1]
  assert read[0].windowed == (0, 2)


def test_either_spelling_of_the_heads_of_global_layers_counts():
  assert from_json(GEMMA_4 | HUB, "", "float32") == from_json(GEMMA_4, "", "float32")
  same_heads = from_json(GEMMA_4 | HUB | {"attention_k_eq_v": False}, "", "float32")
  assert (same_heads.global_head_dim, same_heads.global_kv_heads) == (16, 0)


def test_keys_that_a_layer_has_and_does_not_read_are_left_alone(tmp_path):
  folder = shutil.copytree(FOLDER / "gemma4_shared", tmp_path / "model")
  index = json.loads((folder / "model.safetensors.index.json").read_text())
  extra = {
    f"model.language_model.layers.{i}.self_attn.k_proj.weight": np.ones((8, 32)) for i in (4, 5)
  }
  save_file(extra, folder / "more.safetensors")
  index["weight_map"] |= dict.fromkeys(extra, "more.safetensors")
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  jax.tree.map(np.testing.assert_array_equal, read(folder)[1], read(FOLDER / "gemma4_shared")[1])


def test_config_json_that_is_none(copy):
  (copy / "config.json").write_text("[1, 2")
  assert "config.json is unreadable" in message(copy)


def test_a_model_that_is_nowhere():
  with pytest.raises(UserError, match="'nobody/no-such-model' is no folder") as raised:
    pretrained.folder("nobody/no-such-model")
  assert "\n" not in str(raised.value)


def test_a_model_that_cannot_be_read_claims_no_workdir(tmp_path):
  with pytest.raises(UserError, match="is no folder"):
    train(
      tiny.make_config(RUN | {"policy.pretrained": str(tmp_path / "typo")}),
      str(tmp_path / "run"),
      quiet=True,
    )
  assert not (tmp_path / "run").exists()


def test_more_tokens_than_rows():
  """A published model may have fewer rows than its tokenizer has ids; a size
  of one's own may not."""
  assert (
    pretrained.resolve(PolicyConfig(pretrained=str(FOLDER / "qwen3")), VOCAB + 1).vocab_size
    == VOCAB
  )
  with pytest.raises(UserError, match=r"policy\.vocab_size: must be 0 or at least 65"):
    pretrained.resolve(PolicyConfig(vocab_size=VOCAB), VOCAB + 1)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"policy.width": 16}, "policy.width: has no effect"),
    ({"policy.rope_scaling": (2.0,)}, "policy.rope_scaling: has no effect"),
    ({"warmstart.steps": 60}, "warmstart.steps: must be 0"),
    ({"warmstart.seed": 1}, "warmstart.seed: has no effect"),
  ],
)
def test_keys_that_the_pretrained_model_decides(changes, words):
  with pytest.raises(ConfigError, match=words):
    tiny.make_config(RUN | changes)


# In and out.


# The tokenizer of the task has fewer tokens than the checkpoint's embedding has rows.
RUN = {
  **{f"policy.{key}": getattr(PolicyConfig, key) for key in tiny.SETTINGS["policy"]},
  **{f"warmstart.{key}": value for key, value in {"steps": 0, "batch": 32, "lr": 6e-3}.items()},
  "policy.pretrained": str(FOLDER / "qwen2"),
  "policy.remat": "layers",
  "learner.entropy": 0.1,  # Something to learn, where no answer is right.
  "steps": 2,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  train(tiny.make_config(RUN), str(workdir), quiet=True)
  return workdir


def test_a_run_starts_from_the_pretrained_weights(run):
  start = tiny.saved_state(run, 1)
  embedding = tensors(FOLDER / "qwen2")["model.embed_tokens.weight"].astype(np.float32)
  # One step of Adam moves no weight by more than the learning rate.
  moved = np.abs(start["['params']['embedding']"] - embedding)
  assert 0 < moved.max() < 0.01


def test_export_of_a_run_is_its_last_parameters(run, tmp_path):
  said = export(str(run), str(tmp_path / "out"))
  assert "step 2" in said
  saved = tiny.saved_state(run, 2)
  _, params = read(tmp_path / "out")
  for path, leaf in jax.tree.leaves_with_path(params):
    assert np.asarray(leaf).tobytes() == saved["['params']" + jax.tree_util.keystr(path)].tobytes()
  theirs, ours = tensors(FOLDER / "qwen2"), tensors(tmp_path / "out")
  assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
  config, original = (
    json.loads((p / "config.json").read_text()) for p in (tmp_path / "out", FOLDER / "qwen2")
  )
  assert config == original | {"torch_dtype": "float32"}
  assert (tmp_path / "out" / "tokenizer.json").exists()
  assert (tmp_path / "out" / "generation_config.json").exists()


def test_eval_of_an_exported_folder_gives_the_scores_of_the_run(run, tmp_path, capsys):
  export(str(run), str(tmp_path / "out"))
  recipe = tiny.write_recipe(tmp_path, RUN | {"policy.pretrained": str(tmp_path / "out")})
  capsys.readouterr()
  assert cli.main(["eval", f"--config={recipe}", "--json", "--quiet"]) == 0
  found = json.loads(capsys.readouterr().out)["all"]
  last = tiny.read_lines(run)[-1]
  assert found.keys() == {"greedy", "sampled", "pass@2", "length", "maj@2"}
  assert {name: e[0] for name, e in found.items()} == pytest.approx(
    {name: last[f"eval/{name}"] for name in found}
  )


def test_export_of_an_earlier_step_and_of_what_is_not_there(run, tmp_path):
  export(str(run), str(tmp_path / "one"), 1)
  assert (
    tensors(tmp_path / "one")["model.norm.weight"].tobytes()
    == tiny.saved_state(run, 1)["['params']['final_norm']['scale']"].tobytes()
  )
  with pytest.raises(UserError, match="already there"):
    export(str(run), str(tmp_path / "one"))
  with pytest.raises(UserError, match=r"no checkpoint of step 7; there are \[1, 2\]"):
    export(str(run), str(tmp_path / "seven"), 7)
  with pytest.raises(UserError, match="holds no run"):
    export(str(tmp_path / "nothing"), str(tmp_path / "other"))
  with pytest.raises(UserError, match="has no adapters"):
    export(str(run), str(tmp_path / "other"), adapters=True)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


def test_a_model_that_was_replaced_since_is_not_exported(run, tmp_path):
  folder = shutil.copytree(FOLDER / "qwen2", tmp_path / "model")
  change_config(folder, intermediate_size=8)
  workdir = shutil.copytree(run, tmp_path / "run")
  settings = (workdir / "config.json").read_text()
  (workdir / "config.json").write_text(settings.replace(str(FOLDER / "qwen2"), str(folder)))
  with pytest.raises(UserError, match=r"config\.json does not describe what was trained any more"):
    export(str(workdir), str(tmp_path / "out"))
  assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
  "name",
  [
    "gemma",
    "gemma2",
    "gemma4",
    "gemma4_moe",
    "llama_scaled",
    "mistral",
    "olmo2",
    "qwen3_moe",
    "smollm3",
  ],
)
def test_what_goes_out_in_several_files_comes_in_bit_for_bit(name, tmp_path, monkeypatch):
  monkeypatch.setattr(pretrained, "_SHARD_BYTES", 20_000)
  policy, params = read(FOLDER / name)
  (tmp_path / "tokenizer").mkdir()
  pretrained.save(
    params, policy.config, str(FOLDER / name), tmp_path / "tokenizer", tmp_path / "out"
  )
  assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
  again, reloaded = read(tmp_path / "out")
  assert again.config == policy.config
  assert jax.tree.map(lambda x: np.asarray(x).tobytes(), reloaded) == jax.tree.map(
    lambda x: np.asarray(x).tobytes(), params
  )
  expected = {k: v.astype(np.float32) for k, v in tensors(FOLDER / name).items()}
  got = tensors(tmp_path / "out")
  assert got.keys() == expected.keys()
  for key, value in expected.items():
    assert got[key].tobytes() == value.tobytes(), key
  for path in (tmp_path / "out").glob("*.safetensors"):
    with safe_open(path, "np") as file:
      assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
  ("name", "architecture"),
  [
    ("gemma3_pictures", "Gemma3ForCausalLM"),
    ("gemma4_shared", "Gemma4ForCausalLM"),
    ("gemma4_unified", "Gemma4UnifiedForCausalLM"),
  ],
)
def test_the_text_part_of_a_multimodal_model_is_a_model_of_its_own(name, architecture, tmp_path):
  policy, params = read(FOLDER / name)
  (tmp_path / "tokenizer").mkdir()
  save = functools.partial(
    pretrained.save,
    original=str(FOLDER / name),
    tokenizer=tmp_path / "tokenizer",
    output=tmp_path / "out",
  )
  adapted = dataclasses.replace(policy.config, lora_rank=1)
  with pytest.raises(UserError, match=r"reads pictures too, .*; leave --adapters out"):
    save(split(param_shapes(Policy(adapted, VOCAB)))[1], adapted)
  save(params, policy.config)
  written = json.loads((tmp_path / "out" / "config.json").read_text())
  assert written["architectures"] == [architecture]
  assert "vision_config" not in written
  assert {name.partition(".")[0] for name in tensors(tmp_path / "out")} == {"model"}
  again, reloaded = read(tmp_path / "out")
  assert again.config == policy.config
  jax.tree.map(np.testing.assert_array_equal, reloaded, params)


def test_a_router_is_not_rounded_for_sampling():
  policy = Policy(PolicyConfig(experts=4, experts_per_token=2, dtype="bfloat16"), VOCAB)
  read = jax.eval_shape(functools.partial(sampler_params, policy), param_shapes(policy))
  layer = read["blocks"]["experts"]
  assert layer["router"]["kernel"].dtype == jnp.float32
  assert layer["expert_up"]["kernel"].dtype == read["embedding"].dtype == jnp.bfloat16


def test_experts_have_no_adapters():
  asked = PolicyConfig(pretrained=str(FOLDER / "qwen3_moe"), lora_rank=2)
  with pytest.raises(UserError, match=r"policy\.lora_targets can only be some of q, k, v and o"):
    pretrained.resolve(asked, VOCAB)
  asked = dataclasses.replace(asked, lora_targets=("q", "v"))
  assert pretrained.resolve(asked, VOCAB).experts == 8


def test_a_write_that_went_wrong_leaves_no_folder(tmp_path, monkeypatch):
  policy, params = read(FOLDER / "qwen3")
  (tmp_path / "tokenizer").mkdir()

  def careless(tensors, path, metadata):
    save_file({k: v + (k == "model.norm.weight") for k, v in tensors.items()}, path, metadata)

  monkeypatch.setattr(pretrained, "save_file", careless)
  with pytest.raises(UserError, match=r"model\.norm\.weight was not written as it is"):
    pretrained.save(
      params, policy.config, str(FOLDER / "qwen3"), tmp_path / "tokenizer", tmp_path / "out"
    )
  assert not (tmp_path / "out").exists()


# Ids that are no token.


def test_ids_that_are_no_token_are_never_sampled():
  rng = np.random.default_rng(0)
  hidden, matrix = (jnp.float32(rng.normal(size=size)) for size in ((5, 8), (12, 8)))
  for sampling in (Sampling(), Sampling(top_k=20), Sampling(top_p=0.9), Sampling(top_k=3)):
    got = sampling_logits(hidden, Head(matrix, vocab_size=9), sampling)
    assert np.all(np.asarray(got)[:, 9:] == -np.inf)
    np.testing.assert_array_equal(got[:, :9], sampling_logits(hidden, Head(matrix[:9]), sampling))


# Several devices.


TOKENS = np.arange(96).reshape(8, 12) ** 2 % VOCAB


def learned(policy, params):
  """Gradients of every parameter."""

  @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
  def gradients(params):
    return jax.grad(
      lambda p: jnp.square(policy.apply({"params": p}, TOKENS)[0] * jnp.arange(32)).sum()
    )(params)

  return flat(gradients(params))


MESHES = {
  "qwen2_windowed": MeshConfig(data=2, fsdp=4),
  "llama_scaled": MeshConfig(data=2, fsdp=2, tensor=2),
  "gemma4_shared": MeshConfig(data=2, fsdp=4),
  "gemma4_moe": MeshConfig(data=2, fsdp=2, tensor=2),
  "qwen3_moe": MeshConfig(data=2, fsdp=2, tensor=2),
}
LEARNED = ("gemma4_moe",)


def on_eight_devices(folder: pathlib.Path) -> None:
  for name, mesh in MESHES.items():
    policy, params = read(FOLDER / name, mesh)
    for path, leaf in jax.tree.leaves_with_path(params):
      assert path[-1].key != "kernel" or not leaf.sharding.is_fully_replicated, path
    np.savez(folder / f"{name}.npz", **flat(params))
    if name in LEARNED:
      gradients = learned(policy.clone(mesh=make_mesh(mesh)), params)
      np.savez(folder / f"{name}_learned.npz", **gradients)
  assert params["blocks"]["experts"]["expert_up"]["kernel"].sharding.spec[:2] == (None, "tensor")


def flat(params):
  return {
    jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(params)
  }


def test_eight_devices_read_what_one_reads(tmp_path):
  paths = [str(pathlib.Path(__file__).parents[2]), str(pathlib.Path(__file__).parents[1])]
  environment = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
  }
  command = [sys.executable, __file__, str(tmp_path)]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  for name in MESHES:
    with np.load(tmp_path / f"{name}.npz") as file:
      tiny.assert_same_arrays(dict(file), flat(read(FOLDER / name)[1]))
  for name in LEARNED:
    with np.load(tmp_path / f"{name}_learned.npz") as file:
      for key, expected in learned(*read(FOLDER / name)).items():
        close = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(file[key], expected, atol=close, err_msg=f"{name} {key}")


if __name__ == "__main__":
  on_eight_devices(pathlib.Path(sys.argv[1]))
