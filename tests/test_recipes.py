"""The recipes for language models, each two steps long, on a model of its family that is small enough for here."""

import pathlib

import pytest
import tiny
import words

from dca_jax import config as config_lib
from dca_jax.export import export
from dca_jax.plan import plan
from dca_jax.train import train

RECIPES = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("gsm8k_*.py"))
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES = {
  "gemma3": {
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "sliding_window": 16,
    "sliding_window_pattern": 2,
  },
  "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, "rope_theta": 1e6},
  "llama31": {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALING}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return words.build_gsm8k(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
  "path", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * ("llama" in p.stem)) for p in RECIPES]
)
def test_a_recipe_runs_and_is_exported(path, data, tmp_path):
  given = config_lib.read_recipe(str(path)).get_config()
  model = words.write_model(tmp_path, {**words.SIZES, **FAMILIES[path.stem.split("_")[1]]})
  given.policy.pretrained = str(model)
  given.task.data_dir = data
  given.steps = 2
  given.rollout.update({"problems": 4, "group": 4, "max_prompt_tokens": 128, "max_tokens": 12})
  given.reviewer = {"name": "lexical"}  # No key, no network: a built-in one.
  given.evaluate.update({"problems": 4, "every": 1})
  given.checkpoint.every = 1
  given.mesh = {}
  given.policy.dtype = "float32"  # On a CPU, bfloat16 takes minutes to compile.
  given.learner.micro_batches = 2
  config = config_lib.build(given)
  assert "fits" in plan(config, 1)
  train(config, str(tmp_path / "run"), quiet=True)
  assert [line["step"] for line in tiny.read_lines(tmp_path / "run")] == [0, 1, 2]
  assert "step 2: " in export(str(tmp_path / "run"), str(tmp_path / "out"))
