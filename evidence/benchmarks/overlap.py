"""Does a slow reviewer slow the training down? Steps of the quickstart with
and without overlap, side by side.

    python evidence/benchmarks/overlap.py

The reviewer is the oracle, whose answers are held back for 0.8 times the seconds that sampling and
update take. Runs in turns: an instant reviewer and a slow one, each with and without
`reviewer.overlap`.
"""

import concurrent.futures
import functools
import json
import os
import pathlib
import statistics
import tempfile
import threading

from dca_jax import config as config_lib
from dca_jax import run as run_module
from dca_jax.loop import train
from dca_jax.review.builtin import Instant, true_reviews

RECIPE = str(pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py")
ROUNDS, STEPS, SKIP = 4, 16, 4


class Slow(Instant):
  """The oracle, `seconds` late."""

  def __init__(self, seconds: float, truth):
    super().__init__(functools.partial(true_reviews, truth))
    self._seconds = seconds

  def submit(self, requests, deadline):
    late: concurrent.futures.Future = concurrent.futures.Future()
    answer = super().submit(requests, deadline).result()
    if not self._seconds:
      late.set_result(answer)
    else:
      threading.Timer(self._seconds, late.set_result, [answer]).start()
    return late


def run(seconds: float, overlap: int) -> list[dict]:
  """The metrics of the steps after the first few."""

  def slow(config, truth, cache, share):
    return Slow(seconds, truth)

  run_module.open_reviewer = slow
  settings = [
    f"steps={STEPS}",
    "learner.loss=ppo",
    f"reviewer.overlap={overlap}",
    "evaluate.problems=2",
  ]
  with tempfile.TemporaryDirectory() as folder:
    train(config_lib.load(RECIPE, [f"--config.{s}" for s in settings]), folder, quiet=True)
    lines = (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines][
    SKIP + 1 : -1
  ]  # The last step of a run has nothing to sample ahead.


def main() -> None:
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
  run(0.0, 0)
  work = statistics.median(m["seconds/sample"] + m["seconds/update"] for m in run(0.0, 0))
  latency = 0.8 * work
  print(f"sampling and update: {work:.3f} s; the slow reviewer answers after {latency:.3f} s")
  kinds = {
    "instant": (0.0, 0),
    "slow": (latency, 0),
    "slow, overlap 1": (latency, 1),
    "instant, overlap 1": (0.0, 1),
  }
  steps: dict[str, list[float]] = {name: [] for name in kinds}
  waits: dict[str, list[float]] = {name: [] for name in kinds}
  for _ in range(ROUNDS):
    for name, how in kinds.items():
      metrics = run(*how)
      steps[name] += [m["seconds/step"] for m in metrics]
      waits[name] += [m["seconds/review"] for m in metrics]
  base = statistics.median(steps["instant"])
  for name in kinds:
    step, wait = statistics.median(steps[name]), statistics.median(waits[name])
    print(
      f"{name:20} step {step:.3f} s ({step / base:.2f} x), of it waiting {wait:.3f} s;"
      f" {len(steps[name])} steps"
    )


if __name__ == "__main__":
  main()
