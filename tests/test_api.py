"""From Python: what `train` gives back, how it is stopped, and objects in the place of names."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

import dca_jax
from dca_jax.policy import Policy, pretrained, token_logprobs
from dca_jax.rollout import encode_prompts
from dca_jax.store.checkpoints import read_params
from dca_jax.store.workdir import locate
from dca_jax.tasks.tokenizer import id_count


@pytest.fixture(scope="module")
def run_and_told(tmp_path_factory):
  """A run, and what its callback was called with."""
  told = []
  run = dca_jax.train(
    tiny.settings(),
    tmp_path_factory.mktemp("run"),
    quiet=True,
    callbacks=[lambda *given: told.append(given)],
  )
  return run, told


@pytest.fixture(scope="module")
def run(run_and_told):
  return run_and_told[0]


@pytest.fixture(scope="module")
def heldout(run):
  task = run.config.task.open()
  return task, [task.problem("heldout", i) for i in range(run.config.evaluate.problems)]


def test_metrics_are_those_that_were_recorded(run, run_and_told):
  assert run.metrics == tiny.read_lines(pathlib.Path(run.workdir))
  steps, accuracies = run.metrics.column("train/accuracy")
  assert steps == [1, 2, 3]
  assert accuracies == [row["train/accuracy"] for row in run.metrics[1:]]
  assert run.metrics.column("eval/greedy")[0] == [0, 3]
  assert run.metrics.column("no/such") == ([], [])
  assert {"train/accuracy", "eval/greedy"} < {*run.metrics.names}
  # The callback is called once a step, with the run and what the step recorded.
  assert [(given, step) for given, step, _ in run_and_told[1]] == [(run, 1), (run, 2), (run, 3)]
  for row, (_, step, metrics) in zip(run.metrics[1:], run_and_told[1], strict=True):
    assert row == {"step": step, **metrics}


def test_greedy_answers_are_those_of_the_evaluation(run, heldout):
  task, problems = heldout
  prompts = [problem.prompt for problem in problems]
  # Four of each, as a batch of training has them: no other program is compiled.
  answers = run.policy.sample(prompts, samples=4, greedy=True)
  assert all(len(set(own)) == 1 for own in answers)
  right = [
    task.verify(p, own[0], not own[0].endswith("$")).correct
    for p, own in zip(problems, answers, strict=True)
  ]
  assert np.mean(right) == run.metrics[-1]["eval/greedy"]
  sampled = run.policy.sample(prompts, samples=4)
  assert sampled == run.policy.sample(prompts, samples=4)
  assert sampled != run.policy.sample(prompts, samples=4, seed=1)


def test_score_is_what_the_learner_would_say(run, heldout):
  task, problems = heldout
  completion = "a1;b0;#0$"
  tokenizer = task.tokenizer()
  ids = id_count(tokenizer)
  policy = Policy(pretrained.resolve(run.config.policy, ids), ids)
  _, params = read_params(locate(run.workdir), None)
  rollout = run.config.rollout
  prompt = encode_prompts(tokenizer, problems[:1], rollout.max_prompt_tokens, policy.rows)
  tokens = jnp.array([tokenizer(completion, add_special_tokens=False)["input_ids"]])
  hidden = policy.completion_hidden(params, *prompt, tokens)
  expected, _ = token_logprobs(hidden, policy.head(params), tokens, rollout.sampling)
  scored = run.policy.score(problems[0].prompt, completion)
  assert [piece for piece, _ in scored] == list(completion)
  np.testing.assert_allclose([x for _, x in scored], np.asarray(expected[0]), atol=1e-5)
  for refused in ("", "a" * (rollout.max_tokens + 1)):
    with pytest.raises(dca_jax.UserError, match=r"rollout\.max_tokens allows 1 to 12"):
      run.policy.score(problems[0].prompt, refused)


def test_load_and_evaluate_from_the_workdir(run):
  again = dca_jax.load(run.workdir)
  assert again == run
  scores = dca_jax.evaluate(run.workdir)
  assert scores["greedy"].value == run.metrics[-1]["eval/greedy"]
  assert scores["sampled"].low == run.metrics[-1]["eval/sampled_low"]
  with pytest.raises(dca_jax.UserError, match="holds no run"):
    dca_jax.load(os.path.join(run.workdir, "elsewhere"))


def test_a_second_run_equals_the_first(run, tmp_path):
  """Stopped in a callback, and in the same process."""

  def stop(run, step, metrics):
    if step == 2:
      raise KeyboardInterrupt

  recipe = tiny.write_recipe(tmp_path)
  with pytest.raises(KeyboardInterrupt):
    dca_jax.train(recipe, tmp_path / "run", quiet=True, callbacks=[stop])
  told = []
  again = dca_jax.train(
    dca_jax.load(tmp_path / "run").config,
    tmp_path / "run",
    quiet=True,
    callbacks=[lambda run, step, metrics: told.append(step)],
  )
  assert told == [3]
  assert again.config == run.config
  tiny.assert_same_run(pathlib.Path(again.workdir), pathlib.Path(run.workdir))


SCRIPT = """
import dataclasses, os, signal, sys
import dca_jax
import tiny
from dca_jax.tasks import ChainsConfig

