"""Kills one run with SIGKILL again and again, at random moments, and compares it
with one left alone.

    python tests/twenty_kills.py --seed=0

The reviewer is a language model's client against a server on the loopback, so that paid reviews are
at stake too. What can be paid for twice is what was under way at a kill: sent, and its reply not
yet committed. A reply that was in reviews.sqlite when the process died is never asked for again.
Whether a reply had reached the machine does not count: a process without a processor cannot read
it.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import pathlib
import random
import re
import sqlite3
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["GEMINI_API_KEY"] = "none"
sys.path += [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent / "review")]

import tiny
from fake_server import FakeServer, asked_for, honest_reply

from dca_jax.review.trial import PLANTED
from dca_jax.store.trajectories import read_trajectories


class Recording(FakeServer):
  """Also says which process asked what. A reply names its question, so
  that it is known again in the cache."""

  def __init__(self, **settings):
    self.calls: dict[str, list[int]] = collections.defaultdict(list)
    super().__init__(reply=self._opinion, latency=0.02, **settings)

  def _answer(self, handler, body):
    question = asked_for(body["contents"][0]["parts"][0]["text"])
    if question["problem"] != PLANTED.problem:
      self.calls[_digest(question)].append(int(handler.headers["x-goog-api-key"]))
    super()._answer(handler, body)

  @staticmethod
  def _opinion(data):
    reply = honest_reply(data, weight=1)
    for answer in reply["answers"]:
      answer["steps"][0 if len(answer["steps"]) % 2 else -1]["weight"] = 4
      answer["steps"][0]["why"] = _digest(data)
    return reply


def _digest(question) -> str:
  return hashlib.sha256(json.dumps(question).encode()).hexdigest()


def committed(workdir: pathlib.Path) -> tuple[set[str], int]:
  """The questions whose replies a dead process has left, and how many
  of its calls stand booked in full."""
  if not (workdir / "reviews.sqlite").exists():
    return set(), 0
  with contextlib.closing(sqlite3.connect(workdir / "reviews.sqlite")) as db:
    texts = [text for (text,) in db.execute("select text from replies")]
    ((open_calls,),) = db.execute(
      "select coalesce(sum((dollars > 0) - (dollars < 0)), 0) from spending"
    )
  return {found[0] for text in texts if (found := re.search(r"\b[0-9a-f]{64}\b", text))}, int(
    open_calls
  )


def settings(server: FakeServer, steps: int) -> dict:
  return {
    "steps": steps,
    "credit.scheme": "weighted",
    "reviewer.name": "gemini",
    "reviewer.client.base_url": server.url,
    "rollout.problems": 8,
    "checkpoint.every": 3,
  }


def start(recipe: str, workdir: pathlib.Path, number: int):
  key = {"GEMINI_API_KEY": str(number)}
  return tiny.start("train", f"--config={recipe}", f"--workdir={workdir}", environment=key)


def run_to_the_end(recipe: str, workdir: pathlib.Path, number: int) -> None:
  process = start(recipe, workdir, number)
  _, errors = process.communicate()
  assert process.returncode == 0, errors[-2000:]


def kill_once(recipe: str, workdir: pathlib.Path, number: int, dice: random.Random) -> int:
  """Lets a process work for some steps, or not even one; returns the last step written."""
  before = (
    (workdir / "metrics.jsonl").stat().st_mtime_ns if (workdir / "metrics.jsonl").exists() else 0
  )
  process = start(recipe, workdir, number)
  if dice.random() < 0.2:
    time.sleep(dice.uniform(0.5, 4.0))  # While it imports, restores, compiles.
  else:
    path = workdir / "metrics.jsonl"
    tiny.wait_until(lambda: path.exists() and path.stat().st_mtime_ns != before, process)
    # It has taken back what was not saved, and trains on from there.
    target = max((line["step"] for line in tiny.read_lines(workdir)), default=0) + dice.randint(
      1, 12
    )
    tiny.wait_until(
      lambda: any(line["step"] >= target for line in tiny.read_lines(workdir)), process
    )
    time.sleep(dice.uniform(0.0, 0.2))
  assert process.poll() is None, (
    f"it finished before it was killed: {process.communicate()[1][-500:]}"
  )
  process.kill()
  process.communicate()
  lines = tiny.read_lines(workdir)
  return lines[-1]["step"] if lines else 0


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
    run_to_the_end(recipe, folder / "whole", 0)
    alone = sum(map(len, server.calls.values()))
    server.calls.clear()
    kept, open_calls = [set()], 0  # By process.
    for number in range(1, args.kills + 1):
      step = kill_once(recipe, folder / "killed", number, dice)
      questions, open_calls = committed(folder / "killed")
      kept.append(questions)
      print(f"kill {number}: after step {step}", flush=True)
    run_to_the_end(recipe, folder / "killed", args.kills + 1)

    tiny.assert_same_arrays(tiny.saved_state(folder / "killed"), tiny.saved_state(folder / "whole"))
    seen: set[int] = set()
    for step in range(1, args.steps + 1):
      ours, theirs = (
        list(read_trajectories(folder / w / "trajectories", step)) for w in ("killed", "whole")
      )
      assert [t.to_json() for t in ours] == [t.to_json() for t in theirs], step
      problems = {t.problem.id for t in ours}
      assert len(problems) == 8
      assert not problems & seen
      seen |= problems
    assert [line["step"] for line in tiny.read_lines(folder / "killed")] == list(
      range(args.steps + 1)
    )

    assert kept[-1]
    for question, processes in server.calls.items():
      for process in processes:
        assert not any(question in kept[earlier] for earlier in range(process)), (
          "a committed reply was asked for again"
        )
    repeats = sum(len(processes) - 1 for processes in server.calls.values())
    print(
      f"{args.kills} kills, {args.steps} steps: parameters, optimizer state, trajectories equal bit"
      f" for bit; {len(seen)} problems, each once; {len(server.calls)} reviews in"
      f" {len(server.calls) + repeats} calls (uninterrupted: {alone}), {repeats} of them again, all"
      f" of which were under way at a kill; {open_calls} calls under way at kills stay booked in"
      " full"
    )


if __name__ == "__main__":
  main()
