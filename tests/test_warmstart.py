"""A warm start is made once, found again by its settings, and made again where it is damaged."""

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny

from dca_jax.policy import Policy
from dca_jax.task import TASKS
from dca_jax.warmstart import cache_folder, warm_start


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("DCA_JAX_CACHE", str(tmp_path / "cache"))
  assert cache_folder() == tmp_path / "cache"
  return tmp_path / "cache" / "warmstart"


def start(changes=()):
  """The warm start of the tiny settings, as numpy arrays."""
  config = tiny.make_config(changes)
  task = TASKS[config.task.name](config.task)
  tokenizer = task.tokenizer()
  policy = Policy(config.policy, len(tokenizer))
  params = nn.unbox(policy.init_params(jax.random.key(config.warmstart.seed)))
  limits = config.rollout.max_prompt_tokens, config.rollout.max_tokens
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  trained = warm_start(config.warmstart, task, config.task, tokenizer, policy, params, limits, here)
  leaves, _ = jax.tree_util.tree_flatten_with_path(trained)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def entries(cache):
  return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def stamps(cache):
  return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in cache.rglob("*") if path.is_file()}


def test_a_second_call_loads_the_same_bits_without_training(cache, capsys):
  first = start()
  assert "warm start" in capsys.readouterr().out
  made = stamps(cache)
  assert made
  second = start()
  assert "warm start" not in capsys.readouterr().out
  assert stamps(cache) == made
  tiny.assert_same_arrays(second, first)


def test_training_twice_gives_the_same_bits(cache, tmp_path, monkeypatch):
  # So that it does not matter which of two processes, or which machine of a kind, made the cached one.
  first = start()
  monkeypatch.setenv("DCA_JAX_CACHE", str(tmp_path / "another"))
  tiny.assert_same_arrays(start(), first)


def test_other_settings_are_another_entry(cache):
  # None of them changes the compiled step, which would take long.
  others = [{"warmstart.clean_steps": 10, "warmstart.steps": 50}, {"warmstart.seed": 1}, {"task.drop": 0.5}]
  made = [start(), *map(start, others)]
  assert len(entries(cache)) == 4
  for i, ours in enumerate(made):
    for theirs in made[:i]:
      assert any(ours[key].tobytes() != theirs[key].tobytes() for key in ours)


def test_settings_that_the_warm_start_does_not_read_share_an_entry(cache):
  first = start()
  tiny.assert_same_arrays(start({"seed": 5, "learner.lr": 0.5, "rollout.group": 8, "evaluate.k": 1}), first)
  assert len(entries(cache)) == 1


def test_a_damaged_entry_is_made_again_with_a_message(cache, capsys):
  first = start()
  (entry,) = entries(cache)
  for path in (cache / entry).rglob("d/*"):
    path.write_bytes(path.read_bytes()[:100])
  capsys.readouterr()
  tiny.assert_same_arrays(start(), first)
  said = capsys.readouterr()
  assert entry in said.err
  assert "unreadable" in said.err
  assert "warm start" in said.out
  # And the new one is whole.
  tiny.assert_same_arrays(start(), first)
  assert not capsys.readouterr().err
  assert entries(cache) == [entry]


def test_no_steps_leave_the_policy_as_it_was(cache):
  settings = {"warmstart.steps": 0, "warmstart.batch": 32, "warmstart.lr": 6e-3}
  tiny.assert_same_arrays(start(settings), start(settings))
  assert entries(cache) == []


def test_it_learns(capsys):
  start()
  losses = [float(line.split("loss")[1]) for line in capsys.readouterr().out.splitlines() if "loss" in line]
  assert losses[-1] < losses[0] / 2
