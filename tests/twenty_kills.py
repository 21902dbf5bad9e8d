"""Kills one run with SIGKILL again and again, at random moments, and compares it with a run that was left alone.

    python tests/twenty_kills.py --seed=0

The reviewer is a language model's client against a server on the loopback, so that paid reviews are at stake too.
"""

import argparse
import collections
import os
import pathlib
import random
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["GEMINI_API_KEY"] = "none"
sys.path += [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent / "review")]

import tiny
from fake_server import FakeServer, honest_reply

from dca_jax.store.trajectories import read_trajectories


class Recording(FakeServer):
  """Also says when each question came and when its answer had been sent."""

  def __init__(self, **settings):
    self.calls: dict[str, list[list[float]]] = collections.defaultdict(list)
    super().__init__(reply=self._opinion, latency=0.02, **settings)

  def _answer(self, handler, body):
    name = str(body["contents"][0]["parts"][0]["text"]).partition("\n")[2].rpartition("\n<")[0]
    call = [time.time(), time.time()]
    self.calls[name].append(call)
    try:
      super()._answer(handler, body)
    finally:
      call[1] = time.time()

  @staticmethod
  def _opinion(data):
    reply = honest_reply(data, weight=1)
    for answer in reply["answers"]:
      answer["steps"][0 if len(answer["steps"]) % 2 else -1]["weight"] = 4
    return reply


def settings(server: FakeServer, steps: int) -> dict:
  return {
    "steps": steps,
    "credit.scheme": "weighted",
    "reviewer.name": "gemini",
    "reviewer.client.base_url": server.url,
    "rollout.problems": 8,
    "checkpoint.every": 3,
  }


def run_to_the_end(recipe: str, workdir: pathlib.Path) -> None:
  process = tiny.start("train", f"--config={recipe}", f"--workdir={workdir}")
  _, errors = process.communicate()
  assert process.returncode == 0, errors[-2000:]


def kill_once(recipe: str, workdir: pathlib.Path, dice: random.Random) -> tuple[float, int]:
  """Lets a process work for some steps, or not even one; returns when it died, and the last step written."""
  before = (workdir / "metrics.jsonl").stat().st_mtime_ns if (workdir / "metrics.jsonl").exists() else 0
  process = tiny.start("train", f"--config={recipe}", f"--workdir={workdir}")
  if dice.random() < 0.2:
    time.sleep(dice.uniform(0.5, 4.0))  # While it imports, restores, compiles.
  else:
    path = workdir / "metrics.jsonl"
    tiny.wait_until(lambda: path.exists() and path.stat().st_mtime_ns != before, process)
    # It has taken back what was not saved, and trains on from there.
    target = max((line["step"] for line in tiny.read_lines(workdir)), default=0) + dice.randint(1, 12)
    tiny.wait_until(lambda: any(line["step"] >= target for line in tiny.read_lines(workdir)), process)
    time.sleep(dice.uniform(0.0, 0.2))
  assert process.poll() is None, f"it finished before it was killed: {process.communicate()[1][-500:]}"
  process.kill()
  died = time.time()
  process.communicate()
  lines = tiny.read_lines(workdir)
  return died, lines[-1]["step"] if lines else 0


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--steps", type=int, default=400)
  args = parser.parse_args()
  dice = random.Random(args.seed)
  with tempfile.TemporaryDirectory() as scratch, Recording() as server:
    folder = pathlib.Path(scratch)
    recipe = tiny.write_recipe(folder, settings(server, args.steps))
    run_to_the_end(recipe, folder / "whole")
    alone = sum(map(len, server.calls.values()))
    server.calls.clear()
    deaths = []
    for number in range(1, args.kills + 1):
      died, step = kill_once(recipe, folder / "killed", dice)
      deaths.append(died)
      print(f"kill {number}: after step {step}", flush=True)
    run_to_the_end(recipe, folder / "killed")

    tiny.assert_same_arrays(tiny.saved_state(folder / "killed"), tiny.saved_state(folder / "whole"))
    seen: set[int] = set()
    for step in range(1, args.steps + 1):
      ours, theirs = (list(read_trajectories(folder / w / "trajectories", step)) for w in ("killed", "whole"))
      assert [t.to_json() for t in ours] == [t.to_json() for t in theirs], step
      problems = {t.problem.id for t in ours}
      assert len(problems) == 8
      assert not problems & seen
      seen |= problems
    assert [line["step"] for line in tiny.read_lines(folder / "killed")] == list(range(args.steps + 1))

    again = {name: calls for name, calls in server.calls.items() if len(calls) > 1}
    # An answer that is under way when the process dies is lost; one that has arrived is not asked for again.
    flying = sum(
      any(begun <= died and sent >= died - 0.1 for died in deaths)
      for calls in again.values()
      for begun, sent in calls[:-1]
    )
    repeats = sum(len(calls) - 1 for calls in again.values())
    print(
      f"{args.kills} kills, {args.steps} steps: parameters, optimizer state, trajectories equal bit for bit;"
      f" {len(seen)} problems, each once; {len(server.calls)} reviews in {len(server.calls) + repeats} calls"
      f" (uninterrupted: {alone}), {repeats} of them again, {flying} of those because the first was under way at a kill"
    )
    assert repeats == flying


if __name__ == "__main__":
  main()
