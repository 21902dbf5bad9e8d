"""A run of 200 steps against a server that goes through every fault in random order."""

import itertools
import random
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny

sys.path.append(str(Path(__file__).parent / "review"))
from fake_server import FakeServer

from dca_jax.rollout import read_trajectories

SECRET = "secret-key-1234567890"
DEADLINE, STEPS, CAP = 1.0, 200, 10.0
FAULTS = [
  *(400, 401, 403, 404, 408, 429, 500, 502, 503, 504),
  *((429, 0.5), (429, 1.5), (503, 0.5), (503, 1.5)),
  *("hang", "drop", "drip", "html", "empty", "malformed", "fenced", "wrong"),
  *("max_tokens", "safety", "blocked", "no usage", "lies"),
]


class Day:
  """What the server does during each step, and when each was done, as the run's own metrics say."""

  def __init__(self, workdir, seed):
    dice = random.Random(seed)
    faults = dice.sample(FAULTS, len(FAULTS))
    self.plan: list = ["ok"] * 3  # For each step.
    while len(self.plan) < STEPS - 5:
      self.plan += [faults.pop()] * dice.randint(3, 4) if faults else ["ok"]
      self.plan += ["ok"] * 4
    self.plan += ["ok"] * 10
    self.path, self.done = workdir / "metrics.jsonl", [time.monotonic()]
    self.pauses: list[tuple[float, float]] = []  # When the server asked for one, and until when.
    self._over = threading.Event()

  def behave(self, name, attempt):
    fault = self.plan[len(self.done) - 1]
    if isinstance(fault, tuple) and fault[0] == 429:
      self.pauses.append((time.monotonic(), time.monotonic() + fault[1]))
    return fault

  def watch(self):
    """Line 0 is the evaluation before the first step."""
    while not self._over.wait(0.002):
      lines = self.path.read_bytes().count(b"\n") if self.path.exists() else 0
      self.done += [time.monotonic()] * (lines - len(self.done))

  def __enter__(self):
    self._thread = threading.Thread(target=self.watch)
    self._thread.start()
    return self

  def __exit__(self, *error):
    self._over.set()
    self._thread.join()


def missed_after_health(day, lines):
  """For each time that the server got well, the steps begun since then that lost reviews."""
  missed, ok = {}, {}
  for line in lines[1:]:
    if line["review/asked"]:
      ok[line["step"]] = line["review/ok"]
  for step in range(2, STEPS):
    fault, now = day.plan[step - 2 : step]
    if fault == "ok" or now != "ok":
      continue
    well = day.done[step - 1]
    well = max([well, *(until for asked, until in day.pauses if asked <= well)])
    healthy = itertools.takewhile(lambda s: day.plan[s - 1] == "ok", range(step, STEPS + 1))
    begun = [s for s in healthy if s in ok and day.done[s - 1] >= well]
    if begun:
      missed[fault] = next((i for i, s in enumerate(begun) if ok[s] == 1), len(begun))
  return missed


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "name"), [(1, "gemini"), (2, "openai"), (3, "gemini")])
def test_two_hundred_steps_of_every_fault(seed, name, tmp_path):
  workdir = tmp_path / "run"
  day = Day(workdir, seed)
  with FakeServer(day.behave) as server:
    settings = {
      "steps": STEPS,
      "seed": seed,
      "credit.scheme": "weighted",
      "learner.lr": 1e-5,  # Groups stay mixed.
      "rollout.group": 8,
      "checkpoint.every": 50,
      "reviewer.name": name,
      "reviewer.deadline": DEADLINE,
      "reviewer.client.base_url": server.url + ("/v1" if name == "openai" else ""),
      "reviewer.client.attempt_seconds": 0.4,
      "reviewer.client.max_dollars": CAP,
      "reviewer.client.min_ok_frac": 0.0,
    }
    recipe = tiny.write_recipe(tmp_path, settings)
    keys = {"GEMINI_API_KEY": SECRET, "OPENAI_API_KEY": SECRET}
    with day:
      process = tiny.start("train", f"--config={recipe}", f"--workdir={workdir}", environment=keys)
      out, err = process.communicate(timeout=900)
  assert process.returncode == 0, err[-2000:]

  lines = tiny.read_lines(workdir)
  assert lines[-1]["step"] == STEPS
  waited = [line["seconds/review"] for line in lines[2:]]  # The first step still compiles.
  spent = [line["review/dollars_spent"] for line in lines[1:]]
  missed = missed_after_health(day, lines)
  totals = 0
  for step in range(1, STEPS + 1):
    for t in read_trajectories(workdir / "trajectories", step):
      assert sum(t.credit) == pytest.approx(t.advantage * len(t.tokens), abs=1e-4)
      totals += 1
  print(
    f"\nseed {seed} {name}: {len(server.requests)} calls; longest wait {max(waited):.2f} s;"
    f" ${spent[-1]:.3f} of ${CAP:g}; {totals} totals conserved; steps lost after health:"
    f" {missed}; reviews usable in {sum(x.get('review/ok') == 1 for x in lines[1:])} steps"
  )
  assert max(waited) <= DEADLINE + 1
  assert spent == sorted(spent)
  assert spent[-1] <= CAP
  assert len(missed) >= 15  # Some lie wholly within a pause that the server asked for.
  assert max(missed.values()) <= 2
  assert SECRET not in out + err
  assert not [p for p in tmp_path.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
