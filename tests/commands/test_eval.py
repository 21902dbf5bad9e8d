"""`dca-jax eval` and `dca-jax chat`: a saved policy asked from the command line."""

import io
import json

import pytest
import tiny

import dca_jax
from dca_jax.commands import cli
from dca_jax.rollout.evaluate import Answer, EvaluateConfig, scores


def test_eval_gives_the_scores_of_the_run_and_every_answer(reviewed, tmp_path, capsys):
  file = tmp_path / "answers.jsonl"
  assert cli.main(["eval", f"--workdir={reviewed}", f"--output={file}", "--json", "--quiet"]) == 0
  found = json.loads(capsys.readouterr().out)["all"]
  last = tiny.read_lines(reviewed)[-1]
  for name, (value, low, high) in found.items():
    told = [last[f"eval/{name}{end}"] for end in ("", "_low", "_high")]
    assert [value, low, high] == pytest.approx(told)
  lines = [json.loads(line) for line in file.read_text().splitlines()]
  assert [line["problem"] for line in lines] == [0, 1, 2, 3]
  right = [sample["correct"] for line in lines for sample in line["samples"]]
  assert sum(right) / len(right) == found["sampled"][0]
  task = dca_jax.load(reviewed).config.task.open()
  for line in lines:
    problem = task.problem("heldout", line["problem"])
    for told in (line["greedy"], *line["samples"]):
      assert task.verify(problem, told["text"], False).correct >= told["correct"]


def test_eval_takes_another_checkpoint_and_other_settings(reviewed, capsys):
  fewer = ["--config.evaluate.problems=2", "--config.evaluate.samples=2", "--step=2"]
  assert cli.main(["eval", f"--workdir={reviewed}", *fewer]) == 0
  header, _, row = capsys.readouterr().out.splitlines()
  assert header.split() == ["held-out", "greedy", "sampled", "pass@2", "length", "maj@2"]
  assert row.startswith("all ")


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["--by=level"], "--by=level: problem 0 has no such field; there are none"),
    (["--step=9"], "9"),
    (["--config.evaluate.k=9"], "evaluate.k: "),
  ],
)
def test_eval_says_what_is_wrong(reviewed, capsys, arguments, said):
  assert cli.main(["eval", f"--workdir={reviewed}", *arguments]) == 1
  assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_recipe_without_a_published_policy_has_none_to_score(tmp_path, capsys):
  assert cli.main(["eval", f"--config={tiny.write_recipe(tmp_path)}"]) == 1
  said = capsys.readouterr().err
  assert "policy.pretrained: must be given where there is no --workdir (docs/models.md)" in said


def test_scores_are_those_of_the_problems_that_are_asked_for():
  config = EvaluateConfig(problems=2, samples=2, k=2)
  answers = {(i, g): Answer(i == 1, str(i), 3 + i, "") for i in (0, 1) for g in (-1, 0, 1)}
  found = scores(config, answers, [1], votes=False)
  assert {name: e.value for name, e in found.items()} == {
    "greedy": 1.0,
    "sampled": 1.0,
    "pass@2": 1.0,
    "length": 4.0,
  }
  assert scores(config, answers, [0, 1], votes=True)["maj@2"].value == 0.5


def test_chat_answers_step_by_step_and_has_it_reviewed(reviewed, capsys, monkeypatch):
  task = dca_jax.load(reviewed).config.task.open()
  problem = task.problem("heldout", 0)
  monkeypatch.setattr("sys.stdin", io.StringIO(f"\n{task.problem('heldout', 3).prompt}\n"))
  monkeypatch.setattr("dca_jax.api._STREAMED", 2)
  assert cli.main(["chat", f"--workdir={reviewed}", "--review=oracle"]) == 0
  first, second, *_ = capsys.readouterr().out.split("\n> ")[1:]
  prompt, *lines = first.splitlines()
  judged = next(i for i, line in enumerate(lines) if "the answer is" in line)
  assert prompt == problem.prompt
  assert lines[judged].endswith(f"the answer is {problem.answer}")
  reviews = lines[judged + 1 :]
  assert [line.split(maxsplit=3)[3:] for line in reviews] == [
    [step.strip().removesuffix("  (cut off)")] if step.strip() else [] for step in lines[:judged]
  ]
  assert "the answer is" not in second  # Nobody has said what it is.


def test_chat_refuses_what_the_policy_cannot_read_and_goes_on(reviewed, capsys, monkeypatch):
  prompt = dca_jax.load(reviewed).config.task.open().problem("heldout", 3).prompt
  monkeypatch.setattr("sys.stdin", io.StringIO(f"%{prompt[1:]}\n{prompt}\n"))
  assert cli.main(["chat", f"--workdir={reviewed}"]) == 0
  first, second, *_ = capsys.readouterr().out.split("\n> ")[1:]
  assert first.startswith("  not asked: ")
  assert "'%' is not in the alphabet" in first
  assert len(first.splitlines()) == 1
  assert second.strip()
  assert "not asked" not in second
