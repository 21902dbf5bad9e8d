"""Runs on free text: a tiny policy that begins from nothing, a real tokenizer,
and data from TFDS and JSONL."""

import dataclasses
import json

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny
import words

from dca_jax import run as run_module
from dca_jax.commands.review import rereview
from dca_jax.config import ConfigError
from dca_jax.devices import mesh
from dca_jax.errors import Terminated, UserError
from dca_jax.loop import train
from dca_jax.policy import Policy
from dca_jax.rollout import Sampler, collect
from dca_jax.run import check_data
from dca_jax.store.trajectories import read_trajectories
from dca_jax.tasks.tokenizer import end_ids, text_of, token_bytes

CHANGES = {
  "steps": 2,
  "warmstart": {"clean_steps": 0, "steps": 0},
  "rollout.max_prompt_tokens": 64,
  "rollout.max_tokens": 16,
  "rollout.temperature": 0.3,
  "task.steps": r"\w",
  "task.min_step_chars": 1,
}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
  """What makes the tiny settings a free-text run on a data set of TFDS."""
  folder = tmp_path_factory.mktemp("given")
  return {
    "task": {
      "name": "tfds",
      "dataset": "gsm8k",
      "data_dir": words.build_gsm8k(folder / "data"),
      "tokenizer": words.save_tokenizer(folder / "tokenizer", ends=[2, 1]),
    },
    **CHANGES,
  }


@pytest.fixture(scope="module")
def run(given, tmp_path_factory):
  """A run whose prefix values come from continuations, so that all that samples is in it."""
  workdir = tmp_path_factory.mktemp("run")
  config = tiny.make_config(
    given | {"credit.scheme": "potential", "value.source": "monte_carlo", "rollout.stop": ("s",)}
  )
  train(config, str(workdir), quiet=True)
  return workdir, config


def test_a_run_on_free_text(run):
  workdir, config = run
  lines = tiny.read_lines(workdir)
  assert [line["step"] for line in lines] == [0, 1, 2]
  assert "eval/greedy" in lines[0]
  assert "eval/greedy" in lines[2]
  assert [line.get("train/epoch") for line in lines] == [None, 4 / 16, 8 / 16]
  asked = {p["question"] for p in words.PROBLEMS[:16]}
  records = [t for step in (1, 2) for t in read_trajectories(workdir / "trajectories", step)]
  assert len({t.problem.prompt for t in records}) == 8  # No problem comes twice in an epoch.
  assert {t.problem.prompt for t in records} < asked
  assert all(t.problem.answer.isdigit() for t in records)
  tokenizer = config.task.open().tokenizer()
  ends = end_ids(tokenizer)
  assert ends == (1, 2)
  several = 0
  for t in records:
    assert [i for s in t.steps for i in range(s.start, s.end)] == list(range(len(t.tokens)))
    assert "".join(s.text for s in t.steps) == text_of(tokenizer, t.tokens)
    assert all(s.text.strip() for s in t.steps) or len(t.steps) == 1
    assert len(t.values) == len(t.steps)
    assert all(0 <= value <= 1 for value in t.values)
    # It ends with an end token or with its first `s`, or else it was cut off.
    pieces = token_bytes(tokenizer, t.tokens)
    ended = t.tokens[-1] in ends or b"s" in pieces[-1]
    assert not any(i in ends for i in t.tokens[:-1])
    assert not any(b"s" in piece for piece in pieces[:-1])
    assert ended != t.outcome.truncated
    several += len(t.steps) > 1
  assert several
  assert any(b"s" in token_bytes(tokenizer, t.tokens)[-1] for t in records)


def test_it_resumes(run):
  workdir, config = run
  before = tiny.read_lines(workdir)
  train(config, str(workdir), quiet=True)
  assert tiny.read_lines(workdir) == before


