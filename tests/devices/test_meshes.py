"""Whole runs do not depend on the mesh, nor on how many processes hold it, nor on a process
that is killed.

Eight devices in a process of their own, and four in each of two, against one.
"""

import hashlib
import os
import pathlib
import resource
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from jax.experimental import multihost_utils

from dca_jax import learner
from dca_jax.devices import mesh, processes
from dca_jax.loop import train
from dca_jax.policy import Policy
from dca_jax.store.checkpoints import Checkpoints
from dca_jax.store.trajectories import read_trajectories
from dca_jax.store.workdir import locate

STEPS = 10
COMMON = {
  "steps": STEPS,
  "policy.kv_heads": 2,
  "rollout.problems": 8,
  "rollout.group": 2,
  "checkpoint.every": 5,
}
VALUES = {"credit.scheme": "potential", "credit.discount": 0.5}
WEIGHTED = {"credit.scheme": "weighted", "reviewer.name": "noisy", "reviewer.sample_frac": 0.5}
RUNS = {
  "learned": (
    {**VALUES, "value.source": "learned", "rollout.zero_variance": "refill"},
    {"mesh.data": 8},
  ),
  "monte_carlo": (
    {**VALUES, "value.source": "monte_carlo", "steps": 3},
    {"mesh.data": 1, "mesh.fsdp": 8},
  ),
  "calibrated": (
    {
      **WEIGHTED,
      "credit.scheme": "calibrated",
      "spot.share": 0.5,
      "rewrite.source": "oracle",
      "steps": 4,
    },
    {"mesh.data": 8},
  ),
  "overlap": (
    {**WEIGHTED, "reviewer.overlap": 1, "learner.loss": "ppo"},
    {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "mesh.sampler": (-1, 1, 1)},
  ),
}
IN_TWO_PROCESSES = ("overlap", "monte_carlo", "calibrated")
LONG = {
  **COMMON,
  "steps": 24,
  "credit.scheme": "calibrated",
  "reviewer.name": "oracle",
  "learner.loss": "ppo",
  "rollout.carry": 4,
  "checkpoint.every": 10,
}


def config_of(name: str, changes=()):
  return tiny.make_config({**COMMON, **RUNS[name][0], **dict(changes)})


def run_all(folder: pathlib.Path, names) -> None:
  for name in names:
    train(config_of(name, RUNS[name][1]), str(folder / name), quiet=True)


def digest_of_state(workdir: pathlib.Path) -> str:
  """Restores the newest checkpoint onto the devices that there are, and says what it holds."""
  config = config_of("overlap", {"mesh.fsdp": min(2, jax.device_count())})
  devices = mesh.make_mesh(config.mesh)
  policy = Policy(config.policy, len(config.task.open().tokenizer()))
  optimizer = learner.make_optimizer(config.learner, config.steps)
  params = mesh.param_shapes(policy)
  shapes = jax.eval_shape(
    lambda params: learner.init_state(
      optimizer, params, behind=params, credit=config.scheme.begin()
    ),
    params,
  )
  shardings = mesh.state_shardings(
    devices, policy, optimizer, behind=True, credit=config.scheme.begin()
  )
  abstract = jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings
  )
  with Checkpoints(config.checkpoint, locate(str(workdir)), config.fixed()) as checkpoints:
    step, state = checkpoints.restore(abstract, "auto")
  whole = multihost_utils.process_allgather(state, tiled=True)
  return f"{step} {digest(jax.tree.leaves(whole))}"


def digest(arrays) -> str:
  return hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in arrays)).hexdigest()


def environment(devices: int) -> dict[str, str]:
  tests = pathlib.Path(__file__).parents[1]
  paths = [str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")]
  return os.environ | {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "PYTHONPATH": os.pathsep.join(paths),
  }


def start(devices: int, *command: str) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, *command],
    env=environment(devices),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def end(process: subprocess.Popen) -> str:
  out, errors = process.communicate()
  assert process.returncode == 0, errors[-3000:]
  return (
    out.splitlines()[-1] if out else ""
  )  # Before it, the library that connects processes says that it did.


def both(*arguments: str) -> list[subprocess.Popen]:
  """This file in two processes of four devices each."""
  port = str(tiny.free_port())
  return [start(4, __file__, *arguments, port, str(i)) for i in range(2)]


