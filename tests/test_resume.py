"""A run that is killed at any instant and started again equals the uninterrupted one bit for
bit."""

import os
import pathlib
import random
import signal
import subprocess
import time

import pytest
import tiny

from dca_jax.loop import train

STEPS = 30
EVERYTHING = {**tiny.EVERYTHING, "steps": STEPS}
LEARNED = {
  "steps": STEPS,
  "credit.scheme": "potential",
  "credit.discount": 0.9,
  "value.source": "learned",
  "evaluate.every": 7,
}
OVERLAP = {
  "steps": STEPS,
  "credit.scheme": "weighted",
  "reviewer.name": "oracle",
  "reviewer.overlap": 1,
  "learner.loss": "ppo",
  "checkpoint.every": 3,
}
RUNS = {"everything": EVERYTHING, "learned": LEARNED, "overlap": OVERLAP}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The workdir of an uninterrupted run, by its name; others then find everything compiled."""
  folder = tmp_path_factory.mktemp("whole")

  def workdir(name: str) -> pathlib.Path:
    if not (folder / name).exists():
      train(tiny.make_config(RUNS[name]), str(folder / name), quiet=True)
    return folder / name

  return workdir


def kill(process: subprocess.Popen) -> None:
  process.kill()
  assert process.wait(600) == -signal.SIGKILL
  process.communicate()


def kill_at_random(recipe: str, workdir: pathlib.Path, dice: random.Random) -> None:
  """Kills a few steps after the process has begun to work, at any point of a step."""
  before = {line["step"] for line in tiny.read_lines(workdir)}
  process = tiny.start("train", f"--config={recipe}", f"--workdir={workdir}")
  # A resumed run first takes steps back that were not saved, then repeats them, so wait for its own
  # lines.
  target = max(before, default=0) + dice.randint(4, 8)
  tiny.wait_until(lambda: any(line["step"] >= target for line in tiny.read_lines(workdir)), process)
  time.sleep(dice.uniform(0, 0.05))
  kill(process)
  # Otherwise the next process would begin at the beginning, which tests little.
  assert any(path.name.isdigit() for path in (workdir / "checkpoints").iterdir())


def kill_while_saving(recipe: str, workdir: pathlib.Path) -> None:
  """Kills while the folder of an unfinished checkpoint stands in the workdir;
  for a run's first process."""
  process = tiny.start("train", f"--config={recipe}", f"--workdir={workdir}")

  def saving() -> bool:
    if not any((workdir / "checkpoints").glob("*orbax-checkpoint-tmp*")):
      return False
    # Stopped first and then looked at again, so that the kill cannot come too late.
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    if any((workdir / "checkpoints").glob("*orbax-checkpoint-tmp*")):
      return True
    process.send_signal(signal.SIGCONT)
    return False

  tiny.wait_until(saving, process)
  kill(process)


@pytest.mark.parametrize(
  ("name", "in_save", "kills"),
  [("everything", True, 2), ("learned", False, 1), ("overlap", False, 1)],
)
def test_a_killed_run_equals_an_uninterrupted_one(name, in_save, kills, whole, tmp_path):
  whole, killed, changes = whole(name), tmp_path / "killed", RUNS[name]
  recipe = tiny.write_recipe(tmp_path, changes)
  dice = random.Random(kills)

  if in_save:
    kill_while_saving(recipe, killed)
    assert any((killed / "checkpoints").glob("*orbax-checkpoint-tmp*"))
  for _ in range(kills):
    kill_at_random(recipe, killed, dice)
  assert tiny.read_lines(killed)[-1]["step"] < STEPS
  train(tiny.make_config(changes), str(killed), quiet=True)

  assert [line["step"] for line in tiny.read_lines(killed)] == list(range(STEPS + 1))
  assert tiny.read_lines(killed)[-1]["learner/grad_norm"] > 0
  tiny.assert_same_run(killed, whole)
  assert {int(path.name) for path in (killed / "checkpoints").iterdir() if path.name.isdigit()} == {
    int(path.name) for path in (whole / "checkpoints").iterdir()
  }
  assert not any((killed / "checkpoints").glob("*orbax-checkpoint-tmp*"))
  assert not list(killed.glob("damaged*"))


def test_a_run_killed_before_its_first_checkpoint(tmp_path):
  # While the starting policy is being saved, or a moment later: nothing but the settings is there
  # yet.
  changes = {"steps": 2}
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  train(tiny.make_config(changes), str(whole), quiet=True)
  process = tiny.start(
    "train", f"--config={tiny.write_recipe(tmp_path, changes)}", f"--workdir={killed}"
  )
  tiny.wait_until(lambda: any(killed.glob("start*")), process)
  kill(process)
  assert not tiny.read_lines(killed)
  train(tiny.make_config(changes), str(killed), quiet=True)
  tiny.assert_same_run(killed, whole)


def test_monte_carlo_values_are_the_same_after_a_resume(tmp_path):
  changes = {"credit.scheme": "potential", "value.source": "monte_carlo"}
  train(tiny.make_config({**changes, "steps": 4}), str(tmp_path / "whole"), quiet=True)
  for steps in (2, 4):
    train(tiny.make_config({**changes, "steps": steps}), str(tmp_path / "parts"), quiet=True)
  tiny.assert_same_arrays(
    tiny.saved_state(tmp_path / "parts"), tiny.saved_state(tmp_path / "whole")
  )
  for step in (3, 4):
    name = f"trajectories/step_{step:06d}.jsonl"
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("name", ["learned", "overlap"])
def test_sigterm_saves_the_step_under_way(name, whole, tmp_path):
  whole, stopped, changes = (
    whole(name),
    tmp_path / "stopped",
    {**RUNS[name], "checkpoint.every": 100},
  )
  recipe = tiny.write_recipe(tmp_path, changes)
  process = tiny.start("train", f"--config={recipe}", f"--workdir={stopped}")
  tiny.wait_until(lambda: len(tiny.read_lines(stopped)) > 5, process)
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=1200)
  assert process.returncode == 143
  last = tiny.read_lines(stopped)[-1]["step"]
  assert last < STEPS
  assert errors.splitlines()[-1].startswith(f"dca-jax: stopped by SIGTERM; step {last} is safe in ")
  assert (stopped / "checkpoints" / str(last)).is_dir()
  train(tiny.make_config(changes), str(stopped), quiet=True)
  tiny.assert_same_run(stopped, whole)
