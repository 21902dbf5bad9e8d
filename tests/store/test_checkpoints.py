"""Which checkpoints are kept, and from which a run goes on."""

import json

import jax.numpy as jnp
import pytest
import tiny
from etils import epath

from dca_jax.errors import UserError
from dca_jax.learner import TrainState
from dca_jax.loop import train
from dca_jax.store.checkpoints import CheckpointConfig, Checkpoints


def kept(workdir) -> list[int]:
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Ten steps, with every kind of keeping."""
  folder = tmp_path_factory.mktemp("run")
  changes = {
    "checkpoint.keep": 2,
    "checkpoint.keep_every": 4,
    "checkpoint.best": "eval/sampled",
    "evaluate.every": 3,
  }
  train(tiny.make_config({**changes, "steps": 10}), str(folder), quiet=True)
  return folder


def test_the_newest_those_at_intervals_and_the_best_are_kept(run):
  scores = {
    line["step"]: line["eval/sampled"]
    for line in tiny.read_lines(run)
    if line["step"] and "eval/sampled" in line
  }
  assert sorted(scores) == [3, 6, 9, 10]
  best = max(scores, key=lambda step: (scores[step], step))
  assert kept(run) == sorted({4, 8, 9, 10, best})


def test_a_best_checkpoint_is_saved_where_it_was_measured(tmp_path):
  changes = {
    "checkpoint.every": 100,
    "checkpoint.best": "eval/sampled",
    "evaluate.every": 2,
    "checkpoint.keep": 9,
  }
  train(tiny.make_config({**changes, "steps": 5}), str(tmp_path), quiet=True)
  assert kept(tmp_path) == [1, 2, 4, 5]  # Orbax always saves the first step.


@pytest.mark.parametrize(("every", "keep_every"), [(2, 3), (2, -2), (3, 4)])
def test_an_interval_that_is_never_saved_is_refused(every, keep_every):
  said = rf"checkpoint\.keep_every: must be a multiple of checkpoint\.every \({every}\)"
  with pytest.raises(UserError, match=said):
    tiny.make_config({"checkpoint.every": every, "checkpoint.keep_every": keep_every})


def test_a_run_goes_back_to_a_step_and_comes_to_the_same_end(tmp_path):
  config = tiny.make_config({"steps": 6, "checkpoint.keep": 6})
  train(config, str(tmp_path / "run"), quiet=True)
  train(config, str(tmp_path / "whole"), quiet=True)
  train(config, str(tmp_path / "run"), resume="3", quiet=True)
  assert kept(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
  assert {path.name for path in (tmp_path / "run").glob("aside*")} == {
    f"aside_checkpoint_{step}" for step in (4, 5, 6)
  }
  tiny.assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_step_that_was_not_saved_is_refused_and_nothing_moves(run):
  before = kept(run)
  with pytest.raises(UserError, match=r"--resume=5: no such checkpoint .* there are 3, 4, "):
    train(tiny.make_config({"steps": 12}), str(run), resume="5", quiet=True)
  assert kept(run) == before


def test_never_leaves_a_run_alone(run):
  before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
  with pytest.raises(UserError, match="already holds a run, and --resume is never"):
    train(tiny.make_config({"steps": 12}), str(run), resume="never", quiet=True)
  assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_never_begins_a_run_where_there_is_none(tmp_path):
  train(tiny.make_config({"steps": 1}), str(tmp_path), resume="never", quiet=True)
  assert kept(tmp_path) == [1]


def test_a_step_of_a_run_that_is_not_there_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"--resume=3: no such checkpoint .* there are none"):
    train(tiny.make_config({"steps": 1}), str(tmp_path), resume="3", quiet=True)


def test_a_checkpoint_of_another_run_is_refused_by_the_key_that_differs(run, tmp_path):
  # As when checkpoints were copied from another workdir.
  train(tiny.make_config({"learner.lr": 0.5}), str(tmp_path), quiet=True)
  (run / "checkpoints").rename(tmp_path / "kept_aside")
  (tmp_path / "checkpoints").rename(run / "checkpoints")
  with pytest.raises(
    UserError, match=r"other settings: learner\.lr was 0\.5 and is now 0\.001; choose another"
  ):
    train(tiny.make_config({"steps": 12}), str(run), quiet=True)
  assert json.loads((run / "config.json").read_text())["learner"]["lr"] == 0.001


# The best.


@pytest.mark.parametrize(
  ("best", "near"),
  [
    ("eval/sampeld", "; did you mean eval/sampled?"),
    ("eval/pass@8", "; did you mean eval/pass@2?"),
    ("train/rewards", "; there are eval/greedy, "),
  ],
)
def test_a_score_that_no_run_has_is_refused(best, near):
  with pytest.raises(UserError) as refused:
    tiny.make_config({"checkpoint.best": best})
  assert f"checkpoint.best: is no score{near}" in str(refused.value)


def test_every_score_has_a_name_that_can_be_the_best(run):
  scores = {key for line in tiny.read_lines(run) for key in line if key.startswith("eval/")}
  assert scores == set(tiny.make_config().evaluate.scores)


def test_another_best_goes_on_from_the_checkpoints_of_the_one_before(tmp_path):
  changes = {"checkpoint.every": 100, "evaluate.every": 2, "checkpoint.keep": 1}
  train(
    tiny.make_config({**changes, "steps": 4, "checkpoint.best": "eval/sampled"}),
    str(tmp_path),
    quiet=True,
  )
  for steps, best in ((6, "eval/greedy"), (8, "")):
    train(
      tiny.make_config({**changes, "steps": steps, "checkpoint.best": best}),
      str(tmp_path),
      quiet=True,
    )
    assert steps in kept(tmp_path)
  assert kept(tmp_path) == [8]
  assert [line["step"] for line in tiny.read_lines(tmp_path)] == list(range(9))


def test_of_many_scores_only_the_best_is_kept(tmp_path):
  """The rules alone, on a state without a policy."""
  state = TrainState({"w": jnp.ones(2)}, {"count": jnp.zeros(())})

  def save(best: str, *scores: tuple[int, dict[str, float]]) -> list[int]:
    config = CheckpointConfig(every=1, keep=1, best=best)
    with Checkpoints(config, epath.Path(tmp_path), {}) as checkpoints:
      for step, measured in scores:
        assert checkpoints.due(step, measured, last=False)
        checkpoints.save(step, state, measured, last=False)
    return kept(tmp_path)

  sampled = [(i + 1, {"eval/sampled": score}) for i, score in enumerate((0.7, 0.9, 0.8, 0.1))]
  assert save("eval/sampled", *sampled, (5, {})) == [2, 5]
  # What was saved under another `best` has no score, neither the largest nor any.
  assert save("eval/greedy", (6, {"eval/greedy": 0.2}), (7, {"eval/greedy": 0.1}), (8, {})) == [
    6,
    8,
  ]
