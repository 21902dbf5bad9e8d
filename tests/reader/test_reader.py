"""A trained reviewer: fitted by the command, read again, and in a run."""

import contextlib
import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

import dca_jax
from dca_jax import reader
from dca_jax.commands.fit_reviewer import From, fit_reviewer, with_faults
from dca_jax.config import ConfigError
from dca_jax.episode import ROLES
from dca_jax.reader import FitConfig, Labelled
from dca_jax.reader.texts import encoded, stacked, targets
from dca_jax.review import REVIEWERS, Request, Review
from dca_jax.review.builtin import true_reviews
from dca_jax.review.trained import InOneThread
from dca_jax.review.types import Truth
from dca_jax.tasks.chains import Chains, ChainsConfig
from tests import tiny

TASK = Chains(ChainsConfig(lines=2, modulus=2))
HOW = FitConfig(epochs=30, batch=64, lr=1e-2)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
  """The folder of a reviewer, and what the command said."""
  folder = tmp_path_factory.mktemp("reader")
  recipe = tiny.write_recipe(folder)
  workdir = folder / "fitted"
  return workdir, fit_reviewer(From("oracle", recipe, limit=320), str(workdir), [], HOW)


def requests(count: int) -> list[Request]:
  """Answers with mistakes, as the warm start has them."""
  made = []
  for i in range(count):
    prompt, text = TASK.demonstration(i, mistakes=True)
    steps = tuple(re.findall(r"[^;]+;?", text))
    won = TASK.verify(TASK.problem("demonstrations", i), text, False).correct
    made.append(Request(f"1/{i}/0", prompt, steps, won, False))
  return made


def test_it_learns_the_roles_of_steps(fitted):
  folder, said = fitted
  asked = requests(64)
  true = [review.roles for review in true_reviews(Truth.of(TASK), asked)]
  reviews = reader.load(str(folder)).reviews(asked)
  pairs = [
    pair for t, r in zip(true, reviews, strict=True) for pair in zip(t, r.roles, strict=True)
  ]
  commonest = max(sum(t == role for t, _ in pairs) for role in ROLES) / len(pairs)
  right = np.mean([t == said for t, said in pairs])
  assert right > commonest + 0.15
  assert "roles" in said
  assert f"--config.reviewer.path={folder}" in said
  reasons = [why for r in reviews for why in r.reasons if why]
  assert reasons
  assert all(why.startswith("should have been ") for why in reasons)


def test_its_values_know_nothing_of_what_comes_later(fitted):
  read = reader.load(str(fitted[0])).reviews
  for request in requests(8):
    first, other = request.steps[0], "b1;" if request.steps[1] != "b1;" else "b0;"
    changed = dataclasses.replace(
      request, steps=(first, other, *request.steps[2:]), correct=not request.correct
    )
    one, two = read([request, request])[0], read([changed, changed])[0]
    assert one.values[:2] == two.values[:2]
    assert one.weights != two.weights


def test_what_is_too_long_is_no_review_and_harms_no_other(fitted):
  read = reader.load(str(fitted[0])).reviews
  good = requests(2)
  long = dataclasses.replace(good[0], steps=good[0].steps * 50)
  empty = dataclasses.replace(good[0], steps=())
  reviews = read([long, good[0], empty, good[1]])
  assert [r.status for r in reviews] == ["invalid", "ok", "invalid", "ok"]
  assert reviews[1::2] == read(good)
  assert read([]) == []
  assert all(r.checked(len(q.steps)).status == "ok" for r, q in zip(read(good), good, strict=True))


@pytest.mark.slow
def test_a_run_with_refits_goes_on_where_it_was(fitted, tmp_path):
  effects = tmp_path / "effects"
  shutil.copytree(fitted[0], effects)
  said = json.loads((effects / "reader.json").read_text())
  (effects / "reader.json").write_text(json.dumps(said | {"gives": ["values", "effects"]}))
  changes = {
    "reviewer.name": "trained",
    "reviewer.path": str(effects),
    "reviewer.refit_every": 2,
    "credit.scheme": "weighted",
    "spot.share": 1.0,
  }
  for name, steps in (("whole", 4), ("parts", 3), ("parts", 4)):
    config = tiny.make_config({**changes, "steps": steps})
    dca_jax.train(config, str(tmp_path / name), quiet=True)
  states = [tiny.saved_state(tmp_path / name) for name in ("parts", "whole")]
  tiny.assert_same_arrays(*states)
  # Of no effect before the refit, of some after it.
  weights: dict[int, set[float]] = {}
  for step in (2, 3):
    path = tmp_path / f"whole/trajectories/step_{step:06d}.jsonl"
    steps = [s for line in path.read_text().splitlines() for s in json.loads(line)["steps"]]
    weights[step] = {s["weight"] for s in steps if "weight" in s}
  assert weights[2] == {0.0}
  assert len(weights[3]) > 1
  with pytest.raises(ConfigError, match=r"spot\.share"):
    tiny.make_config(changes | {"spot.share": 0.0})
  with pytest.raises(ConfigError, match=r"refit_every: must be 0.*not made from spot checks"):
    tiny.make_config(changes | {"reviewer.path": str(fitted[0])})


