"""metrics.jsonl holds every step once, and TensorBoard can read the events."""

import json
import math
import time

import pytest
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dca_jax.store.metrics import Reporter, missing_steps, not_finite, read_metrics
from dca_jax.tally import Tally, merge, waits


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
  assert read_metrics(workdir) == [
    {"step": s, "group/name": s / 4, "group/other": 1.0} for s in range(3)
  ]


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


def test_steps_without_any_usable_review_are_counted_over_the_whole_run(workdir):
  def log(start, rows):
    with Reporter(workdir, start, 10, quiet=True) as reporter:
      for step, asked, ok in rows:
        reporter.log(step, {"review/asked": asked, "review/ok": ok})
      return reporter.unheard

  assert log(0, [(1, 0.5, 0.0), (2, 0.0, 0.0)]) == 1  # Nobody was asked in the second.
  assert log(2, [(3, 1.0, 0.0)]) == 2
  assert log(3, [(4, 1.0, 0.1)]) == 0
  assert log(4, [(5, 1.0, 0.0)]) == 0


def test_an_evaluation_that_was_cut_off_is_added_to_its_line(workdir):
  write(workdir, 0, range(4))
  with Reporter(workdir, 3, 10, quiet=True) as reporter:
    reporter.amend(3, {"eval/greedy": 0.5})
    reporter.log(4, {"group/name": 1.0})
  assert steps(workdir) == [0, 1, 2, 3, 4]
  assert len((workdir / "metrics.jsonl").read_text().splitlines()) == 5
  assert read_metrics(workdir)[3] == {
    "step": 3,
    "group/name": 0.75,
    "group/other": 1.0,
    "eval/greedy": 0.5,
  }
  with Reporter(workdir, 4, 10, quiet=True) as reporter:
    assert reporter.evaluated == {3}


def test_a_line_that_was_not_finished_is_dropped(workdir):
  write(workdir, 0, range(3))
  with (workdir / "metrics.jsonl").open("a") as file:
    file.write('{"step": 3, "group/na')
  assert steps(workdir) == [0, 1, 2]
  write(workdir, 2, [3])
  assert steps(workdir) == [0, 1, 2, 3]
  assert [
    json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()
  ] == [0, 1, 2, 3]


@pytest.mark.parametrize(
  "damage",
  [b'{"step": 1, "gro', b"", b"\0" * 40, b"\xff\xfe", b"[1]", b"7", b'{"group/name": 1.0}',
   b'{"step": true}', b'{"step": 1.0}',
   b'{"step": 1, "group/name": "x"}', b'{"step": 1, "group/name": NaN}', b'{"step": -1}',
   b"[" * 100_000, b'{"step": 1, "x": 1' + b"0" * 5000 + b"}"],
)  # fmt: skip
def test_a_damaged_line_in_the_middle_is_named_and_left_out(workdir, capsys, damage):
  write(workdir, 0, range(3))
  path = workdir / "metrics.jsonl"
  lines = path.read_bytes().splitlines()
  damaged = b"\n".join([lines[0], damage, lines[2]]) + b"\n"
  path.write_bytes(damaged)
  capsys.readouterr()
  assert steps(workdir) == [0, 2]
  (said,) = capsys.readouterr().err.splitlines()
  assert said.startswith(f"warning: {path}, line 2 is damaged (")
  assert path.read_bytes() == damaged  # Reading changes nothing.
  # A run goes on, and what cannot be read is kept.
  write(workdir, 2, [3])
  said = capsys.readouterr().err
  assert f"{path}, line 2 is damaged" in said
  assert f"{path} does not tell of steps 1" in said
  assert (workdir / "aside_metrics.jsonl").read_bytes() == damaged
  assert steps(workdir) == [0, 2, 3]
  assert not capsys.readouterr().err


def test_of_a_step_that_stands_twice_the_last_counts(workdir):
  (workdir / "metrics.jsonl").write_text(
    "".join(f'{{"step": {s}, "x": {x}}}\n' for s, x in ((0, 1), (2, 1), (1, 1), (2, 9)))
  )
  assert [(row["step"], row["x"]) for row in read_metrics(workdir)] == [(0, 1), (1, 1), (2, 9)]


def test_missing_steps_by_hand():
  def missing(*there):
    return missing_steps([{"step": step} for step in there])

  assert missing() == missing(0) == missing(0, 1, 2) == ""
  assert missing(0, 2) == "1"
  assert missing(2, 6, 7) == "0 to 1, 3 to 5"


def test_what_looks_wrong_is_said_once_also_after_a_resume(workdir, capsys):
  row = {"train/accuracy": 0.1, "train/truncated": 1.0}
  for start, first, end in ((0, 0, 7), (6, 7, 20)):
    with Reporter(workdir, start, 20) as reporter:
      for step in range(first, end):
        reporter.log(step, row)
  (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
  assert "step 4: every completion has been cut off" in said


def test_tensorboard_reads_the_events(workdir):
  write(workdir, 0, range(4))
  events = EventAccumulator(str(workdir / "tensorboard")).Reload()
  assert set(events.Tags()["scalars"]) == {"group/name", "group/other"}
  assert [(e.step, e.value) for e in events.Scalars("group/name")] == [(s, s / 4) for s in range(4)]


def test_tensorboard_shows_every_step_once_after_a_resume(workdir):
  write(workdir, 0, range(6))
  begun = int(time.time())
  while (
    int(time.time()) == begun
  ):  # A process has a file of its own, named by the second that it started in.
    time.sleep(0.05)
  write(workdir, 3, [4, 5, 6])
  events = EventAccumulator(str(workdir / "tensorboard")).Reload()
  assert [e.step for e in events.Scalars("group/name")] == list(range(7))


def test_not_finite_names_the_first_bad_metric():
  assert not_finite({"a": 1.0, "b": 0.0}) is None
  assert not_finite({"a": 1.0, "b": math.nan, "c": math.inf}) == "b"
  assert not_finite({"a": -math.inf}) == "a"


def test_without_quiet_a_step_is_one_line(workdir, capsys):
  names = [
    "train/reward",
    "train/accuracy",
    "train/length",
    "train/tokens_per_second",
    "learner/entropy",
    "learner/kl",
  ]
  names += ["train/truncated", "train/mixed_groups"]
  names += [f"seconds/{part}" for part in ("sample", "review", "update")]
  with Reporter(workdir, 0, 10) as reporter:
    reporter.log(0, {"eval/greedy": 0.5})
    reporter.log(7, dict.fromkeys(names, 0.25))
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith("step  7/10 ")
  assert "reward 0.250" in line
  assert "mixed 25%  cut 25%" in line


def test_every_process_waits_for_the_slowest():
  tallies = [
    Tally({}, {}, {"seconds/step": step, "seconds/update": update}, {})
    for step, update in ((9.0, 6.0), (9.0, 1.0), (9.5, 4.0))
  ]
  assert waits(tallies) == {"seconds/wait_0": 5.0, "seconds/wait_1": 0.0, "seconds/wait_2": 2.5}
  assert waits(tallies[:1]) == {}


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
