"""Pairs of processes that meet, fail, stop and wait for each other, without training:
one import, then forks.

python tests/pairs.py FOLDER    writes FOLDER/NAME_PROCESS.out and prints exit statuses as JSON
"""

import json
import os
import pathlib
import signal
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path += [str(pathlib.Path(__file__).parents[1]), str(pathlib.Path(__file__).parent)]

import tiny

from dca_jax.commands import cli
from dca_jax.devices import processes
from dca_jax.devices.preemption import Stops, notices
from dca_jax.errors import UserError


def forever() -> None:
  for _ in range(6000):  # Not one long sleep: a signal just before it would not shorten it.
    time.sleep(0.05)
  raise AssertionError("nothing happened")


def both_wait(*_) -> None:
  processes.gather("metrics", None)


def a_bug(stops: Stops, me: int) -> None:
  both_wait() if me == 0 else print(1 // 0)


def a_bug_in_the_first(stops: Stops, me: int) -> None:
  both_wait() if me else print(1 // 0)


def a_mistake(stops: Stops, me: int) -> None:
  if me:
    raise UserError("the disk is full")
  both_wait()


def two_mistakes(stops: Stops, me: int) -> None:
  raise UserError(f"disk {me} is full")


def one_is_stuck(stops: Stops, me: int) -> None:
  processes._PATIENCE = 4.0
  stops.phase("reviews")
  forever() if me else both_wait()


def one_takes_its_time(stops: Stops, me: int) -> None:
  processes._PATIENCE = 2.0
  stops.phase("reviews", seconds=600.0)
  if me:
    time.sleep(4.0)
  processes.gather("metrics", None)
  print("came")


def one_is_dead(stops: Stops, me: int) -> None:
  processes._SILENCE = 4.0
  processes.gather("metrics", None)
  if me:
    os.kill(os.getpid(), signal.SIGKILL)
  both_wait()


def one_meets_once_more(stops: Stops, me: int) -> None:
  if me:
    processes.gather("refill", True)
  processes.gather("metrics", 0.5)
  processes.gather("evaluation", 0.5)


def other_settings(stops: Stops, me: int) -> None:
  processes.check_alike({"setting seed": 0, "setting steps": 10 + me})


def one_is_stopped_while_it_starts(stops: Stops, me: int) -> None:
  if me:
    os.kill(os.getpid(), signal.SIGTERM)
    forever()
  both_wait()


def one_is_stopped_in_a_step(stops: Stops, me: int) -> None:
  for step in range(6000):
    print(step, flush=True)
    stops.phase("sampling")
    if me and step == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)
    stops.phase("update", at_once=False)


def one_is_stopped_while_both_wait_for_reviews(stops: Stops, me: int) -> None:
  stops.phase("reviews", seconds=600.0)
  if me:
    os.kill(os.getpid(), signal.SIGINT)
  stops.wait(forever, then="values")


SCENES = (
  a_bug,
  a_bug_in_the_first,
  a_mistake,
  two_mistakes,
  one_is_stuck,
  one_takes_its_time,
  one_is_dead,
  one_meets_once_more,
  other_settings,
  one_is_stopped_while_it_starts,
  one_is_stopped_in_a_step,
  one_is_stopped_while_both_wait_for_reviews,
)


def play(scene, port: int, me: int, out: pathlib.Path) -> None:
  """What one process of a pair does; it ends as the program does."""
  file = os.open(out, os.O_CREAT | os.O_WRONLY)
  os.dup2(file, 1)
  os.dup2(file, 2)
  signal.signal(signal.SIGINT, signal.default_int_handler)

  def _train(args, overrides) -> None:
    processes.connect(f"localhost:{port}", 2, me)
    with notices() as stops, processes.watched(stops):
      scene(stops, me)

  cli._train = _train
  sys.argv = ["dca-jax", "train", "--config=recipe.py", "--workdir=run"]
  cli.run()


def main(folder: str) -> None:
  processes._BEAT = 0.2
  children = {}
  for scene in SCENES:
    port = tiny.free_port()
    for me in range(2):
      out = pathlib.Path(folder) / f"{scene.__name__}_{me}.out"
      if not (child := os.fork()):
        play(scene, port, me, out)
      children[child] = (scene.__name__, me)
  ended: dict[str, list[int]] = {scene.__name__: [-1, -1] for scene in SCENES}
  for child, (name, me) in children.items():
    ended[name][me] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  print(json.dumps(ended))


if __name__ == "__main__":
  main(sys.argv[1])
