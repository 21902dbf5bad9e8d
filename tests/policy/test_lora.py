"""Low-rank adapters: only they are trained, saved and counted; merged they compute the same."""

import dataclasses
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import words
from etils import epath

sys.path.append(str(pathlib.Path(__file__).parents[1] / "review"))
from fake_server import FakeServer, honest_reply

from dca_jax.config import ConfigError
from dca_jax.export import export, read_params
from dca_jax.mesh import MeshConfig, make_mesh, param_shardings
from dca_jax.policy import Policy, PolicyConfig, join, merge, pretrained, sampling_logits, split
from dca_jax.policy.logprobs import Sampling
from dca_jax.train import train

FOLDER = pathlib.Path(__file__).with_name("reference")
VOCAB = 64
EVERYTHING = ("q", "k", "v", "o", "gate", "up", "down")


def adapted(family="qwen3", targets=EVERYTHING, dtype="float32"):
  """A model with adapters that do something."""
  given = PolicyConfig(pretrained=str(FOLDER / family), dtype=dtype, lora_rank=3, lora_alpha=6.0, lora_targets=targets)
  policy = Policy(pretrained.resolve(given, VOCAB), VOCAB)
  params = pretrained.load(policy, FOLDER / family, param_shardings(make_mesh(MeshConfig()), policy))
  frozen, adapters = split(params)
  dice = np.random.default_rng(0)
  adapters = jax.tree.map(lambda a: jnp.asarray(dice.normal(0, 0.2, a.shape), a.dtype), adapters)
  return policy, join(frozen, adapters)


@functools.partial(jax.jit, static_argnums=0)
def logits(policy, params):
  prompts, lengths = jnp.arange(12).reshape(2, 6) % VOCAB, jnp.array([6, 4])
  completions = (jnp.arange(40).reshape(4, 10) * 7) % VOCAB
  hidden = policy.completion_hidden(params, prompts, lengths, completions)
  return sampling_logits(hidden.reshape(-1, hidden.shape[-1]), policy.head(params), Sampling())[:, :VOCAB]


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "gemma3", "llama_scaled"])
def test_merged_weights_compute_what_the_adapters_do(family):
  policy, params = adapted(family)
  plain = Policy(dataclasses.replace(policy.config, lora_rank=0), VOCAB)
  ours, theirs = logits(policy, params), logits(plain, merge(params, policy.config.lora_scale))
  assert np.abs(ours - theirs).max() < 1e-4
  assert np.abs(ours - logits(plain, split(params)[0])).max() > 0.1


def test_new_adapters_change_nothing():
  given = PolicyConfig(pretrained=str(FOLDER / "qwen3"), lora_rank=2)
  policy = Policy(pretrained.resolve(given, VOCAB), VOCAB)
  params = pretrained.load(policy, FOLDER / "qwen3", param_shardings(make_mesh(MeshConfig()), policy))
  plain = Policy(dataclasses.replace(policy.config, lora_rank=0), VOCAB)
  np.testing.assert_array_equal(logits(policy, params), logits(plain, split(params)[0]))
  assert all(np.any(a) for path, a in jax.tree.leaves_with_path(split(params)[1]) if path[-1].key == "lora_a")


def test_targets_alone_have_adapters_and_what_they_adapt_is_kept_in_the_dtype_of_activations():
  policy, params = adapted(targets=("q", "down"), dtype="bfloat16")
  frozen, adapters = split(params)
  assert adapters["blocks"].keys() == {"q", "down"}
  assert {a.dtype.name for a in jax.tree.leaves(frozen)} == {"bfloat16"}
  assert {a.dtype.name for a in jax.tree.leaves(adapters)} == {"float32"}
  assert np.isfinite(logits(policy, params)).all()


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


# From a published model's folder to a folder like it: GSM8K as TFDS has it, a reviewer behind the real SDK.

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
      "policy": {"pretrained": str(model), "dtype": "bfloat16", "lora_rank": 4},
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


def even(question, text, answer):
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
  assert {"config.json", "generation_config.json", "tokenizer.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
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


def test_a_run_goes_on(run):
  folder, config = run
  before = tiny.read_lines(folder / "run")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("OPENAI_API_KEY", "none")
    patch.syspath_prepend(str(pathlib.Path(__file__).parent))
    train(config, str(folder / "run"), quiet=True)
  assert tiny.read_lines(folder / "run") == before