def pair(recipe: str, workdir: pathlib.Path) -> list[subprocess.Popen]:
  """The command line in two processes of one device each, which is quicker."""
  several = [f"--coordinator=localhost:{tiny.free_port()}", "--processes=2"]
  command = ["-m", "dca_jax", "train", f"--config={recipe}", f"--workdir={workdir}", *several]
  return [start(1, *command, f"--process={i}") for i in range(2)]


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
  # The warm start is made here first: on eight devices its parameters would be rounded differently.
  train(
    config_of("overlap", {"steps": 1}), str(tmp_path_factory.mktemp("first") / "run"), quiet=True
  )


@pytest.fixture(scope="module")
def eight(tmp_path_factory, warm):
  """The workdir of a run on eight devices, by its name."""
  folder = tmp_path_factory.mktemp("eight")

  def workdir(name: str) -> pathlib.Path:
    if not (folder / name).exists():
      end(start(8, __file__, str(folder), name))
    return folder / name

  return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory, warm):
  """The workdirs of some of them in two processes."""
  folder = tmp_path_factory.mktemp("two")
  for process in both(str(folder), ",".join(IN_TWO_PROCESSES)):
    end(process)
  return folder


def assert_same_course(ours: pathlib.Path, theirs: pathlib.Path) -> None:
  assert [line["step"] for line in tiny.read_lines(ours)] == list(
    range(len(tiny.read_lines(theirs)))
  )
  tokens = [[t.tokens for t in read_trajectories(w / "trajectories", 1)] for w in (ours, theirs)]
  assert tokens[0] == tokens[1]
  for mine, other in zip(tiny.read_lines(ours), tiny.read_lines(theirs), strict=True):
    assert {k for k in mine if "/wait_" not in k} == other.keys()
    for key in mine:
      if not key.startswith("seconds/") and key != "train/tokens_per_second":
        assert mine[key] == pytest.approx(other[key], abs=1e-5, rel=1e-4), (mine["step"], key)


@pytest.mark.parametrize(
  "name",
  ["overlap", *(pytest.param(name, marks=pytest.mark.slow) for name in RUNS if name != "overlap")],
)
def test_a_run_on_eight_devices_is_the_run_on_one(name, eight, tmp_path):
  train(config_of(name), str(tmp_path), quiet=True)
  assert_same_course(eight(name), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_TWO_PROCESSES)
def test_a_run_in_two_processes_is_the_run_in_one(name, two, eight):
  assert_same_course(two / name, eight(name))
  for line in tiny.read_lines(two / name)[1:]:
    assert min(line["seconds/wait_0"], line["seconds/wait_1"]) == 0
  assert {path.name for path in (two / name).iterdir()} == {
    path.name for path in (eight(name)).iterdir()
  }


def test_a_checkpoint_holds_the_same_on_four_devices_and_in_two_processes(eight):
  workdir = eight("overlap")
  others = [start(4, __file__, str(workdir), "digest"), *both(str(workdir), "digest")]
  said = {digest_of_state(workdir), *map(end, others)}
  assert len(said) == 1
  assert said.pop().split()[0] == str(STEPS)


def test_a_run_goes_on_with_fewer_devices(eight, tmp_path):
  changes = {**COMMON, **RUNS["overlap"][0], "steps": STEPS + 1}
  train(tiny.make_config(changes), str(eight("overlap")), quiet=True)
  train(tiny.make_config(changes), str(tmp_path), quiet=True)
  ours, theirs = tiny.read_lines(eight("overlap"))[-1], tiny.read_lines(tmp_path)[-1]
  assert ours["step"] == STEPS + 1
  assert ours["learner/policy_loss"] == pytest.approx(theirs["learner/policy_loss"], abs=1e-5)


# Processes that end.


def wait_for_step(step: int, workdir: pathlib.Path, running: list[subprocess.Popen]) -> None:
  tiny.wait_until(
    lambda: any(line["step"] >= step for line in tiny.read_lines(workdir)), running[0]
  )


