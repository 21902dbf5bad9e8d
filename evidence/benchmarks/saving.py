"""What checkpoints cost the training thread: the quickstart, saved at every tenth step.

    python evidence/benchmarks/saving.py

Saving is asynchronous: the thread waits for the arrays to be copied, and for the checkpoint before
if that is not yet written. Its time is set against that of the ten steps, three runs.
"""

import json
import os
import pathlib
import statistics
import tempfile
import time

from dca_jax import config as config_lib
from dca_jax.loop import train
from dca_jax.store.checkpoints import Checkpoints

RECIPE = str(pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py")
STEPS, EVERY = 61, 10


def run() -> tuple[float, float]:
  """Seconds of a save, and of the ten steps between two, medians."""
  seconds, save = [], Checkpoints.save

  def timed(self, step, state, metrics, last):
    begun = time.perf_counter()
    save(self, step, state, metrics, last)
    if (
      not last and step > EVERY
    ):  # The first in a process sets things up, and the last one waits for the files.
      seconds.append(time.perf_counter() - begun)

  Checkpoints.save = timed  # type: ignore[method-assign]
  settings = [f"steps={STEPS}", f"checkpoint.every={EVERY}", "evaluate.problems=2"]
  with tempfile.TemporaryDirectory() as folder:
    train(config_lib.load(RECIPE, [f"--config.{s}" for s in settings]), folder, quiet=True)
    lines = [
      json.loads(line) for line in (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()
    ]
  Checkpoints.save = save  # type: ignore[method-assign]
  return statistics.median(seconds), EVERY * statistics.median(
    line["seconds/step"] for line in lines[2:]
  )


def main() -> None:
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
  for _ in range(3):
    saving, stepping = run()
    print(
      f"a save holds the thread {1000 * saving:.0f} ms, ten steps take {stepping:.2f} s:"
      f" {saving / stepping:.2%}"
    )


if __name__ == "__main__":
  main()