def test_a_folder_that_is_no_reviewer_is_refused_before_anything_is_opened(fitted, tmp_path):
  for path in ("", str(tmp_path)):
    with pytest.raises(ConfigError, match=r"reviewer\.path.*fit-reviewer"):
      tiny.make_config({"reviewer.name": "trained", "reviewer.path": path})
  damaged = tmp_path / "damaged"
  shutil.copytree(fitted[0], damaged)
  shutil.rmtree(damaged / "reader")
  config = REVIEWERS["trained"](path=str(damaged))  # type: ignore[call-arg]
  assert config.check() == {}
  with pytest.raises(ConfigError.__mro__[1], match="cannot be read"):
    reader.load(str(damaged))
  with pytest.raises(ConfigError, match="already"):
    fit_reviewer(From("oracle", "recipe.py"), str(fitted[0]), [], HOW)


@pytest.mark.parametrize(("behind", "known"), [(0, [0, 0, 2, 2, 4]), (1, [0, 0, 0, 2, 2])])
def test_a_refit_knows_what_was_written_when_the_first_question_is_asked(behind, known):
  made: list[int] = []

  def after(step):
    made.append(step)
    return lambda requests: [Review("ok", model=str(step))] * len(requests)

  with contextlib.closing(InOneThread(after, 2, behind)) as reviewer:
    asked = [reviewer.begin_step(step)(requests(1), 60.0) for step in range(1, 6)]
    assert [int(one.result(60)[0].model) for one in asked] == known
  assert made == [*dict.fromkeys(known)]


def test_a_reader_that_fails_harms_nothing(capsys):
  def broken(requests):
    raise RuntimeError("out of memory")

  with contextlib.closing(InOneThread(lambda _: broken)) as reviewer:
    assert reviewer.submit(requests(2), 60.0).result(60) == [Review("client_error")] * 2
    assert reviewer.submit(requests(1), -1.0).result(60) == [Review("timeout")]
    assert "out of memory" in reviewer.failures()
  assert capsys.readouterr().err.count("out of memory") == 1


def test_faults_are_planted_in_as_many_answers_as_were_asked_for():
  """Although nine kinds of twelve need words, of which these answers have none."""
  right = []
  for i in range(60):
    prompt, text = TASK.demonstration(i, mistakes=False)
    steps = (*re.findall(r"[^;]+;", text), *re.findall(r"#.*", text))
    right.append(Request(f"1/{i}/0", prompt, steps, True, False))
  known = with_faults(right, None)
  assert 0.8 * len(right) <= len(known) <= len(right)
  said = [(one.request, *zip(one.request.steps, one.roles, strict=True)) for one in known]
  of = {role: sum(role in one.roles for one in known) for role in ("error", "redundant")}
  assert of["error"] == 2 * of["redundant"] > 0
  for (request, *steps), (twin, *_) in zip(said[::2], said[1::2], strict=True):
    changed = [step for step, role in steps if role in ("error", "redundant")]
    assert len(changed) == 1
    assert request.steps != twin.steps
    assert twin in right


def test_answers_that_nobody_labelled_are_refused(fitted):
  stored = str(fitted[0] / "trajectories")
  for labels in ("reviews", "spot-checks"):
    with pytest.raises(ConfigError, match=f"--from={labels}: none of the"):
      fit_reviewer(From(labels, trajectories=stored), str(fitted[0] / "other"), [], HOW)


def test_arrays_hold_what_was_said():
  tokenizer, request = TASK.tokenizer(), requests(1)[0]
  (read,) = encoded(tokenizer, [request])
  texts = stacked([[(request, read)]], 1, 2)
  assert tokenizer.decode(texts.prompts_PxS[0, : texts.prompt_lengths_P[0]]) == request.problem
  assert tokenizer.decode(texts.tokens_BxT[0][texts.step_ids_BxT[0] == 0]) == request.steps[0]
  assert texts.starts_BxK[0, :2].tolist() == [0, len(request.steps[0])]
  assert texts.ends_BxK[0, 0] == texts.starts_BxK[0, 1]
  n, expected = len(request.steps), ["", *request.steps[1:]]
  known = Labelled(request, ["error", *[""] * (n - 1)], expected, [0.5] * n)
  wanted = targets(tokenizer, [known], [read], texts)
  assert wanted.roles_BxK[0, :n].tolist() == [ROLES.index("error")] + [-1] * (n - 1)
  assert (wanted.tokens_BxT[0][texts.step_ids_BxT[0] == 0] == -1).all()
  rest = wanted.tokens_BxT[0] >= 0
  assert tokenizer.decode(wanted.tokens_BxT[0][rest]) == "".join(request.steps[1:])
  assert np.isnan(wanted.effects_BxK).all()
  assert (wanted.values_BxK[0, :n] == 0.5).all()


def test_what_is_expected_is_what_a_right_step_is_and_a_wrong_one_is_not():
  task = Chains(ChainsConfig(lines=6))
  for i in range(40):
    prompt, text = task.demonstration(i, mistakes=True)
    steps = re.findall(r"[^;]+;?", text)
    roles, right = task.label_steps(prompt, steps, False), task.expected_steps(prompt, steps)
    for role, step, expected in zip(roles, steps, right, strict=True):
      if role in ("necessary", "inherits", "error"):
        assert (step == expected) == (role != "error")
  assert task.expected_steps(prompt, ["?", "#$", "z3;"]) == ["", "", ""]