def test_a_run_on_one_file(given, tmp_path):
  path = words.write_jsonl(tmp_path / "all.jsonl")
  task = {
    "name": "jsonl",
    "path": path,
    "heldout_fraction": 0.3,
    "tokenizer": given["task"]["tokenizer"],
  }
  config = tiny.make_config(given | {"task": task, "evaluate.problems": 2, "evaluate.every": 1})
  for workdir, steps in (("whole", 2), ("resumed", 1), ("resumed", 2)):
    train(dataclasses.replace(config, steps=steps), str(tmp_path / workdir), quiet=True)
  tiny.assert_same_run(tmp_path / "whole", tmp_path / "resumed")
  records = [
    t for step in (1, 2) for t in read_trajectories(tmp_path / "whole" / "trajectories", step)
  ]
  data = config.task.open()
  held_out = {data.problem("heldout", i).prompt for i in range(data.sizes["heldout"])}
  assert {t.problem.prompt for t in records} <= {p["question"] for p in words.PROBLEMS} - held_out


@pytest.mark.parametrize(("shared", "said"), [(0, 0.0), (1, 0.25), (4, 1.0)])
def test_held_out_problems_that_are_trained_on_are_counted(given, tmp_path, shared, said):
  train_path = words.write_jsonl(tmp_path / "train.jsonl", words.PROBLEMS[:8])
  # White space makes no other question of one.
  copies = [{**row, "question": f" {row['question']}\n"} for row in words.PROBLEMS[:shared]]
  heldout = [
    *copies,
    *words.PROBLEMS[8 : 12 - shared],
    words.PROBLEMS[3],
  ]  # The last is not evaluated.
  task = {"name": "jsonl", "path": train_path, "tokenizer": given["task"]["tokenizer"]}
  task["heldout_path"] = words.write_jsonl(tmp_path / "heldout.jsonl", heldout)
  config = tiny.make_config(given | {"task": task, "evaluate.problems": 4})
  data = config.task.open()
  assert check_data(config, data, data.tokenizer(), 10_000) == {"data/heldout_in_training": said}


def test_a_reviewer_without_labels_reads_the_run_again(run):
  workdir, _ = run
  assert "32 completions: 32 ok" in rereview(str(workdir / "trajectories"), "lexical", 100, [])
  with pytest.raises(ConfigError, match=r"reviewer\.name: asks oracle, which reads step labels"):
    rereview(str(workdir / "trajectories"), "oracle", 100, [])


OWN = """
import os, pathlib, signal, time

def crashing(row, completion):
  kind = len(completion) % 3
  if kind == 0:
    os._exit(1)
  return {"reward": kind - 1, "length": len(completion)}

def fatal(row, completion):
  os._exit(1)

def stopping(row, completion):
  asked = pathlib.Path(__file__).with_name("asked")
  if row["question"].startswith("Tom has 1") and not asked.exists():
    asked.touch()
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
  return len(completion) % 2
"""


@pytest.fixture
def with_own(given, tmp_path, monkeypatch):
  """The settings with a verifier of the user's; many completions end, so that it is asked."""
  (tmp_path / "run_verifier.py").write_text(OWN)
  monkeypatch.syspath_prepend(tmp_path)

  def with_own(function, **changes):
    return tiny.make_config(
      given
      | {"rollout.stop": tuple("aeinost"), "task.verifier": f"run_verifier:{function}"}
      | changes
    )

  return with_own


