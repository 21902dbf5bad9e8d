"""Whole runs do not depend on the mesh: eight devices, in a process of their own, against one."""

import os
import pathlib
import subprocess
import sys

import pytest
import tiny

from dca_jax.rollout import read_trajectories
from dca_jax.train import train

STEPS = 3
COMMON = {"steps": STEPS, "policy.kv_heads": 2, "rollout.problems": 8, "rollout.group": 2}
VALUES = {"credit.scheme": "potential", "credit.discount": 0.5}
RUNS = {
  "overlap": (
    {"credit.scheme": "weighted", "reviewer.name": "oracle", "reviewer.overlap": 1, "learner.loss": "ppo"},
    {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
  ),
  "learned": ({**VALUES, "value.source": "learned"}, {"mesh.data": 8}),
  "monte_carlo": ({**VALUES, "value.source": "monte_carlo"}, {"mesh.data": 1, "mesh.fsdp": 8}),
  "refill": ({"rollout.zero_variance": "refill", "rollout.refill_rounds": 2}, {"mesh.data": 4, "mesh.fsdp": 2}),
}


def on_eight_devices(folder: pathlib.Path) -> None:
  for name, (changes, mesh) in RUNS.items():
    train(tiny.make_config({**COMMON, **changes, **mesh}), str(folder / name), quiet=True)


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
  """The workdirs of all runs on eight devices."""
  folder = tmp_path_factory.mktemp("eight")
  # The warm start is made here first: on eight devices its parameters would be rounded differently.
  train(tiny.make_config({**COMMON, "steps": 1}), str(folder / "first"), quiet=True)
  paths = [str(pathlib.Path(__file__).parents[1]), str(pathlib.Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
  environment = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "PYTHONPATH": os.pathsep.join(paths),
  }
  command = [sys.executable, __file__, str(folder)]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_eight_devices_is_the_run_on_one(name, eight, tmp_path):
  changes, _ = RUNS[name]
  train(tiny.make_config({**COMMON, **changes}), str(tmp_path), quiet=True)
  ours, theirs = tiny.read_lines(eight / name), tiny.read_lines(tmp_path)
  assert [line["step"] for line in ours] == list(range(STEPS + 1))
  for step in range(1, STEPS + 1):
    tokens = [[t.tokens for t in read_trajectories(w / "trajectories", step)] for w in (eight / name, tmp_path)]
    assert tokens[0] == tokens[1]
  for mine, other in zip(ours[1:], theirs[1:], strict=True):
    for key in ("learner/policy_loss", "learner/entropy", "learner/kl", "learner/grad_norm"):
      assert mine[key] == pytest.approx(other[key], abs=1e-5), key


def test_a_run_goes_on_with_fewer_devices(eight, tmp_path):
  changes, _ = RUNS["learned"]
  train(tiny.make_config({**COMMON, **changes, "steps": STEPS + 1}), str(eight / "learned"), quiet=True)
  train(tiny.make_config({**COMMON, **changes, "steps": STEPS + 1}), str(tmp_path), quiet=True)
  ours, theirs = tiny.read_lines(eight / "learned")[-1], tiny.read_lines(tmp_path)[-1]
  assert ours["step"] == STEPS + 1
  assert ours["learner/policy_loss"] == pytest.approx(theirs["learner/policy_loss"], abs=1e-5)


if __name__ == "__main__":
  on_eight_devices(pathlib.Path(sys.argv[1]))
