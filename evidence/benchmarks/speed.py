"""What sharing prompts saves in the quickstart's update, and how soon its first step is done.

    python evidence/benchmarks/speed.py

Prints, for 16 problems x 8 completions x 48 tokens, the seconds of the update with each prompt
computed once per group against once per completion (alternated, best and median of the rounds); and
the seconds from starting the process to the end of the first training step, with compiled programs
and warm start cached. How long a whole step and its parts take, `dca-jax bench` says.
"""

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dca_jax import config as config_lib
from dca_jax import learner
from dca_jax.policy import Policy

RECIPE = str(pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py")
ROUNDS = 15


def run(workdir: str) -> float:
  """Seconds until the first step's metrics were on disk, of a training run in a process of its
  own."""
  command = [sys.executable, "-m", "dca_jax", "train", f"--config={RECIPE}", f"--workdir={workdir}"]
  command += [
    "--config.steps=2",
    "--config.evaluate.problems=2",
    "--config.checkpoint.every=2",
  ]
  path = pathlib.Path(workdir) / "metrics.jsonl"
  start = time.perf_counter()
  process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
  while not (path.exists() and '"step": 1,' in path.read_text()):
    if process.poll() is not None:
      raise SystemExit(f"the run failed: {' '.join(command)}")
    time.sleep(0.02)
  first = time.perf_counter() - start
  process.wait()
  return first


def update_seconds() -> dict[str, list[float]]:
  """Seconds of an update, the prompt shared by the group and repeated for every completion."""
  config = config_lib.load(RECIPE)
  policy = Policy(config.policy, 31)
  optimizer = learner.make_optimizer(config.learner, 1)
  problems, group, s, t = (
    config.rollout.problems,
    config.rollout.group,
    config.rollout.max_prompt_tokens,
    48,
  )
  rng = np.random.default_rng(0)
  rows = problems * group
  completions = rng.integers(0, 31, (rows, t), dtype=np.int32)
  rest = completions, np.ones((rows, t), bool), np.ones(rows, bool), np.zeros((rows, t), np.float32)
  rest = *rest, None, rng.normal(size=(rows, t)).astype(np.float32)
  prompts = rng.integers(0, 31, (problems, s), dtype=np.int32)
  repeated = np.repeat(prompts, group, 0)
  batches = {
    "shared": learner.Batch(prompts, np.full(problems, s, np.int32), *rest),
    "plain": learner.Batch(repeated, np.full(rows, s, np.int32), *rest),
  }

  params = jax.jit(lambda key: nn.unbox(policy.init_params(key)))(jax.random.key(0))
  settings = learner.Learner(policy, config.learner, config.rollout.sampling, optimizer)
  seconds: dict[str, list[float]] = {name: [] for name in batches}
  for round_ in range(ROUNDS + 1):
    for name, batch in batches.items():
      state = learner.init_state(optimizer, jax.tree.map(jnp.copy, params))
      jax.block_until_ready(state)
      start = time.perf_counter()
      jax.block_until_ready(learner.update(settings, state, batch, np.bool_(True)))
      if round_:  # The first compiles.
        seconds[name].append(time.perf_counter() - start)
  return seconds


def main() -> None:
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
  with tempfile.TemporaryDirectory() as folder:
    run(f"{folder}/cold")  # Fills the caches.
    first = run(f"{folder}/warm")
  print(f"process start to the end of the first step: {first:.1f} s")
  seconds = update_seconds()
  for name, values in seconds.items():
    print(
      f"update, prompts {name}: {statistics.median(values):.3f} s median, {min(values):.3f} s best"
      f" of {ROUNDS}"
    )
  ratio = [p / s for s, p in zip(seconds["shared"], seconds["plain"], strict=True)]
  print(f"plain / shared: {statistics.median(ratio):.2f} median of {ROUNDS} alternated rounds")


if __name__ == "__main__":
  main()
