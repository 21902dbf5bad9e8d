"""The recipes for language models, each two steps long, on a model of its family
that is small enough for here."""

import pathlib
import re

import pytest
import tiny
import words

from dca_jax import config as config_lib
from dca_jax.commands.export import export
from dca_jax.commands.plan import plan
from dca_jax.loop import train

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
RECIPES = sorted(CONFIGS.glob("gsm8k_*.py"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return words.build_gsm8k(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
  "path",
  [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * ("gemma" not in p.stem)) for p in RECIPES],
)
def test_a_recipe_runs_and_is_exported(path, data, tmp_path):
  given = config_lib.read_recipe(str(path)).get_config()
  model = words.write_model(tmp_path, {**words.SIZES, **words.FAMILIES[path.stem.split("_")[1]]})
  given.policy.pretrained = str(model)
  given.task.data_dir = data
  given.update_from_flattened_dict({"steps": 2, **words.SMALL_RUN})
  given.reviewer = {"name": "lexical"}  # No key, no network: a built-in one.
  given.mesh = {}
  config = config_lib.build(given)
  assert "fits" in plan(config, 1)
  train(config, str(tmp_path / "run"), quiet=True)
  assert [line["step"] for line in tiny.read_lines(tmp_path / "run")] == [0, 1, 2]
  assert "step 2: " in export(str(tmp_path / "run"), str(tmp_path / "out"))


def test_the_word_problems_have_right_answers():
  path = CONFIGS / "smollm2_arithmetic.py"
  parts = config_lib.load(str(path)).task.parts()
  train, heldout = ([part.rows[i] for i in part.numbers] for part in parts.values())
  assert not {row["question"] for row in train} & {row["question"] for row in heldout}
  for row in (*train, *heldout):
    has, change = map(int, re.findall(r"\d+", row["question"]))
    assert int(row["answer"]) == (has + change if row["kind"] == "more" else has - change) >= 0
    assert ("more" in row["question"]) == (row["kind"] == "more")
