"""Arms against each other: what an arm is, what is counted, and what is written."""

import json
import pathlib

import pytest
import tiny

from dca_jax.commands import cli
from dca_jax.commands.compare import (
  arm_config,
  arm_configs,
  arms_of,
  by_seeds,
  ratio,
  samples_to,
)
from dca_jax.config import ConfigError, read_recipe

EXAMPLES = pathlib.Path(__file__).parents[2] / "docs" / "examples"
GENTLE = {"credit.scheme": "weighted", "reviewer.name": "oracle", "credit.lam": 0.25}
ARMS = f"ARMS = {{'gentle': {GENTLE}}}\n"


@pytest.fixture
def recipe(tmp_path):
  return read_recipe(
    tiny.write_recipe(tmp_path, {"reviewer.name": "oracle", "credit.scheme": "weighted"}, ARMS)
  )


# Arms.


def test_an_arm_is_a_scheme_of_the_recipe(recipe):
  weighted = arm_config(recipe, "weighted", 3, []).config
  assert weighted.credit.scheme == "weighted"
  assert weighted.reviewer.name == "oracle"
  assert weighted.seed == 3
  assert weighted.rollout == tiny.make_config().rollout
  uniform = arm_config(recipe, "uniform", 3, []).config
  assert uniform.credit.scheme == "uniform"
  assert uniform.reviewer.name == "none"


def test_an_arm_takes_settings(recipe):
  config = arm_config(recipe, "weighted:credit.lam=0.9:learner.lr=0.5", 0, []).config
  assert config.credit.lam == 0.9
  assert config.learner.lr == 0.5


def test_an_arm_may_be_one_of_the_recipes_own(recipe):
  assert arm_config(recipe, "gentle", 0, []).config.credit.lam == 0.25
  assert arm_config(recipe, "gentle:credit.lam=0.3", 0, []).config.credit.lam == 0.3


def test_overrides_hold_for_every_arm_and_an_arms_own_settings_win(recipe):
  line = ["--config.learner.lr=0.25"]
  assert arm_config(recipe, "uniform", 0, line).config.learner.lr == 0.25
  assert arm_config(recipe, "uniform:learner.lr=0.5", 0, line).config.learner.lr == 0.5


ARMS_OF_ALL = ("weighted", "uniform", "gentle")


def test_a_reviewer_of_the_command_line_is_left_out_where_credit_is_uniform(recipe, capsys):
  line = ["--config.reviewer.name=noisy", "--config.reviewer.flip=0.1", "--config.credit.lam=0.75"]
  weighted, uniform, gentle = arm_configs(recipe, ARMS_OF_ALL, 0, line).values()
  reviewer = weighted.reviewer
  assert (reviewer.name, reviewer.flip, weighted.credit.lam) == ("noisy", 0.1, 0.75)
  said = capsys.readouterr().err.splitlines()
  assert uniform == arm_config(recipe, "uniform", 0, []).config
  assert (gentle.reviewer.name, gentle.credit.lam) == ("oracle", 0.25)
  assert said == [
    "note: left out for the arm uniform: credit.lam, reviewer.name, reviewer.flip",
    "note: left out for the arm gentle: reviewer.flip",
  ]


def test_what_nobody_typed_is_left_out_in_silence(recipe, capsys):
  """The recipe has a reviewer, which `uniform` does not ask."""
  arm_configs(recipe, ("weighted", "uniform"), 0, ["--config.learner.lr=0.5"])
  assert not capsys.readouterr().err


def test_an_option_that_one_arm_uses_is_taken_although_the_recipe_does_not(tmp_path, capsys):
  """The recipe is uniform, which has neither a reviewer nor `credit.lam`."""
  plain = read_recipe(tiny.write_recipe(tmp_path))
  line = ["--config.reviewer.name=noisy", "--config.reviewer.flip=0.1", "--config.credit.lam=0.75"]
  uniform, weighted = arm_configs(plain, ("uniform", "weighted"), 0, line).values()
  assert uniform == arm_config(plain, "uniform", 0, []).config
  assert (weighted.reviewer.flip, weighted.credit.lam) == (0.1, 0.75)
  (said,) = capsys.readouterr().err.splitlines()
  assert said.startswith("note: left out for the arm uniform: ")
  assert {*said.rpartition(": ")[2].split(", ")} == {
    "credit.lam",
    "reviewer.name",
    "reviewer.flip",
  }


