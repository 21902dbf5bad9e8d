"""Published models: the true config.json, number of ids and end tokens.

`published.json` has these, and what the policy is then; parameters are counted on each model's
page. Of Gemma 4 the cards say 25.2 and, with the encoders that are left out here, 5.1 billion.
Weights are not needed: all that is refused is refused before they are read.
"""

import functools
import json
import math
import pathlib

import jax
import pytest
import tiny
import words
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dca_jax import config as config_lib
from dca_jax.commands.plan import plan
from dca_jax.devices import mesh
from dca_jax.errors import UserError
from dca_jax.loop import train
from dca_jax.policy import Policy, PolicyConfig
from dca_jax.policy.families import from_json
from dca_jax.policy.pretrained import resolve
from dca_jax.rollout import encode_prompts
from dca_jax.run import check_data
from dca_jax.tasks import Problem
from dca_jax.tasks.tokenizer import end_ids, id_count, load_tokenizer

PUBLISHED = json.loads(pathlib.Path(__file__).with_name("published.json").read_text())
RECIPES = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("gsm8k_*.py"))


def write_published(folder: pathlib.Path, name: str) -> str:
  """The model's folder without weights; all tokens but the named ones
  and single bytes are fillers."""
  model = PUBLISHED[name]
  named = {i: token for token, i in model["tokens"].items()}
  letters = iter(pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {named.get(i) or next(letters, f"<filler {i}>"): i for i in range(model["ids"])}
  tokenizer = Tokenizer(models.BPE(vocabulary, []))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in model["tokens"]])
  fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=model["eos"])
  fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
  fast.save_pretrained(folder)
  (folder / "config.json").write_text(json.dumps(model["config"]))
  (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": model["ends"]}))
  return str(folder)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  """The folder of a published model, by its name."""
  return functools.cache(lambda name: write_published(tmp_path_factory.mktemp(name), name))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return words.build_gsm8k(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_and_has_its_number_of_parameters(name):
  config = from_json(PUBLISHED[name]["config"], "config.json", "bfloat16")
  tuples = {
    key: tuple(x) if isinstance(x, list) else x for key, x in PUBLISHED[name]["policy"].items()
  }
  assert config == PolicyConfig(dtype="bfloat16", **tuples)
  shapes = mesh.param_shapes(Policy(config, config.vocab_size))
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == PUBLISHED[name]["parameters"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens_its_published_model(path, data, published, tmp_path):
  """All that a run does before it reads weights, which are not here, and the plan."""
  given = config_lib.read_recipe(str(path)).get_config()
  name = path.stem.split("_")[1]
  given.policy.pretrained = published(name)
  given.task.data_dir = data
  given.reviewer = {"name": "lexical"}
  given.evaluate.problems = 4
  devices = math.prod(n for n in (given.mesh.get("data", 1), given.mesh.get("fsdp", 1)))
  config = config_lib.build(given)
  assert " parameters; GiB on each of " in plan(config, devices)
  tokenizer = config.task.open().tokenizer()
  assert id_count(tokenizer) == PUBLISHED[name]["ids"]
  assert list(end_ids(tokenizer)) == PUBLISHED[name]["ends"]
  given.mesh = {}
  if name == "gemma3":  # The others' parameters and moments may not fit the memory of this machine.
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
      train(config_lib.build(given), str(tmp_path / "run"), quiet=True)


def test_a_token_beyond_the_embedding_is_refused_only_in_a_prompt(data, published):
  folder = published("gemma3")
  config = tiny.make_config(
    {
      "task": {"name": "tfds", "dataset": "gsm8k", "data_dir": data, "tokenizer": folder},
      "warmstart": {"clean_steps": 0, "steps": 0},
      "rollout.max_prompt_tokens": 128,
    }
  )
  task = config.task.open()
  tokenizer = task.tokenizer()
  policy = Policy(
    resolve(PolicyConfig(pretrained=folder), id_count(tokenizer)), id_count(tokenizer)
  )
  check_data(config, task, tokenizer, policy.rows)
  problems = [Problem(41, "a cat", ""), Problem(42, "<image_soft_token> a", "")]
  assert encode_prompts(tokenizer, problems[:1], 8, policy.rows)[1] == 5
  said = (
    r"problem 42 holds the token '<image_soft_token>', number 262144,"
    r" and .* embedding has 262144 rows"
  )
  with pytest.raises(UserError, match=said):
    encode_prompts(tokenizer, problems, 8, policy.rows)


def test_end_tokens_that_the_embedding_lacks_are_refused(data, tmp_path):
  folder = words.save_tokenizer(tmp_path, ends=[2])
  task = {"name": "tfds", "dataset": "gsm8k", "data_dir": data, "tokenizer": folder}
  config = tiny.make_config({"task": task, "warmstart": {"clean_steps": 0, "steps": 0}})
  with pytest.raises(
    UserError, match=r"every end token of the tokenizer \[1, 2\] lies beyond the 1 rows"
  ):
    check_data(config, config.task.open(), load_tokenizer(folder), 1)
