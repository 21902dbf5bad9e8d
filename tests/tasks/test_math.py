"""The verifier `math`: math-verify itself, in a process with a limit of time."""

import json
import pathlib
import sys

import pytest
import words

from dca_jax.errors import UserError
from dca_jax.tasks import JsonlConfig
from dca_jax.tasks.judge import Judge
from dca_jax.tasks.verifiers import JUDGED, boxed, formula, given_answer


@pytest.fixture(scope="module")
def judge():
  pytest.importorskip("math_verify")
  return Judge(JUDGED["math"], 60.0, 1)


def worth(judge: Judge, answer: str, text: str) -> bool:
  verdict = judge.verify({"answer": boxed(given_answer(answer))}, formula(text))
  assert verdict is not None
  return verdict.reward == 1


SAME = [
  ("2\\sqrt2", "so it is \\boxed{\\sqrt{8}}"),
  ("\\frac{\\sqrt2}{2}", "\\boxed{\\frac{1}{\\sqrt 2}}"),
  ("Then \\boxed{2x+3}.", "\\boxed{3 + 2x}"),
  ("(x-1)(x+1)", "\\boxed{x^2-1}"),
  ("\\{1, 2\\}", "\\boxed{2, 1}"),
  ("(0, 1)", "#### (0,1)"),
  ("5", "\\boxed{x = 5}"),
  ("0.5", "\\boxed{\\frac12}"),
  ("\\text{even}", "\\boxed{\\text{even}}"),
  ("12", "\\boxed{12} because \\boxed{12}"),
  ("12", "\\boxed{11} at first,\nbut in the end \\boxed{12}"),
]
OTHER = [
  ("2x+3", "\\boxed{2x+4}"),
  ("[0, 1)", "\\boxed{(0,1)}"),
  ("\\text{even}", "\\boxed{\\text{odd}}"),
  ("\\frac13", "\\boxed{0.333}"),
  ("1", "\\boxed{1} or \\boxed{2}"),
  ("2", "\\boxed{1} or \\boxed{2}"),
  ("2", "\\boxed{1 \\text{ or } 2}"),
  ("1", "#### 1} \\boxed{2"),
  ("2", "#### 1} \\boxed{2"),
  ("2", "#### 1 #### 2"),
  ("42", "The answer is 42."),  # Not marked.
  ("42", "It is not \\boxed{4"),
  ("42", "\\boxed{" + "4" * 2000 + "}"),
  ("42", ""),
]


@pytest.mark.parametrize(
  ("answer", "text", "same"), [(*c, True) for c in SAME] + [(*c, False) for c in OTHER]
)
def test_formulas(judge, answer, text, same):
  assert worth(judge, answer, text) == same


def test_how_it_reads_the_corpora_of_numbers(judge):
  """What docs/tasks.md says of it."""

  def marked(name):
    lines = pathlib.Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()
    cases = map(json.loads, lines)
    return [c for c in cases if "boxed" in c["text"] or "####" in c["text"]]

  corpus = marked("number_corpus.jsonl")
  wrong = [c for c in corpus if worth(judge, c["reference"], c["text"]) != c["correct"]]
  accepted = [c["text"] for c in wrong if not c["correct"]]
  assert (len(corpus), len(wrong), accepted) == (54, 5, ["\\boxed{2^{10}}"])
  read = [c for c in marked("number_readings.jsonl") if c["human"]]
  right = [c for c in read if worth(judge, c["human"], c["text"])]
  assert (len(read), len(right)) == (92, 59)


def test_a_formula_without_end_is_no_verdict(judge):
  hurried = Judge(JUDGED["math"], 1.0, 1)
  assert hurried.verify({"answer": boxed("2")}, formula("\\boxed{9^{9^{9^9}}}")) is None


@pytest.fixture
def make(tmp_path):
  def make(rows, **changes):
    path, tokenizer = words.write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "tokenizer"
    files = {"path": path, "heldout_path": path, "tokenizer": words.save_tokenizer(tokenizer)}
    config = JsonlConfig(verifier="math", verifier_seconds=60.0, **files, **changes)
    assert not config.check()
    return config.open()

  return make


def test_a_task_with_formulas(judge, make):
  task = make([{"question": "Half?", "answer": "So it is\n\\boxed{\\frac{1}{2}}."}])
  problem = task.problem("heldout", 0)
  assert problem.answer == "\\frac{1}{2}"
  assert task.verify(problem, "\\boxed{0.5}", False).correct
  assert not task.verify(problem, "\\boxed{0.5}", True).correct
  assert not task.verify(problem, "It is 0.5.", False).correct
  votes = [task.final_answer(f"\\boxed{{{x}}}") for x in ("\\frac12", "\\dfrac{1}{2}", "2")]
  assert votes[0] == votes[1] != votes[2]
  assert task.final_answer("no idea") is None


def test_a_reference_that_it_cannot_read_is_refused(judge, make):
  task = make([{"question": "?", "answer": "#### \\frac{"}])
  with pytest.raises(UserError, match=r"line 1: task\.verifier 'math' finds no answer in"):
    task.problem("heldout", 0)


def test_without_the_package_it_is_one_sentence(make, monkeypatch):
  monkeypatch.setitem(sys.modules, "math_verify", None)
  said = r"^task\.verifier: needs the package math-verify: pip install 'dca-jax\[math\]'$"
  with pytest.raises(UserError, match=said):
    make(words.PROBLEMS)