@pytest.mark.parametrize(
  ("option", "why"),
  [
    ("reviewer.name=noisy", "reviewer.name: has no effect, because credit.scheme is 'uniform'"),
    ("credit.lam=0.75", "credit.lam: has no effect, because credit.scheme is 'uniform'"),
    ("credit.lamb=0.75", "credit.lamb: no such key"),
  ],
)
def test_an_option_that_no_arm_uses_is_refused(tmp_path, option, why):
  plain = read_recipe(tiny.write_recipe(tmp_path))
  with pytest.raises(ConfigError) as raised:
    arm_configs(plain, ("uniform", "uniform:learner.lr=0.5"), 0, [f"--config.{option}"])
  assert str(raised.value).startswith(why)


def test_an_option_that_only_the_recipe_would_use_is_refused(recipe):
  with pytest.raises(ConfigError, match=r"reviewer\.name: has no effect, because credit\.scheme"):
    arm_configs(recipe, ("uniform",), 0, ["--config.reviewer.name=noisy"])


def test_a_value_of_an_arm_may_hold_colons(recipe):
  mine = f"{EXAMPLES}/repeats.py:Repeats"
  arm = f"weighted:reviewer.name={mine}:learner.lr=0.5:reviewer.window=2"
  config = arm_config(recipe, arm, 0, []).config
  assert (config.reviewer.name, config.reviewer.window, config.learner.lr) == (mine, 2, 0.5)
  config = arm_config(recipe, f"weighted:steps=2:reviewer.name={mine}", 0, []).config
  assert (config.steps, config.reviewer.name) == (2, mine)


@pytest.mark.parametrize(
  ("arm", "parts"),
  [
    ("weigthed", ["--arms", "weigthed", "weighted", "gentle"]),
    ("", ["--arms"]),
    ("weighted:credit.lamb=1", ["credit.lamb", "credit.lam"]),
    ("weighted:credit.lam", ["credit.lam"]),
    ("weighted:credit.lam=2", ["credit.lam"]),
    ("uniform:credit.lam=0.9", ["credit.lam"]),
  ],
)
def test_a_wrong_arm_is_named(recipe, arm, parts):
  with pytest.raises(ConfigError) as raised:
    arm_config(recipe, arm, 0, [])
  for part in parts:
    assert part in str(raised.value)


@pytest.mark.parametrize(
  ("text", "arms"),
  [
    ("uniform,weighted", ["uniform", "weighted"]),
    ("a:x.lr=[5e-4,1e-3],b", ["a:x.lr=5e-4", "a:x.lr=1e-3", "b"]),
    ("a:x=[1,2]:y=[3,4]", ["a:x=1:y=3", "a:x=1:y=4", "a:x=2:y=3", "a:x=2:y=4"]),
    ("", []),
  ],
)
def test_a_list_of_values_is_an_arm_for_each(text, arms):
  assert arms_of(text) == arms


# Counting.


def test_samples_to_wants_a_whole_window():
  x = [10.0 * (i + 1) for i in range(8)]
  assert samples_to(x, [0.9] * 8, 0.8) == 50.0  # The mean of five steps exists from the fifth on.
  assert samples_to(x, [0.0] * 6 + [0.8, 0.9], 0.8) == 70.0
  assert samples_to(x, [0.5] * 8, 0.8) is None
  assert samples_to(x[:4], [0.9] * 4, 0.8) is None


def curves(*lengths):
  return [([length / 4, length / 2, length], [0.0] * 3) for length in lengths]