def test_a_verifier_that_crashes_on_some_completions_keeps_them_out_of_training(with_own, tmp_path):
  config = with_own("crashing", **{"evaluate.every": 1})
  for workdir, steps in (("whole", 2), ("resumed", 1), ("resumed", 2)):
    train(dataclasses.replace(config, steps=steps), str(tmp_path / workdir), quiet=True)
  tiny.assert_same_run(tmp_path / "whole", tmp_path / "resumed")
  for line in tiny.read_lines(tmp_path / "whole")[1:]:
    records = list(read_trajectories(tmp_path / "whole" / "trajectories", line["step"]))
    groups: dict[int, list] = {}
    for t in records:
      groups.setdefault(t.problem.id, []).append(t)
    unjudged = [t for t in records if not t.outcome.judged]
    assert unjudged
    assert line["train/unjudged"] == len(unjudged) / len(records)
    lengths = [t.outcome.parts["length"] for t in records if t.outcome.parts]
    assert line["verifier/length"] == pytest.approx(np.mean(lengths))
    assert not any(t.trained or t.outcome.correct for t in unjudged)
    assert all(t.advantage == pytest.approx(0, abs=1e-6) for t in unjudged)
    for group in groups.values():  # The baseline is what the others make it.
      mean = np.mean([t.outcome.reward for t in group if t.outcome.judged] or [0.0])
      for t in group:
        assert t.advantage == pytest.approx(4 / 3 * (t.outcome.reward - mean), abs=1e-6)
  first = tiny.read_lines(tmp_path / "whole")[0]
  assert "eval/pass@2" in first
  assert not any("maj@" in key for key in first)


def test_a_verifier_that_never_gives_a_verdict_ends_the_run_with_a_sentence(with_own, tmp_path):
  with pytest.raises(
    UserError,
    match=r"run_verifier:fatal: no verdict on 16 completions in a row: it ended its process",
  ):
    train(with_own("fatal"), str(tmp_path / "run"), quiet=True)


def test_sigterm_is_served_while_a_verifier_hangs(with_own, tmp_path):
  config = with_own("stopping", **{"task.verifier_seconds": 2.0})
  with pytest.raises(Terminated, match="stopped by SIGTERM"):
    train(config, str(tmp_path / "run"), quiet=True)
  train(config, str(tmp_path / "run"), quiet=True)
  assert [line["step"] for line in tiny.read_lines(tmp_path / "run")] == [0, 1, 2]


def test_stop_strings_change_where_a_completion_ends_and_nothing_else(given):
  config = tiny.make_config(given)
  task = config.task.open()
  tokenizer = task.tokenizer()
  policy = Policy(config.policy, len(tokenizer), mesh.make_mesh(config.mesh))
  params = nn.unbox(jax.jit(policy.init_params)(jax.random.key(0)))

  def draw(changes):
    rollout = tiny.make_config(given | changes).rollout
    engine = config.engine.open(policy, rollout, tokenizer)
    own = np.arange(rollout.problems)
    sampler = Sampler(engine, rollout, task, tokenizer, policy.rows, own)
    return collect(sampler, 0, 1, params)

  plain, stopped = draw({}), draw({"rollout.stop": ("s", "#")})
  kept = stopped.sampled_BxT
  assert not (kept & ~plain.sampled_BxT).any()
  np.testing.assert_array_equal(plain.tokens_BxT[kept], stopped.tokens_BxT[kept])
  np.testing.assert_array_equal(plain.logprobs_BxT[kept], stopped.logprobs_BxT[kept])
  shorter = kept.sum(1) < plain.sampled_BxT.sum(1)
  assert 0 < shorter.sum() < len(shorter)
  assert not stopped.truncated_B[shorter].any()
  np.testing.assert_array_equal(stopped.truncated_B[~shorter], plain.truncated_B[~shorter])


