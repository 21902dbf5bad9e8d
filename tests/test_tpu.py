"""A recipe compiled for TPUs that are not there, which takes `pip install libtpu`."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
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
    ROOT / "benchmarks" / "tpu.py",
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
  assert re.findall(r"^(update|sample): \d", done.stdout, re.M) == ["update", "sample"], done.stdout


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
def test_a_process_samples_the_problems_that_it_trains_on(monkeypatch, topology, config):
  pytest.importorskip("libtpu")
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
  chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  training = mesh.make_mesh(config, chips)
  owned = []
  for devices in (training, mesh.sampler_mesh(config, training)):
    own: dict[int, set[int]] = {}
    for device, (rows,) in mesh.batch_sharding(devices).devices_indices_map((64,)).items():
      own.setdefault(device.process_index, set()).update(np.arange(64)[rows])
    owned.append(own)
  assert len(owned[0]) > 1
  assert owned[0] == owned[1]