def test_ratio_of_medians():
  assert ratio([100.0, 200.0, 300.0], [50.0, 100.0, 400.0], curves(500, 500, 500)) == "2.00"


def test_ratio_says_when_seeds_do_not_overlap():
  assert ratio([100.0, 200.0], [50.0, 60.0], curves(500, 500)) == "2.73 (seeds apart)"
  assert (
    ratio([100.0, 200.0], [50.0, 100.0], curves(500, 500)) == "2.00"
  )  # One as slow as the other's fastest.
  assert ratio([100.0], [50.0], curves(500)) == "2.00"  # One seed shows nothing.


def test_an_arm_that_never_arrives_has_no_ratio():
  assert ratio([100.0, 100.0], [None, 50.0], curves(500, 500)) == "-"


def test_a_base_that_never_arrives_gives_a_lower_bound():
  assert ratio([None, None], [50.0, 50.0], curves(500, 500)).startswith("≥ 10.00")
  # One of two: the median lies halfway to a run that was still on its way.
  assert ratio([None, 100.0], [50.0, 50.0], curves(500, 500)).startswith("≥ 6.00")


def test_ratios_by_seeds_have_an_interval():
  """By hand: logarithms of mean 1.0124 and standard deviation 0.157, t(3) = 3.182."""
  base, arm = [9472.0, 10368.0, 11520.0, 11136.0], [4224.0, 3456.0, 3584.0, 4224.0]
  assert by_seeds(base, arm) == "2.75 [2.14, 3.54]"
  assert by_seeds([4.0, 8.0], [2.0, 4.0]) == "2.00 [2.00, 2.00]"
  assert by_seeds([4.0], [2.0]) == "-"  # One pair has no spread.
  assert by_seeds([4.0, None], [2.0, 2.0]) == "-"


# The whole command.


def test_compare_writes_its_page_figure_numbers_and_table(tmp_path, capsys):
  recipe = tiny.write_recipe(
    tmp_path, {"reviewer.name": "oracle", "credit.scheme": "weighted", "steps": 6}
  )
  out = tmp_path / "out"
  command = ["compare", f"--config={recipe}", f"--workdir={out}", "--seeds=0,1", "--threshold=0.01"]
  command += ["--arms=uniform,weighted:credit.lam=0.75"]
  assert cli.main(command) == 0
  table = capsys.readouterr().out.split("\n\n")[-2].splitlines()
  assert table[0].split()[0] == "arm"
  assert [line.split()[0] for line in table[2:]] == ["uniform", "weighted:credit.lam=0.75"]

  assert cli.main([*command, "--json"]) == 0  # It trains nothing.
  told = json.loads(capsys.readouterr().out)
  assert [row["completions"] for row in told["rows"]] == ["80 80", "80 80"]
  assert told["rows"][1]["completions_ratio_by_seeds"] == "1.00 [1.00, 1.00]"

  assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
  page = (out / "compare.html").read_text()
  assert "<svg" in page
  assert "weighted:credit.lam=0.75" in page
  assert "<script" not in page
  result = json.loads((out / "compare.json").read_text())
  assert result["seeds"] == [0, 1]
  assert result["threshold"] == 0.01
  for arm in ("uniform", "weighted:credit.lam=0.75"):
    for seed in (0, 1):
      x, y = result["curves"][arm][seed]
      lines = tiny.read_lines(out / arm.replace(":", "_") / f"seed_{seed}")
      assert x == [16.0 * (i + 1) for i in range(6)]
      assert y[-1] == pytest.approx(sum(line["train/accuracy"] for line in lines[2:]) / 5)
      assert result["completions_to_threshold"][arm][seed] == 80.0

  # The same problems for both arms, and the same start.
  first = [
    tiny.read_lines(out / arm / "seed_0")[1] for arm in ("uniform", "weighted_credit.lam=0.75")
  ]
  assert first[0]["train/reward"] == first[1]["train/reward"]

  # Each run has its report.
  assert {path.parent for path in out.rglob("report.html")} == {
    path.parent for path in out.rglob("metrics.jsonl")
  }

  # Run again it trains nothing.
  stamps = {path: path.stat().st_mtime_ns for path in out.rglob("trajectories/*")}
  assert cli.main(command) == 0
  assert {path: path.stat().st_mtime_ns for path in out.rglob("trajectories/*")} == stamps
  assert "replaces" not in capsys.readouterr().err

  # With other arms it says whose page it replaces.
  assert cli.main([*command[:-1], "--arms=uniform"]) == 0
  said = "uniform (6 steps), weighted:credit.lam=0.75 (6 steps); seeds 0, 1; threshold 0.01"
  assert f"note: replaces compare.html, .png and .json in {out}: {said}" in capsys.readouterr().err


