"""A recipe compiled for TPUs that are not there, which takes `pip install libtpu`."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import pytest
from jax.experimental import topologies

from dca_jax.devices import mesh
from dca_jax.devices.mesh import MeshConfig

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_a_recipe_compiles_for_a_slice():
  pytest.importorskip("libtpu")
  command = [
    sys.executable,
    ROOT / "evidence" / "benchmarks" / "tpu.py",
    f"--config={ROOT / 'configs' / 'gsm8k_qwen3.py'}",
  ]
  model = ROOT / "tests" / "policy" / "reference" / "qwen3"
  changes = [
    "--config.rollout.max_tokens=300",
    f"--config.policy.pretrained={model}",
    "--config.mesh.fsdp=4",
  ]
  path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
  done = subprocess.run(
    [*command, "--topology=v5e:2x2", *changes, "--config.mesh.sampler=(4,1,1)"],
    env=os.environ | {"PYTHONPATH": path},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert re.findall(r"^(update|decode): \d", done.stdout, re.M) == ["update", "decode"], done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
  ("topology", "config"),
  [
    ("v5e:2x4", MeshConfig(data=1, fsdp=8, sampler=(8, 1, 1))),
    ("v6e:4x4", MeshConfig(data=1, fsdp=16, sampler=(4, 1, 4))),
    ("v6e:4x4", MeshConfig(data=2, fsdp=8, sampler=(8, 1, 2))),
    ("v5p:2x2x4", MeshConfig(data=1, fsdp=16, sampler=(4, 1, 4))),
  ],
  ids=str,
)
def test_every_process_samples_with_a_whole_copy_of_the_parameters(monkeypatch, topology, config):
  pytest.importorskip("libtpu")
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
  chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  training = mesh.make_mesh(config, chips)
  for chosen in (config, dataclasses.replace(config, sampler=())):
    sampling = mesh.sampler_mesh(chosen, training)
    # Parameters are laid out anew without leaving the order of devices.
    assert sampling.devices.ravel().tolist() == training.devices.ravel().tolist()
    owners = [{device.process_index for device in copy.flat} for copy in sampling.devices]
    assert all(len(owner) == 1 for owner in owners)
    assert len(set.union(*owners)) > 1
