"""`dca-jax status`."""

import os
import time

import pytest
import tiny
from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, EventAccumulator

from dca_jax.commands import cli
from dca_jax.loop import train
from dca_jax.store.trajectories import read_trajectories


def test_status_of_a_run_under_way_and_of_a_finished_one(tmp_path, capsys):
  train(
    tiny.make_config({"steps": 3, "credit.scheme": "weighted", "reviewer.name": "oracle"}),
    str(tmp_path),
    quiet=True,
  )
  assert cli.main(["status", f"--workdir={tmp_path}"]) == 0
  out = capsys.readouterr().out
  assert "chains: weighted credit, reviewer oracle, seed 0" in out
  assert "step 3 of 3" in out
  assert ": finished" in out
  assert "checkpoints: 2, 3" in out
  assert "spent" not in out

  config = (tmp_path / "config.json").read_text()
  (tmp_path / "config.json").write_text(config.replace('"steps": 3', '"steps": 1003', 1))
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 4, "train/acc')  # A line that is being written.
  os.utime(tmp_path / "metrics.jsonl", (time.time() - 3600,) * 2)
  assert cli.main(["status", f"--workdir={tmp_path}"]) == 0
  out = capsys.readouterr().out
  assert "step 3 of 1003, written 1:00:0" in out
  assert "to go" in out


def test_tensorboard_shows_how_credit_is_distributed(reviewed):
  events = EventAccumulator(str(reviewed / "tensorboard"), {HISTOGRAMS: 0}).Reload()
  shown = {event.step: event.histogram_value for event in events.Histograms("credit/token")}
  assert [*shown] == [1, 2, 3]
  for step, own in shown.items():
    kept = read_trajectories(reviewed / "trajectories", step)
    credit = [x for episode in kept for x in episode.credit]
    assert own.num == len(credit)
    assert own.sum == pytest.approx(sum(credit), abs=1e-5)
    assert own.max == pytest.approx(max(credit))


@pytest.mark.parametrize("there", [[], ["config.json"]])
def test_status_of_what_is_no_run_yet(there, tmp_path, capsys):
  if there:
    (tmp_path / "config.json").write_text(tiny.make_config().to_json())
    assert cli.main(["status", f"--workdir={tmp_path}"]) == 0
    assert "no step is finished yet" in capsys.readouterr().out
  else:
    assert cli.main(["status", f"--workdir={tmp_path}"]) == 1
    assert "holds no run\n" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("runs", "said"),
  [
    (["a"], "a does; name it"),
    (["u/seed_0", "w/seed_0"], "u/seed_0, w/seed_0 do; name one of them"),
    (
      [f"arm_{i}/seed_0" for i in range(6)],
      "arm_0/seed_0, arm_1/seed_0, arm_2/seed_0, arm_3/seed_0 and 2 more do; name one of them",
    ),
  ],
)
@pytest.mark.parametrize("command", ["status", "view", "chat", "report"])
def test_a_folder_of_runs_says_which_it_holds(runs, said, command, tmp_path, capsys):
  for name in (*runs, "a_model"):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "config.json").write_text("{}")
  for name in runs:
    (tmp_path / name / "metrics.jsonl").touch()
  assert cli.main([command, f"--workdir={tmp_path}"]) == 1
  assert f"holds no run itself, but {said}" in capsys.readouterr().err
