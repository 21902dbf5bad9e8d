"""Low-rank adapters: only they are trained, saved and counted; merged they compute the same."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import words
from etils import epath
from fake_server import FakeServer, honest_reply
from safetensors.numpy import save_file
from test_pretrained import tensors

from dca_jax.commands.cli import main
from dca_jax.commands.export import export, read_params
from dca_jax.config import ConfigError
from dca_jax.devices.mesh import MeshConfig, make_mesh, param_shardings
from dca_jax.errors import UserError
from dca_jax.loop import train
from dca_jax.policy import Policy, PolicyConfig, join, merge, pretrained, sampling_logits, split
from dca_jax.policy.logprobs import Sampling

FOLDER = pathlib.Path(__file__).with_name("reference")
VOCAB = 64
EVERYTHING = ("q", "k", "v", "o", "gate", "up", "down")


def adapted(family="qwen3", targets=EVERYTHING, dtype="float32"):
  """A model with adapters that do something."""
  given = PolicyConfig(
    pretrained=str(FOLDER / family), dtype=dtype, lora_rank=3, lora_alpha=6.0, lora_targets=targets
  )
  policy = Policy(pretrained.resolve(given, VOCAB), VOCAB)
  params = pretrained.load(
    policy, FOLDER / family, param_shardings(make_mesh(MeshConfig()), policy)
  )
  frozen, adapters = split(params)
  dice = np.random.default_rng(0)
  adapters = jax.tree.map(lambda a: jnp.asarray(dice.normal(0, 0.1, a.shape), a.dtype), adapters)
  return policy, join(frozen, adapters)


@functools.partial(
  jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)
def logits(policy, params):
  prompts, lengths = jnp.arange(12).reshape(2, 6) % VOCAB, jnp.array([6, 4])
  completions = (jnp.arange(40).reshape(4, 10) * 7) % VOCAB
  hidden = policy.completion_hidden(params, prompts, lengths, completions)
  return sampling_logits(hidden.reshape(-1, hidden.shape[-1]), policy.head(params), Sampling())[
    :, :VOCAB
  ]


@pytest.mark.parametrize("family", ["qwen3", "gemma4_shared", "llama_scaled"])
def test_merged_weights_compute_what_the_adapters_do(family):
  policy, params = adapted(family)
  plain = Policy(dataclasses.replace(policy.config, lora_rank=0), VOCAB)
  ours, theirs = logits(policy, params), logits(plain, merge(params, policy.config.lora_scale))
  assert np.abs(ours - theirs).max() < 1e-4
  assert np.abs(ours - logits(plain, split(params)[0])).max() > 0.1


def test_new_adapters_change_nothing():
  given = PolicyConfig(pretrained=str(FOLDER / "qwen3"), lora_rank=2)
  policy = Policy(pretrained.resolve(given, VOCAB), VOCAB)
  params = pretrained.load(
    policy, FOLDER / "qwen3", param_shardings(make_mesh(MeshConfig()), policy)
  )
  plain = Policy(dataclasses.replace(policy.config, lora_rank=0), VOCAB)
  np.testing.assert_array_equal(logits(policy, params), logits(plain, split(params)[0]))
  assert all(
    np.any(a) for path, a in jax.tree.leaves_with_path(split(params)[1]) if path[-1].key == "lora_a"
  )


def test_targets_alone_have_adapters_and_what_they_adapt_is_kept_in_the_dtype_of_activations():
  policy, params = adapted(targets=("q", "down"), dtype="bfloat16")
  frozen, adapters = split(params)
  assert adapters["blocks"].keys() == {"q", "down"}
  assert {a.dtype.name for a in jax.tree.leaves(frozen)} == {"bfloat16"}
  assert {a.dtype.name for a in jax.tree.leaves(adapters)} == {"float32"}
  assert np.isfinite(logits(policy, params)).all()


# In each layer of reference/qwen3, with rank 3, as peft 0.21 writes them (lora_A and lora_B of
# each).
PEFT = {
  "mlp.down_proj": ((3, 48), (32, 3)),
  "mlp.gate_proj": ((3, 32), (48, 3)),
  "mlp.up_proj": ((3, 32), (48, 3)),
  "self_attn.k_proj": ((3, 32), (32, 3)),
  "self_attn.o_proj": ((3, 64), (32, 3)),
  "self_attn.q_proj": ((3, 32), (64, 3)),
  "self_attn.v_proj": ((3, 32), (32, 3)),
}


def assert_adapters_make(adapters, start, merged, scale):
  """Adds them to the weights as peft does, with no code of ours."""
  expected = {key: value.astype(np.float32) for key, value in start.items()}
  for name, b in adapters.items():
    if name.endswith(".lora_B.weight"):
      key = name.removeprefix("base_model.model.").replace(".lora_B", "")
      expected[key] = expected[key] + scale * b @ adapters[name.replace(".lora_B", ".lora_A")]
  assert merged.keys() == expected.keys()
  for key, value in merged.items():
    np.testing.assert_allclose(value, expected[key], atol=1e-5, err_msg=key)


@pytest.mark.parametrize(
  ("family", "layers"),
  [("qwen3", 2), ("qwen2", 2), ("gemma2", 3), ("gemma3", 3), ("llama_tied", 2)],
)
def test_adapters_alone_are_as_peft_has_them(family, layers, tmp_path):
  policy, params = adapted(family)
  original = str(FOLDER / family)
  plain = pretrained.resolve(PolicyConfig(pretrained=original), VOCAB)
  (tmp_path / "tokenizer").mkdir()
  pretrained.save(
    split(params)[1], policy.config, original, tmp_path / "tokenizer", tmp_path / "out"
  )
  pretrained.save(merge(params, 2.0), plain, original, tmp_path / "tokenizer", tmp_path / "merged")
  assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
    "adapter_config.json",
    "adapter_model.safetensors",
  ]
  adapters = tensors(tmp_path / "out")
  assert {name: a.dtype.name for name, a in adapters.items()} == {
    f"base_model.model.model.layers.{i}.{module}.lora_{x}.weight": "float32"
    for i in range(layers)
    for module in PEFT
    for x in "AB"
  }
  if family == "qwen3":
    for name, a in adapters.items():
      *_, kind, module, x, _ = name.split(".")
      assert a.shape == PEFT[f"{kind}.{module}"][x == "lora_B"], name
  assert_adapters_make(adapters, tensors(FOLDER / family), tensors(tmp_path / "merged"), 2.0)


def test_adapters_that_were_written_wrong_get_no_name(tmp_path, monkeypatch):
  policy, params = adapted()
  (tmp_path / "tokenizer").mkdir()

  def careless(tensors, path, metadata):
    save_file(
      {k: v + k.endswith("1.mlp.up_proj.lora_A.weight") for k, v in tensors.items()}, path, metadata
    )

  monkeypatch.setattr(pretrained, "save_file", careless)
  original = str(FOLDER / "qwen3")
  with pytest.raises(UserError, match=r"1\.mlp\.up_proj\.lora_A\.weight was not written as it is"):
    pretrained.save(
      split(params)[1], policy.config, original, tmp_path / "tokenizer", tmp_path / "out"
    )
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"policy.lora_rank": 4}, "policy.lora_rank: must be 0, or positive with policy.pretrained"),
    ({"policy.lora_alpha": 4.0}, "policy.lora_alpha: has no effect, because policy.lora_rank is 0"),
    ({"policy.lora_targets": ("q", "x")}, "policy.lora_targets: must be some of "),
  ],
)
def test_settings_that_cannot_be_are_refused(changes, said):
  with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
    tiny.make_config(changes)


# From a published model's folder to a folder like it: GSM8K as TFDS has it, a reviewer behind the
# real SDK.

QWEN3 = {
  **words.SIZES,
  "architectures": ["Qwen3ForCausalLM"],
  "model_type": "qwen3",
  "hidden_act": "silu",
  "rope_theta": 10000.0,
  "tie_word_embeddings": True,
  "eos_token_id": 1,
}


def opinion(data):
  """A reviewer for whom the first step of an answer is what counts."""
  reply = honest_reply(data, weight=1)
  for answer in reply["answers"]:
    answer["steps"][0]["weight"] = 4
  return reply


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("lora")
  model = words.write_model(folder, QWEN3)
  with FakeServer(reply=opinion) as server:
    changes = {
      "steps": 2,
      "policy": {
        "pretrained": str(model),
        "dtype": "bfloat16",
        "lora_rank": 4,
        "lora_targets": ("q", "o", "down"),
      },
      "task": {
        "name": "tfds",
        "dataset": "gsm8k",
        "data_dir": words.build_gsm8k(folder / "data"),
        "steps": r"\w",
        "min_step_chars": 1,
        "verifier": f"{__name__.rpartition('.')[2]}:even",
      },
      "warmstart": {"clean_steps": 0, "steps": 0},
      "rollout.max_prompt_tokens": 64,
      "rollout.max_tokens": 16,
      "rollout.stop": ("e", "s", "1"),  # A random policy hardly ever ends by itself.
      "learner.lr": 0.02,
      "learner.reference": True,
      "credit.scheme": "weighted",
      "reviewer.name": "openai",
      "reviewer.client.base_url": f"{server.url}/v1",
      "reviewer.client.max_dollars": 0.0,
    }
    with pytest.MonkeyPatch.context() as patch:
      patch.setenv("OPENAI_API_KEY", "none")
      patch.syspath_prepend(str(pathlib.Path(__file__).parent))
      train(tiny.make_config(changes), str(folder / "run"), quiet=True)
    assert server.requests
  return folder, tiny.make_config(changes)


def even(row, text):
  """A verifier that a random policy can satisfy now and then."""
  return len(text) % 2 == 0


def test_a_run_trains_its_adapters_and_nothing_else(run):
  folder, _ = run
  saved = tiny.saved_state(folder / "run")
  params = {key for key in saved if key.startswith("['params']")}
  assert params
  assert all("lora_" in key for key in params)
  first = tiny.saved_state(folder / "run", 1)
  moved = [key for key in params if not np.array_equal(saved[key], first[key])]
  assert len(moved) == len(params)
  lines = tiny.read_lines(folder / "run")
  assert all(line["learner/grad_norm"] > 0 for line in lines[1:])
  assert lines[1]["review/ok"] == 1
  assert max(line["credit/moved"] for line in lines[1:]) > 0
  assert lines[1]["learner/kl"] < 1e-9  # The reference is the policy without adapters.
  assert lines[2]["learner/kl"] > 1e-6


def test_an_export_computes_what_the_run_does_and_can_be_sampled(run, tmp_path):
  folder, config = run
  assert "written and read again" in export(str(folder / "run"), str(tmp_path / "out"))
  assert {"config.json", "generation_config.json", "tokenizer.json"} <= {
    p.name for p in (tmp_path / "out").iterdir()
  }
  exact = dataclasses.replace(config.policy, dtype="float32")
  ours = Policy(pretrained.resolve(exact, VOCAB), VOCAB)
  shardings = param_shardings(make_mesh(MeshConfig()), ours)
  frozen, _ = split(pretrained.load(ours, folder / "model", shardings))
  frozen = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), frozen)
  _, adapters = read_params(epath.Path(folder / "run"), None)
  plain = Policy(pretrained.resolve(PolicyConfig(pretrained=str(tmp_path / "out")), VOCAB), VOCAB)
  merged = pretrained.load(plain, tmp_path / "out", param_shardings(make_mesh(MeshConfig()), plain))
  assert np.abs(logits(ours, join(frozen, adapters)) - logits(plain, merged)).max() < 1e-4
  again = {**dataclasses.asdict(config)["task"], "tokenizer": ""}
  changes = {
    "policy": {"pretrained": str(tmp_path / "out")},
    "task": again,
    "warmstart": {"clean_steps": 0, "steps": 0},
  }
  rollout = {"rollout.max_prompt_tokens": 64, "rollout.max_tokens": 12, "steps": 1}
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(pathlib.Path(__file__).parent))
    train(tiny.make_config({**changes, **rollout}), str(tmp_path / "next"), quiet=True)
  assert "eval/sampled" in tiny.read_lines(tmp_path / "next")[0]


def test_adapters_alone_of_a_run(run, tmp_path, capsys):
  folder, _ = run
  command = ["export", f"--workdir={folder / 'run'}", f"--output={tmp_path / 'out'}", "--adapters"]
  assert main(command) == 0
  assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": str(folder / "model"),
    "r": 4,
    "lora_alpha": 16.0,
    "target_modules": ["down_proj", "o_proj", "q_proj"],
    "bias": "none",
    "inference_mode": True,
  }
  for file in ("tokenizer.json", "tokenizer_config.json"):
    assert (tmp_path / "out" / file).read_bytes() == (
      folder / "run" / "tokenizer" / file
    ).read_bytes()
  export(str(folder / "run"), str(tmp_path / "merged"))
  start = {key: value.astype(jnp.bfloat16) for key, value in tensors(folder / "model").items()}
  assert_adapters_make(tensors(tmp_path / "out"), start, tensors(tmp_path / "merged"), 4.0)
  before = sorted(tmp_path.rglob("*"))
  assert main(command) == 1
  assert f"{tmp_path / 'out'} is already there" in capsys.readouterr().err
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
  ("name", "damage"),
  [
    ("start", shutil.rmtree),
    (
      "start",
      lambda path: [f.write_bytes(f.read_bytes()[:9]) for f in path.rglob("*") if f.is_file()],
    ),
    ("tokenizer", shutil.rmtree),
    ("tokenizer", lambda path: (path / "tokenizer.json").write_text("{")),
  ],
)
def test_an_export_names_what_is_damaged(run, tmp_path, capsys, name, damage):
  workdir = shutil.copytree(run[0] / "run", tmp_path / "run")
  damage(workdir / name)
  assert main(["export", f"--workdir={workdir}", f"--output={tmp_path / 'out'}"]) == 1
  (said,) = capsys.readouterr().err.splitlines()
  assert said.startswith(f"dca-jax: error: {workdir / name} is gone or damaged (")
  assert not (tmp_path / "out").exists()


def test_a_run_goes_on(run):
  folder, config = run
  before = tiny.read_lines(folder / "run")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("OPENAI_API_KEY", "none")
    patch.syspath_prepend(str(pathlib.Path(__file__).parent))
    train(config, str(folder / "run"), quiet=True)
  assert tiny.read_lines(folder / "run") == before
