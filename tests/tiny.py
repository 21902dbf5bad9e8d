"""Runs small enough for seconds, shared by the tests, and what makes two runs the same run."""

import copy
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

import dca_jax
from dca_jax import config as config_lib
from dca_jax.config import Config

# Two values in the task and a short warm start, so that groups are often mixed and every update
# moves the policy. The shapes of the evaluation are those of training, so that one compiled sampler
# serves both.
SETTINGS = {
  "steps": 3,
  "task": {"lines": 2, "modulus": 2, "repeat": 0.0},
  "policy": {"width": 16, "depth": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": 16},
  "warmstart": {"clean_steps": 0, "steps": 60, "batch": 16, "lr": 0.01},
  "rollout": {"problems": 4, "group": 4, "max_prompt_tokens": 16, "max_tokens": 12},
  "evaluate": {"problems": 4, "samples": 4, "k": 2},
  "checkpoint": {"every": 1},
}

# As many of the things that could go out of step between two processes as fit into one run. Tests
# share these settings and the ones above, because compiling an update takes longer than running it.
EVERYTHING = {
  "credit.scheme": "calibrated",
  "spot.share": 0.5,
  "rewrite.source": "oracle",
  "rewrite.rows": 2,
  "reviewer.name": "noisy",
  "learner.loss": "ppo",
  "learner.updates_per_batch": 2,
  "learner.kl": 0.05,
  "learner.mask_truncated": True,
  "learner.warmup_updates": 5,
  "rollout.zero_variance": "refill",
  "rollout.refill_rounds": 2,
  "checkpoint.every": 2,
}


def settings(changes=()) -> dict:
  """The tiny settings with `changes`, a dict from full keys to values."""
  nested = copy.deepcopy(SETTINGS)
  for key, value in copy.deepcopy(dict(changes)).items():
    *sections, name = key.split(".")
    place = nested
    for section in sections:
      place = place.setdefault(section, {})
    place[name] = value
  return nested


def make_config(changes=()) -> Config:
  return config_lib.build(ConfigDict(settings(changes)))


def write_recipe(folder: pathlib.Path, changes=(), more: str = "") -> str:
  """Writes a recipe of the tiny settings; `more` is further source text. Returns its path."""
  path = folder / "recipe.py"
  path.write_text(
    "from ml_collections import ConfigDict\n\n\n"
    f"def get_config():\n  return ConfigDict({settings(changes)!r})\n\n\n{more}"
  )
  return str(path)


def start(*arguments: str, environment: dict[str, str] | None = None, cwd=None) -> subprocess.Popen:
  """The command line in a process of its own, its output in pipes."""
  command = [sys.executable, "-m", "dca_jax", *arguments]
  root = str(pathlib.Path(dca_jax.__file__).parents[1])
  path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
  return subprocess.Popen(
    command,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, "PYTHONPATH": path, **(environment or {})},
    cwd=cwd,
  )


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def wait_until(condition, process: subprocess.Popen, seconds: float = 300.0) -> None:
  """Returns as soon as `condition` holds; fails where the process ends first."""
  end = time.monotonic() + seconds
  while not condition():
    if process.poll() is not None:
      raise AssertionError(f"the process ended with {process.returncode}: {process.communicate()}")
    if time.monotonic() > end:
      process.kill()
      raise AssertionError(f"nothing for {seconds} s: {process.communicate()}")
    time.sleep(0.001)


def read_lines(workdir: pathlib.Path) -> list[dict]:
  """The finished lines of metrics.jsonl, also while it is being written."""
  path = workdir / "metrics.jsonl"
  lines = path.read_text().split("\n")[:-1] if path.exists() else []
  return [json.loads(line) for line in lines]


def saved_state(workdir: pathlib.Path, step: int | None = None) -> dict[str, np.ndarray]:
  """Every array of a checkpoint, the newest unless `step` says which, by its path in the tree."""
  with ocp.CheckpointManager(workdir / "checkpoints") as manager:
    step = manager.latest_step() if step is None else step
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # Whatever saved it.
    args = ocp.args.Composite(state=ocp.args.StandardRestore(fallback_sharding=here))
    restored = manager.restore(step, args=args)
  leaves, _ = jax.tree_util.tree_flatten_with_path(restored.state)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_arrays(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
  """Bit for bit: bytes, so that -0.0 is not 0.0."""
  assert ours.keys() == theirs.keys()
  differing = [
    k for k in ours if ours[k].dtype != theirs[k].dtype or ours[k].tobytes() != theirs[k].tobytes()
  ]
  assert not differing


def timeless(line: dict) -> dict:
  """A line of metrics.jsonl without what the clock decides."""
  return {
    k: v for k, v in line.items() if not k.startswith("seconds/") and k != "train/tokens_per_second"
  }


def assert_same_run(ours: pathlib.Path, theirs: pathlib.Path) -> None:
  """The last parameters and optimizer state, the metrics
  and the trajectories are equal bit for bit."""
  assert [timeless(line) for line in read_lines(ours)] == [
    timeless(line) for line in read_lines(theirs)
  ]
  shards = sorted(path.name for path in (theirs / "trajectories").iterdir())
  assert sorted(path.name for path in (ours / "trajectories").iterdir()) == shards
  for name in shards:
    assert (ours / "trajectories" / name).read_bytes() == (
      theirs / "trajectories" / name
    ).read_bytes(), name
  assert_same_arrays(saved_state(ours), saved_state(theirs))
