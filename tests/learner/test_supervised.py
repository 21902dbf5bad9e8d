"""A warm start is made once, found again by its settings, and made again where it is damaged."""

import contextlib
import importlib
import io
import shutil

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny

from dca_jax.learner.supervised import Demonstrations, cache_folder, warm_start
from dca_jax.policy import Policy
from dca_jax.run import use_compilation_cache
from dca_jax.source import source_digest
from dca_jax.tasks import Chains, ChainsConfig


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """The first warm start: its cache, its arrays, and what was printed."""
  folder, out = tmp_path_factory.mktemp("made"), io.StringIO()
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
    patch.setenv("DCA_JAX_CACHE", str(folder))
    return folder, start(), out.getvalue()


@pytest.fixture
def first(made):
  return made[1]


@pytest.fixture(autouse=True)
def cache(made, tmp_path, monkeypatch):
  """A copy of its cache, to use and to spoil."""
  shutil.copytree(made[0], tmp_path / "cache")
  monkeypatch.setenv("DCA_JAX_CACHE", str(tmp_path / "cache"))
  assert cache_folder() == tmp_path / "cache"
  return tmp_path / "cache" / "warmstart"


def start(changes=()):
  """The warm start of the tiny settings, as numpy arrays."""
  config = tiny.make_config(changes)
  task = config.task.open()
  tokenizer = task.tokenizer()
  policy = Policy(config.policy, len(tokenizer))
  params = jax.jit(lambda key: nn.unbox(policy.init_params(key)))(
    jax.random.key(config.warmstart.seed)
  )
  limits = config.rollout.max_prompt_tokens, config.rollout.max_tokens
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  demonstrations = Demonstrations(task, config.task, tokenizer, limits)
  trained = warm_start(config.warmstart, demonstrations, policy, params, here)
  leaves, _ = jax.tree_util.tree_flatten_with_path(trained)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def entries(cache):
  return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def stamps(cache):
  return {
    path: (path.stat().st_mtime_ns, path.stat().st_ino)
    for path in cache.rglob("*")
    if path.is_file()
  }


def test_a_second_call_loads_the_same_bits_without_training(made, first, cache, capsys):
  assert "warm start" in made[2]
  stamped = stamps(cache)
  assert stamped
  tiny.assert_same_arrays(start(), first)
  assert "warm start" not in capsys.readouterr().out
  assert stamps(cache) == stamped


def test_training_twice_gives_the_same_bits(first, tmp_path, monkeypatch):
  # So that it does not matter which of two processes, or which machine of a kind, made the cached
  # one.
  monkeypatch.setenv("DCA_JAX_CACHE", str(tmp_path / "another"))
  tiny.assert_same_arrays(start(), first)


def test_other_settings_are_another_entry(first, cache):
  # None of them changes the compiled step, which would take long.
  others = [
    {"warmstart.clean_steps": 10, "warmstart.steps": 50},
    {"warmstart.seed": 1},
    {"task.drop": 0.5},
  ]
  made = [first, *map(start, others)]
  assert len(entries(cache)) == 4
  for i, ours in enumerate(made):
    for theirs in made[:i]:
      assert any(ours[key].tobytes() != theirs[key].tobytes() for key in ours)


def test_settings_that_the_warm_start_does_not_read_share_an_entry(first, cache):
  tiny.assert_same_arrays(
    start({"seed": 5, "learner.lr": 0.5, "rollout.group": 8, "evaluate.k": 1}), first
  )
  assert len(entries(cache)) == 1


def test_a_damaged_entry_is_made_again_with_a_message(first, cache, capsys):
  (entry,) = entries(cache)
  for path in (cache / entry).rglob("d/*"):
    path.write_bytes(path.read_bytes()[:100])
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
  before = entries(cache)
  tiny.assert_same_arrays(start(settings), start(settings))
  assert entries(cache) == before


def test_it_learns(made):
  losses = [float(line.split("loss")[1]) for line in made[2].splitlines() if "loss" in line]
  assert losses[-1] < losses[0] / 2


# What the demonstrations are made of.


def edit(path, old, new):
  path.write_text(path.read_text().replace(old, new))


def test_an_edited_task_is_another_entry(first, cache, tmp_path, monkeypatch):
  words, task = tmp_path / "words_of_mine.py", tmp_path / "task_of_mine.py"
  words.write_text("PREFIX = ''\n")
  task.write_text(
    "import words_of_mine\nfrom dca_jax.tasks import Chains\n\nclass Mine(Chains):\n"
    "  def demonstration(self, index, mistakes):\n"
    "    return super().demonstration(index, mistakes)\n"
  )
  monkeypatch.syspath_prepend(str(tmp_path))
  mine = importlib.import_module("task_of_mine")
  held = mine.Mine(tiny.make_config().task)
  before = source_digest(held)
  assert source_digest(held) == before != source_digest(tiny.make_config().task.open())
  edit(words, "''", "'x'")
  helped = source_digest(held)
  edit(task, "super()", " super()")
  assert len({before, helped, source_digest(held)}) == 3
  monkeypatch.setattr(ChainsConfig, "open", lambda self: mine.Mine(self))
  tiny.assert_same_arrays(start(), first)  # Trained anew, on the same demonstrations.
  assert len(entries(cache)) == 2


def test_demonstrations_that_come_from_elsewhere_are_another_entry(first, cache, monkeypatch):
  chains, shift = Chains, [0]
  # As from a data file that was edited.
  monkeypatch.setattr(
    chains, "demonstration", lambda self, i, m, old=chains.demonstration: old(self, i + shift[0], m)
  )
  changed = source_digest(chains(tiny.make_config().task))
  start()
  shift[0] = 7
  assert source_digest(chains(tiny.make_config().task)) == changed
  start()
  assert len(entries(cache)) == 3


# Caches that cannot be written: a warning, and the run goes on to a clean end.


def test_a_cache_of_warm_starts_that_cannot_be_written_is_a_warning(tmp_path):
  (tmp_path / "file").write_text("")
  recipe = tiny.write_recipe(tmp_path, {"steps": 1})
  places = {"DCA_JAX_CACHE": str(tmp_path / "file" / "cache")}
  process = tiny.start(
    "train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}", environment=places
  )
  _, errors = process.communicate()
  assert process.returncode == 0, errors
  (said,) = errors.strip().splitlines()
  assert said.startswith("warning: the warm start is not kept for other runs: ")
  assert "file" in said


def test_a_cache_of_programs_that_cannot_be_written_is_a_warning(capsys, monkeypatch):
  before = jax.config.jax_compilation_cache_dir
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/dev/null/xla")
  use_compilation_cache()
  assert jax.config.jax_compilation_cache_dir is None
  assert capsys.readouterr().err.startswith("warning: compiled programs are not kept: ")
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", before)
  use_compilation_cache()
  assert jax.config.jax_compilation_cache_dir == before
  assert not capsys.readouterr().err
