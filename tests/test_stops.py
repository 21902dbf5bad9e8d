"""SIGTERM and Ctrl-C at every moment of a run: when it ends, with what status, what it says,
and what is lost."""

import signal
import threading
import time

import pytest
import tiny

from dca_jax.commands import cli
from dca_jax.loop import train
from dca_jax.run import _FIRST
from dca_jax.tasks import TASKS, Chains, ChainsConfig


class Moment:
  """A moment in a run, held until a signal comes."""

  def __init__(self):
    self.name, self.number = "", 0
    """Which moment, and how often it has to come before it is held."""
    self.reached = threading.Event()

  def pass_by(self, name: str) -> None:
    if name != self.name or self.reached.is_set():
      return
    self.number -= 1
    if self.number <= 0:
      self.reached.set()
      for _ in range(6000):  # Not one long sleep: a signal just before it would not shorten it.
        time.sleep(0.05)
      raise AssertionError("no signal came")


@pytest.fixture
def moment(monkeypatch):
  moment = Moment()

  class Held(Chains):
    def __init__(self, config):
      moment.pass_by("loading")
      super().__init__(config)

    def problem(self, split, index):
      moment.pass_by(f"problem {split}")
      return super().problem(split, index)

    def verify(self, problem, completion, truncated):
      moment.pass_by("verification")
      return super().verify(problem, completion, truncated)

    def label_steps(self, prompt, steps, truncated):
      moment.pass_by("review")
      return super().label_steps(prompt, steps, truncated)

  class HeldConfig(ChainsConfig):
    def open(self):
      return Held(self)

  monkeypatch.setitem(TASKS, "held", HeldConfig)
  return moment


@pytest.fixture(autouse=True)
def interrupts():
  """A shell that runs the tests in the background has them ignore Ctrl-C."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


SETTINGS = {
  "steps": 4,
  "task.name": "held",
  "credit.scheme": "weighted",
  "reviewer.name": "oracle",
  "checkpoint.every": 100,
  "evaluate.every": 2,
}


def stopped(
  moment, capsys, recipe, run, name: str, number: int, by: signal.Signals
) -> tuple[int, str]:
  """Sends a signal at a moment of a run; its exit status, and the last line that it said."""
  moment.name, moment.number = name, number
  moment.reached.clear()
  main = threading.main_thread().ident  # Which the kernel chooses too, where it can.
  thread = threading.Thread(
    target=lambda: moment.reached.wait(300) and signal.pthread_kill(main, by)
  )
  thread.start()
  status = cli.main(["train", f"--config={recipe}", f"--workdir={run}"])
  thread.join()
  moment.name = ""
  return status, capsys.readouterr().err.strip().splitlines()[-1]


# What chains are asked in one step: 4 problems of 4 completions; before it, the first problems.
MOMENTS = [
  ("loading", 1, "while it was starting; nothing is lost, the same command starts again"),
  ("problem heldout", _FIRST + 1, "before the first checkpoint; the same command begins again"),
  (
    "verification",
    3,
    "before the first checkpoint; the same command begins again",
  ),  # The first evaluation.
  ("problem train", _FIRST + 2, "before the first checkpoint; the same command begins again"),
  ("review", 2, "before the first checkpoint; the same command begins again"),
  (
    "problem train",
    _FIRST + 6,
    "; step 1 is safe in {run}/checkpoints, the same command again continues",
  ),
  (
    "problem heldout",
    _FIRST + 1,
    "; step 2 is safe in {run}/checkpoints, the same command again continues",
  ),
  ("verification", 40, "; step 3 is safe in {run}/checkpoints, the same command again continues"),
]


def test_a_run_that_is_stopped_at_every_moment_is_the_uninterrupted_one(moment, capsys, tmp_path):
  recipe, run = tiny.write_recipe(tmp_path, SETTINGS), tmp_path / "run"
  for i, (name, number, said) in enumerate(MOMENTS):
    by, called, status = ((signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "Ctrl-C", 130))[i % 2]
    ended = stopped(moment, capsys, recipe, run, name, number, by)
    gap = "" if said.startswith(";") else " "
    assert ended == (status, f"dca-jax: stopped by {called}{gap}{said.format(run=run)}"), (i, name)
  assert cli.main(["train", f"--config={recipe}", f"--workdir={run}"]) == 0
  train(tiny.make_config(SETTINGS), str(tmp_path / "whole"), quiet=True)
  tiny.assert_same_run(run, tmp_path / "whole")


# Processes of their own.


def ended(process) -> tuple[int, str]:
  _, errors = process.communicate()
  return process.returncode, errors.strip().splitlines()[-1]


def read_until(process, begin: str) -> None:
  assert any(line.startswith(begin) for line in process.stdout), process.communicate()


def test_before_a_run_is_opened(tmp_path):
  recipe = tiny.write_recipe(
    tmp_path, more="import time\nprint('read', flush=True)\ntime.sleep(600)\n"
  )
  for number, name in ((signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")):
    process = tiny.start("train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}")
    read_until(process, "read")
    process.send_signal(number)
    assert ended(process) == (
      128 + number,
      f"dca-jax: ended by {name}; what was saved before is intact",
    )


def test_in_the_warm_start(tmp_path):
  recipe = tiny.write_recipe(tmp_path, {"warmstart.steps": 10**6})
  process = tiny.start("train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}")
  read_until(process, "warm start 51/")
  process.send_signal(signal.SIGTERM)
  said = "dca-jax: stopped by SIGTERM before the first checkpoint; the same command begins again"
  assert ended(process) == (143, said)


def test_a_second_ctrl_c_ends_a_step_that_must_be_finished(tmp_path):
  held = """
import time
from dca_jax import step
def never(*_):
  print("update", flush=True)
  while True:
    time.sleep(0.05)
step.write_trajectories = never
"""
  recipe, run = tiny.write_recipe(tmp_path, more=held), tmp_path / "run"
  process = tiny.start("train", f"--config={recipe}", f"--workdir={run}")
  read_until(process, "update")
  process.send_signal(signal.SIGINT)
  assert any("a second Ctrl-C ends it now" in line for line in process.stderr)
  process.send_signal(signal.SIGINT)
  assert ended(process) == (130, "dca-jax: ended by Ctrl-C; what was saved before is intact")
