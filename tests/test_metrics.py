"""metrics.jsonl holds every step once, and TensorBoard can read the events."""

import json
import math
import time

import pytest
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dca_jax.errors import UserError
from dca_jax.metrics import Reporter, not_finite, read_metrics
from dca_jax.record import Tally, merge


def write(workdir, start, steps):
  with Reporter(workdir, start, 10, quiet=True) as reporter:
    for step in steps:
      reporter.log(step, {"group/name": step / 4, "group/other": 1.0})


def steps(workdir):
  return [line["step"] for line in read_metrics(workdir)]


@pytest.fixture
def workdir(tmp_path):
  return epath.Path(tmp_path)


def test_lines_come_back_as_written(workdir):
  write(workdir, 0, range(3))
  assert read_metrics(workdir) == [{"step": s, "group/name": s / 4, "group/other": 1.0} for s in range(3)]


def test_a_line_can_be_read_as_soon_as_it_is_logged(workdir):
  with Reporter(workdir, 0, 10, quiet=True) as reporter:
    reporter.log(0, {"group/name": 1.0})
    assert steps(workdir) == [0]


def test_no_file_is_no_lines(workdir):
  assert read_metrics(workdir) == []


def test_a_resumed_run_takes_back_what_was_not_saved(workdir):
  write(workdir, 0, range(6))
  with Reporter(workdir, 3, 10, quiet=True) as reporter:
    assert reporter.evaluated == set()
    assert steps(workdir) == [0, 1, 2, 3]
  write(workdir, 3, [4, 5, 6])
  assert steps(workdir) == list(range(7))


def test_an_evaluation_that_was_cut_off_is_added_to_its_line(workdir):
  write(workdir, 0, range(4))
  with Reporter(workdir, 3, 10, quiet=True) as reporter:
    reporter.amend(3, {"eval/greedy": 0.5})
    reporter.log(4, {"group/name": 1.0})
  assert steps(workdir) == [0, 1, 2, 3, 4]
  assert read_metrics(workdir)[3] == {"step": 3, "group/name": 0.75, "group/other": 1.0, "eval/greedy": 0.5}
  with Reporter(workdir, 4, 10, quiet=True) as reporter:
    assert reporter.evaluated == {3}


def test_a_line_that_was_not_finished_is_dropped(workdir):
  write(workdir, 0, range(3))
  with (workdir / "metrics.jsonl").open("a") as file:
    file.write('{"step": 3, "group/na')
  assert steps(workdir) == [0, 1, 2]
  write(workdir, 2, [3])
  assert steps(workdir) == [0, 1, 2, 3]
  assert [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3]


def test_a_damaged_line_in_the_middle_is_named(workdir):
  write(workdir, 0, range(3))
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  (workdir / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:9], lines[2]]) + "\n")
  damaged = (workdir / "metrics.jsonl").read_text()
  for read in (read_metrics, lambda folder: Reporter(folder, 2, 10, quiet=True)):
    with pytest.raises(UserError) as raised:
      read(workdir)
    assert f"{workdir / 'metrics.jsonl'}, line 2" in str(raised.value)
  assert (workdir / "metrics.jsonl").read_text() == damaged


def test_tensorboard_reads_the_events(workdir):
  write(workdir, 0, range(4))
  events = EventAccumulator(str(workdir / "tensorboard")).Reload()
  assert set(events.Tags()["scalars"]) == {"group/name", "group/other"}
  assert [(e.step, e.value) for e in events.Scalars("group/name")] == [(s, s / 4) for s in range(4)]


def test_tensorboard_shows_every_step_once_after_a_resume(workdir):
  write(workdir, 0, range(6))
  begun = int(time.time())
  while int(time.time()) == begun:  # A process has a file of its own, named by the second that it started in.
    time.sleep(0.05)
  write(workdir, 3, [4, 5, 6])
  events = EventAccumulator(str(workdir / "tensorboard")).Reload()
  assert [e.step for e in events.Scalars("group/name")] == list(range(7))


def test_not_finite_names_the_first_bad_metric():
  assert not_finite({"a": 1.0, "b": 0.0}) is None
  assert not_finite({"a": 1.0, "b": math.nan, "c": math.inf}) == "b"
  assert not_finite({"a": -math.inf}) == "a"


def test_without_quiet_a_step_is_one_line(workdir, capsys):
  names = ["train/reward", "train/accuracy", "train/length", "train/tokens_per_second", "learner/entropy", "learner/kl"]
  names += [f"seconds/{part}" for part in ("sample", "review", "update")]
  with Reporter(workdir, 0, 10) as reporter:
    reporter.log(0, {"eval/greedy": 0.5})
    reporter.log(7, dict.fromkeys(names, 0.25))
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith("step  7/10 ")
  assert "reward 0.250" in line


def test_what_reviewers_say_is_put_together_over_processes_and_members():
  def said(spent, second, ok, slow):
    names = ("dollars_spent", "calls_2", "status_ok", "call_seconds_95", "call_seconds_95_2")
    values = (spent, second, ok, slow, slow)
    return Tally({}, {}, {}, {f"review/{n}": v for n, v in zip(names, values, strict=True)})

  assert merge([said(1.5, 3.0, 0.5, 2.0), said(2.5, 5.0, 1.0, 4.0)]) == {
    "review/dollars_spent": 4.0,  # Every process has its own part of the cap.
    "review/calls_2": 8.0,
    "review/status_ok": 0.75,
    "review/call_seconds_95": 3.0,
    "review/call_seconds_95_2": 3.0,
  }