signal.signal(signal.SIGINT, signal.default_int_handler)

@dataclasses.dataclass(frozen=True)
class Own(ChainsConfig):
  pass

def interrupt(run, step, metrics):
  if step == 2:
    os.kill(os.getpid(), signal.SIGINT)

own = Own(**{"name": "", **tiny.SETTINGS["task"]})
for callbacks in ([interrupt], []):
  try:
    settings = tiny.settings({"checkpoint.every": 100})
    run = dca_jax.train(settings, sys.argv[1], quiet=True, task=own, callbacks=callbacks)
    print("finished", dca_jax.load(sys.argv[1]).config.task == run.config.task)
  except KeyboardInterrupt as error:
    print(error)
"""


def test_ctrl_c_in_a_script_that_defines_its_task(run, tmp_path):
  """It goes on in the same process, ends as an uninterrupted run does, and is refused elsewhere."""
  (tmp_path / "script.py").write_text(SCRIPT)
  root = pathlib.Path(dca_jax.__file__).parents[1]
  done = subprocess.run(
    [sys.executable, tmp_path / "script.py", tmp_path / "run"],
    env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"},
    capture_output=True,
    text=True,
  )
  said = done.stdout.splitlines()
  assert len(said) >= 2, done.stderr
  assert said[-2].startswith("stopped by Ctrl-C; step 2 is safe in")
  assert said[-1] == "finished True"
  tiny.assert_same_run(tmp_path / "run", pathlib.Path(run.workdir))
  with pytest.raises(
    dca_jax.UserError, match=r"task\.name: cannot import __main__:Own .* a notebook"
  ):
    dca_jax.load(tmp_path / "run")


BROUGHT = """
import dataclasses
from dca_jax.credit import Weighted
from dca_jax.tasks import ChainsConfig

@dataclasses.dataclass(frozen=True)
class Task(ChainsConfig):
  extra: int = 0

@dataclasses.dataclass(frozen=True)
class Scheme(Weighted):
  extra: float = 1.0
"""


@pytest.fixture
def brought(tmp_path, monkeypatch):
  (tmp_path / "brought.py").write_text(BROUGHT)
  monkeypatch.syspath_prepend(str(tmp_path))
  import brought  # type: ignore[import-not-found]

  yield brought
  del sys.modules["brought"]


def test_objects_are_recorded_by_name_and_loaded_again(brought, tmp_path, monkeypatch):
  task = brought.Task(**{"name": "", **tiny.SETTINGS["task"]}, extra=3)
  scheme = brought.Scheme(extra=0.5)
  given = ConfigDict(tiny.settings({"steps": 1, "reviewer.name": "oracle", "task.name": "chains"}))
  run = dca_jax.train(given, tmp_path / "run", quiet=True, task=task, scheme=scheme)
  assert run.config.task == dataclasses.replace(task, name="brought:Task")
  assert run.config.credit == dataclasses.replace(scheme, scheme="brought:Scheme")
  assert run.metrics[-1]["review/ok"] > 0
  assert dca_jax.load(run.workdir) == run
  # Given once more, as objects or as a config, it is the same run.
  assert dca_jax.train(run.config, run.workdir, quiet=True, task=run.config.task) == run

  monkeypatch.undo()
  monkeypatch.delitem(sys.modules, "brought")
  with pytest.raises(dca_jax.UserError, match=r"cannot import brought:Task .* PYTHONPATH"):
    dca_jax.load(run.workdir)
  monkeypatch.setitem(sys.modules, "brought", brought)


@pytest.mark.parametrize(
  ("objects", "why"),
  [
    ({"task": dca_jax.Config()}, "task: must be an object of a class that extends TaskConfig"),
    ({"scheme": "weighted"}, "scheme: must be an object of a class that extends Scheme"),
  ],
)
def test_what_is_no_such_object_is_refused(tmp_path, objects, why):
  with pytest.raises(dca_jax.UserError, match=why):
    dca_jax.train(tiny.settings(), tmp_path / "run", **objects)
  assert not (tmp_path / "run").exists()


def test_a_class_that_cannot_be_found_again_is_refused(tmp_path):
  @dataclasses.dataclass(frozen=True)
  class Local(dca_jax.TaskConfig):
    pass

  with pytest.raises(
    dca_jax.UserError, match=r"task\.name: cannot import .*Local .* within a function"
  ):
    dca_jax.train(tiny.settings(), tmp_path / "run", task=Local())
  assert not (tmp_path / "run").exists()


def test_public_names_are_there():
  for name in dca_jax.__all__:
    assert not isinstance(getattr(dca_jax, name), types.ModuleType), name
  assert {*dca_jax.__all__} < {*dir(dca_jax)}
  with pytest.raises(AttributeError, match="no attribute 'trian'"):
    dca_jax.trian  # noqa: B018
