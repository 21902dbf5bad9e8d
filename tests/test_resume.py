"""A run that is killed at any instant and started again equals the uninterrupted one bit for
bit."""

import os
import pathlib
import random
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
import tiny

from dca_jax import step as step_module
from dca_jax.devices.mesh import MeshConfig, make_mesh
from dca_jax.loop import train
from dca_jax.policy import Policy, Sampling, token_logprobs
from dca_jax.rollout import collect_whole
from dca_jax.store.trajectories import read_trajectories

STEPS = 30
EVERYTHING = {**tiny.EVERYTHING, "steps": STEPS}
LEARNED = {
  "steps": STEPS,
  "credit.scheme": "potential",
  "credit.discount": 0.9,
  "value.source": "learned",
  "evaluate.every": 7,
  "rollout.carry": 2,
  "learner.loss": "ppo",
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
def carried():
  """The batches of the run that leaves completions to its next steps, and who sampled last."""
  return []


@pytest.fixture(scope="module")
def whole(tmp_path_factory, carried):
  """The workdir of an uninterrupted run, by its name; others then find everything compiled."""
  folder = tmp_path_factory.mktemp("whole")

  def collected(*given):
    batch = collect_whole(*given)
    carried.append((jax.device_get(given[3]), batch))
    return batch

  def workdir(name: str) -> pathlib.Path:
    if not (folder / name).exists():
      with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "collect_whole", collected)
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


def test_carried_tokens_have_the_log_probabilities_of_the_policies_that_wrote_them(whole, carried):
  """And importance ratios, and what is said of ages, follow from these."""
  folder, config = whole("learned"), tiny.make_config(RUNS["learned"])
  policy = Policy(config.policy, len(config.task.open().tokenizer()), make_mesh(MeshConfig()))

  @jax.jit
  def scores(params, prompts, lengths, tokens):
    hidden = policy.completion_hidden(params, prompts, lengths, tokens)
    return token_logprobs(hidden, policy.head(params), tokens, Sampling())[0]

  older = 0
  for step, (_, batch) in enumerate(carried[:8], 1):
    given = batch.prompts_PxS, batch.prompt_lengths_P, batch.tokens_BxT
    by_policy = np.array([scores(params, *given) for params, _ in carried[:step]])
    wrong = np.abs(by_policy - batch.logprobs_BxT) > 1e-5
    mask, line = batch.sampled_BxT, tiny.read_lines(folder)[step]
    for i, episode in enumerate(batch.episodes):
      assert not wrong[step - 1 - episode.age, i, 0]
      assert not wrong[:, i, : mask[i].sum()].all(0).any()
    older += (wrong[-1] & mask).sum()
    ratios = np.exp(by_policy[-1] - batch.logprobs_BxT)[mask]
    assert line["learner/ratio"] == pytest.approx(ratios.mean(), abs=1e-5)
    ages = [episode.age for episode in read_trajectories(folder / "trajectories", step)]
    assert ages == [episode.age for episode in batch.episodes]
    assert line["rollout/age"] == np.mean(ages)
    assert line["rollout/age_max"] == max(ages)
    assert line["rollout/stale"] == pytest.approx(batch.stale / mask.sum())
  assert older > 20


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


@pytest.mark.parametrize("name", ["learned", pytest.param("overlap", marks=pytest.mark.slow)])
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
