"""A recipe compiled for TPUs that are not there, which takes `pip install libtpu`."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_a_recipe_compiles_for_a_slice():
  pytest.importorskip("libtpu")
  command = [sys.executable, ROOT / "benchmarks" / "tpu.py", f"--config={ROOT / 'configs' / 'gsm8k_qwen3.py'}"]
  model = ROOT / "tests" / "policy" / "reference" / "qwen3"
  changes = ["--config.rollout.max_tokens=300", f"--config.policy.pretrained={model}", "--config.mesh.fsdp=4"]
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