@pytest.mark.slow
def test_a_pair_that_is_stopped_and_loses_a_process_is_the_uninterrupted_pair(tmp_path, warm):
  recipe, run = tiny.write_recipe(tmp_path, LONG), tmp_path / "run"
  for process in pair(recipe, tmp_path / "whole"):
    end(process)

  # SIGTERM to one of them: both save the same step.
  running = pair(recipe, run)
  wait_for_step(6, run, running)
  running[1].send_signal(signal.SIGTERM)
  said = [process.communicate()[1].strip().splitlines()[-1] for process in running]
  assert [process.returncode for process in running] == [143, 143]
  last = tiny.read_lines(run)[-1]["step"]
  assert 6 <= last <= 9
  assert said[0] == said[1]
  assert said[0].startswith(f"dca-jax: stopped by SIGTERM; step {last} is safe in ")

  # SIGKILL to one of them: the other says so and ends. (Where it is process 0, JAX ends the other
  # at once.)
  running = pair(recipe, run)
  wait_for_step(15, run, running)
  running[1].kill()
  _, errors = running[0].communicate()
  running[1].communicate()
  assert running[0].returncode == processes.LOST
  last = errors.strip().splitlines()[-1]
  assert last.startswith(
    "dca-jax: process 1 has not been heard of for 40 s; the same command again continues"
  )

  for process in pair(recipe, run):
    end(process)
  assert len(tiny.read_lines(run)) == LONG["steps"] + 1
  tiny.assert_same_run(run, tmp_path / "whole")


def test_a_mistake_ends_all_processes_with_its_words(tmp_path):
  recipe = tiny.write_recipe(tmp_path, LONG)
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "letter.txt").write_text("dear")
  running = pair(recipe, tmp_path / "run")
  errors = [process.communicate()[1].strip().splitlines()[-1] for process in running]
  assert [process.returncode for process in running] == [1, 1]
  assert errors[0].startswith("dca-jax: error: --workdir=")
  assert errors[1].startswith("dca-jax: error: process 0 has ended: --workdir=")
  assert [path.name for path in (tmp_path / "run").iterdir()] == ["letter.txt"]


def test_a_reviewer_that_is_not_there_ends_all_processes_with_the_same_words(tmp_path):
  address = f"localhost:{tiny.free_port()}"
  client = {"reviewer.client.base_url": f"http://{address}/v1", "reviewer.client.max_dollars": 0.0}
  changes = {"credit.scheme": "weighted", "reviewer.name": "openai", **client}
  running = pair(tiny.write_recipe(tmp_path, changes), tmp_path / "run")
  errors = [process.communicate()[1].strip().splitlines()[-1] for process in running]
  assert [process.returncode for process in running] == [1, 1]
  assert errors[0].startswith(f"dca-jax: error: no usable review from {address} (connection: ")
  assert errors[1].endswith(errors[0].removeprefix("dca-jax: error: "))
  assert not (tmp_path / "run" / "start").exists()


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_ends_both_with_its_words(tmp_path, warm):
  few = {"steps": 2000, "rollout.problems": 2, "policy.mlp": 4096}
  running = pair(tiny.write_recipe(tmp_path, {**LONG, **few}), tmp_path / "run")
  wait_for_step(3, tmp_path / "run", running)
  # From now on files of more than 100,000 bytes fail, which are those of a checkpoint alone.
  _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.prlimit(running[1].pid, resource.RLIMIT_FSIZE, (100_000, hard))
  errors = [process.communicate()[1].strip().splitlines() for process in running]
  assert [process.returncode for process in running] == [1, 1]
  assert errors[1][-1].startswith("dca-jax: error: could not save a checkpoint at step ")
  assert errors[0][-1].startswith(
    "dca-jax: error: process 1 has ended: could not save a checkpoint at step "
  )
  assert not [line for lines in errors for line in lines if "Traceback" in line]
  assert not [line for line in tiny.read_lines(tmp_path / "run") if line["step"] > 30]


def main(folder: str, names: str, port: str = "", process: str = "") -> None:
  if port:
    processes.connect(f"localhost:{port}", 2, int(process))
  if names == "digest":
    print(digest_of_state(pathlib.Path(folder)))
  else:
    run_all(pathlib.Path(folder), names.split(","))


if __name__ == "__main__":
  main(*sys.argv[1:])
