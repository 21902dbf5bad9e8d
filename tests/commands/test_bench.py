"""How fast the devices train: real steps, and the arithmetic of what they can do at most."""

import json

import jax
import numpy as np
import pytest
import tiny

from dca_jax.commands import bench, cli
from dca_jax.devices.kinds import KINDS, kind_of
from dca_jax.policy import PolicyConfig
from dca_jax.step import train_step

SETTINGS = {"credit.scheme": "weighted", "reviewer.name": "oracle"}


@pytest.mark.parametrize("trained", [False, True])
def test_a_recipe_is_measured(tmp_path, capsys, monkeypatch, reviewed, trained):
  begun = []

  def step(t, number):
    begun.append(jax.device_get(t.state.params))
    return train_step(t, number)

  monkeypatch.setattr(bench, "STEPS", 1)
  monkeypatch.setattr(bench, "train_step", step)
  output = tmp_path / "bench.json"
  arguments = ["bench", f"--config={tiny.write_recipe(tmp_path, SETTINGS)}"]
  arguments += [f"--output={output}", *([f"--workdir={reviewed}"] if trained else [])]
  assert cli.main(arguments) == 0
  found, said = json.loads(output.read_text()), capsys.readouterr()
  assert said.out == ""
  assert all(part in said.err for part in ("1 x cpu", "sampling", "reviewer", "update", "memory"))
  assert found["device"] == {"kind": "cpu", "count": 1}
  assert (found["sample"]["roofline_share"], found["update"]["mfu"]) == (None, None)
  assert found["versions"]["jax"] == jax.__version__
  assert found["settings"]["rollout"]["problems"] == 4
  assert min(found[part]["tokens_per_second"] for part in ("sample", "update")) > 0
  assert found["reviewer"]["wait_seconds"] > 0
  assert found["peak_memory_bytes"]["process"] > 2**20
  assert len(begun) == 2
  saved = tiny.saved_state(reviewed)
  leaves, _ = jax.tree.flatten_with_path({"params": begun[0]})
  ours = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
  same = [np.array_equal(leaf, saved[key]) for key, leaf in ours.items()]
  assert all(same) if trained else not all(same)


def test_compilation_goes_by_the_names_of_programs():
  with bench.compiling() as seconds:
    jax.jit(lambda x: x + 17.25).lower(1.0).compile()
  assert [*seconds] == ["<lambda>"]


def test_places_are_read_as_far_as_a_window_goes():
  config = PolicyConfig(depth=3, windowed=(0, 1), window=4)
  # After 3 tokens, 3 more see 4, 5 and 6 places; alone, 2 tokens see 1 and 2.
  assert bench.read(config, np.array([3, 2]), np.array([3, 0])) == 2 * (4 + 4 + 4 + 3) + 15 + 3


def test_shares_are_of_what_the_devices_can_do():
  work = bench.Work(steps=100, held=10**9, cache=4e9, flops=6e12)
  metrics = {
    "seconds/sample": 2.0,
    "seconds/update": 3.0,
    "train/generated_tokens": 500.0,
    "learner/tokens": 600.0,
  }
  kind = KINDS["v5e"]._replace(bandwidth=1e11, flops=4e12)
  found = bench.speeds([(metrics, work)], kind, 2)
  # 100 times 1 GB, and half of 4 GB, at 100 GB/s.
  assert found["sample"]["roofline_share"] == pytest.approx(1.02 / 2)
  assert found["sample"]["least_bytes_per_token_step"] == pytest.approx(1.02e9)
  assert found["sample"]["tokens_per_second"] == 250
  assert found["update"]["mfu"] == pytest.approx(0.25)
  assert found["update"]["tokens_per_second"] == 200


def test_a_device_is_known_by_what_jax_calls_it():
  assert kind_of("TPU v5 lite") is KINDS["v5e"]
  assert kind_of("NVIDIA L4") is KINDS["L4"]
  assert kind_of("NVIDIA L40S") is kind_of("cpu") is None