# What is refused before there is a workdir, so before any device time.


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    (
      {"task.answer": "solution"},
      r"task\.answer: gsm8k, split 'train', example \d+: the field 'solution' must be",
    ),
    (
      {"task.answer": "question", "task.verifier": "choice"},
      r"gsm8k, split 'train', example \d+: .*'choice' finds no",
    ),
    ({"task.verifier": "nowhere:f"}, r"task\.verifier: cannot import nowhere:f"),
    ({"task.heldout_split": "dev"}, r"task\.heldout_split: cannot open 'dev'"),
    ({"rollout.max_prompt_tokens": 20}, r"rollout\.max_prompt_tokens allows 1 to 20: .*'Tom has"),
    (
      {"task.thinking_end": "<|start|>"},
      r"task\.thinking_end: '<\|start\|>' is no text for this tokenizer",
    ),
    (
      {"rollout.stop": ("Tom", "<|end|>")},
      r"rollout\.stop .*'<\|end\|>' is no text for this tokenizer",
    ),
    ({"evaluate.problems": 9}, r"evaluate\.problems: must not exceed the 8 held-out problems"),
  ],
)
def test_bad_input_is_refused_first(given, tmp_path, monkeypatch, changes, said):
  monkeypatch.setattr(
    run_module.mesh, "make_mesh", lambda config: pytest.fail("devices were asked for")
  )
  with pytest.raises(UserError, match=said):
    train(tiny.make_config(given | changes), str(tmp_path / "run"), quiet=True)
  assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_an_end_is_refused_first(given, tmp_path):
  changes = {"task.tokenizer": words.save_tokenizer(tmp_path / "endless", eos=None)}
  with pytest.raises(UserError, match="no end token"):
    train(tiny.make_config(given | changes), str(tmp_path / "run"), quiet=True)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"task.tokenizer": ""}, r"task\.tokenizer: must be given"),
    (
      {"warmstart.steps": 3},
      r"warmstart\.steps: must be 0, because task 'tfds' has no demonstrations",
    ),
    ({"warmstart.clean_steps": 3}, r"warmstart\.clean_steps: must be 0"),
    (
      {"reviewer.name": "oracle", "credit.scheme": "weighted"},
      r"reviewer\.name: asks oracle, which reads step labels",
    ),
    ({"reviewer.name": "noisy", "credit.scheme": "weighted"}, r"reviewer\.name: asks noisy"),
    (
      {
        "reviewer.name": "panel",
        "reviewer.panel": ("lexical", "stale"),
        "credit.scheme": "weighted",
      },
      r"reviewer\.name: asks stale",
    ),
    (
      {"reviewer.name": "lexical", "reviewer.escalate": "oracle", "credit.scheme": "weighted"},
      r"reviewer\.name: asks oracle",
    ),
    ({"task.lines": 3}, r"task\.lines: has no effect, because task\.name is 'tfds'"),
    ({"task.data_set": "a"}, r"task\.data_set: no such key; did you mean task\.dataset"),
    ({"task.path": "a.jsonl"}, r"task\.path: has no effect, because task\.name is 'tfds'"),
    (
      {"task.heldout_fraction": 0.1},
      r"task\.heldout_fraction: has no effect, because task\.name is 'tfds'",
    ),
    (
      {"task.chat_template": False, "task.system_prompt": "x"},
      r"task\.system_prompt: has no effect",
    ),
    (
      {"task.name": "text"},
      r"task\.name: must be one of chains, tfds, jsonl, hub, openenv, reasoning_gym, or"
      r" MODULE:CLASS, not 'text'",
    ),
    ({"rollout.stop": ("",)}, r"rollout\.stop: must be strings"),
    ({"rollout.stop": (3,)}, r"rollout\.stop: must be strings"),
  ],
)
def test_settings_that_free_text_does_not_have(given, changes, said):
  with pytest.raises(ConfigError, match=said):
    tiny.make_config(given | changes)


def test_controls_that_need_no_labels_may_review(given):
  for name in ("random", "lexical", "thief", "suffix", "silent"):
    tiny.make_config(given | {"reviewer.name": name, "credit.scheme": "weighted"})


def test_the_settings_of_a_run_are_whole(run):
  """The file says which tokenizer it was, and can be built again."""
  workdir, config = run
  saved = json.loads((workdir / "config.json").read_text())
  assert saved["task"]["tokenizer"] == config.task.tokenizer
  assert saved["task"]["dataset"] == "gsm8k"
  assert "lines" not in saved["task"]