@pytest.mark.slow  # Two processes that compile all.
def test_runs_side_by_side_are_those_that_follow_each_other(tmp_path, capsys):
  recipe = tiny.write_recipe(tmp_path, {"reviewer.name": "oracle", "credit.scheme": "weighted"})
  command = ["compare", f"--config={recipe}", "--arms=uniform,weighted", "--quiet", "--json"]
  told = []
  for more in (
    [f"--workdir={tmp_path / 'one'}"],
    [f"--workdir={tmp_path / 'two'}", "--parallel=2"],
  ):
    assert cli.main([*command, *more]) == 0
    told.append(json.loads(capsys.readouterr().out))
  assert told[0] == told[1]
  assert cli.main([*command, *more, "--config.rollout.temperature=0.5"]) == 1
  said = capsys.readouterr().err.splitlines()[-1]
  assert said.startswith("dca-jax: error: ")
  assert "rollout.temperature" in said


def test_a_run_that_lost_metrics_is_not_counted(tmp_path, capsys):
  recipe = tiny.write_recipe(tmp_path, {"steps": 2})
  command = ["compare", f"--config={recipe}", f"--workdir={tmp_path / 'out'}", "--arms=uniform"]
  assert cli.main(command) == 0
  path = tmp_path / "out" / "uniform" / "seed_0" / "metrics.jsonl"
  lines = path.read_text().splitlines()
  path.write_text("\n".join([lines[0], lines[2]]) + "\n")
  capsys.readouterr()
  assert cli.main(command) == 1
  said = capsys.readouterr().err.splitlines()[-1]
  assert said.startswith(
    f"dca-jax: error: {path.parent}: its metrics.jsonl does not tell of steps 1"
  )


@pytest.mark.parametrize(
  ("arguments", "part"),
  [
    (["--arms=uniform", "--seeds=zero"], "--seeds"),
    (["--arms=uniform", "--seeds="], "--seeds"),
    (["--arms="], "--arms"),
    (["--arms=unifrom"], "--arms"),
    (["--arms=uniform", "--seeds=-1"], "seed"),
    (["--arms=uniform", "--seeds=1,2,1"], "--seeds=1,2,1: names one of them twice"),
    (["--arms=uniform", "--seeds=1, 2"], "--seeds"),
    (["--arms=uniform", f"--seeds={2**31}"], "--seeds"),
    (
      ["--arms=uniform,weighted,uniform"],
      "--arms=uniform,weighted,uniform: names one of them twice",
    ),
    (["--arms=uniform", "--threshold=7"], "--threshold=7.0: must be between 0 and 1"),
    (["--arms=uniform", "--threshold=nan"], "--threshold=nan"),
    (["--arms=uniform", "--parallel=0"], "--parallel=0: must be at least 1"),
    (["--arms=uniform", "--config.stepz=1"], "stepz"),
  ],
)
def test_wrong_arguments_end_in_one_line(tmp_path, capsys, arguments, part):
  recipe = tiny.write_recipe(tmp_path, {"steps": 1})
  assert (
    cli.main(["compare", f"--config={recipe}", f"--workdir={tmp_path / 'out'}", *arguments]) == 1
  )
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("dca-jax: error: ")
  assert part in line
  assert not (tmp_path / "out").exists()  # Found before anything was trained.
