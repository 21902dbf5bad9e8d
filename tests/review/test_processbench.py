"""Files in the form of ProcessBench: 40 solutions made by hand, and F1 by another computation."""

import json
import pathlib

import pytest

from dca_jax.commands import cli
from dca_jax.errors import UserError
from dca_jax.review.processbench import read_processbench

FILE = pathlib.Path(__file__).parent / "processbench.jsonl"


def audited(workdir, *arguments: str) -> dict:
  command = ["audit", f"--processbench={FILE}", f"--workdir={workdir}", *arguments]
  assert cli.main(command) == 0
  return json.loads((workdir / "audit.json").read_text())


def test_the_file_is_read_as_it_stands():
  cases, truth = read_processbench(str(FILE), 100)
  lines = [json.loads(line) for line in FILE.read_text().splitlines()]
  assert len(cases) == len(lines) == 40
  for case, line in zip(cases, lines, strict=True):
    assert case.first_error == line["label"]
    assert case.request.correct == line["final_answer_correct"]
    assert list(case.request.steps) == line["steps"]
    roles = truth.labels(case.request)
    assert len(roles) == len(line["steps"])
    assert (roles.index("error") if "error" in roles else -1) == line["label"]
  assert len(read_processbench(str(FILE), 7)[0]) == 7


def test_the_truth_itself_is_perfect(tmp_path):
  row = audited(tmp_path, "--reviewer=oracle")
  assert row["first_error_f1"] == row["first_error_accuracy"] == row["no_error_accuracy"] == 1
  assert (row["n"], row["source"], row["role_accuracy"]) == (40, "processbench", None)


def test_f1_equals_an_independent_computation(tmp_path):
  """A reviewer of our own calls the second step wrong where the answer is, or where it has a 5."""
  (tmp_path / "mine.py").write_text(MINE)
  row = audited(tmp_path / "w", f"--reviewer={tmp_path}/mine.py:Mine")
  found = {True: [], False: []}
  for line in map(json.loads, FILE.read_text().splitlines()):
    suspects = not line["final_answer_correct"] or "5" in line["steps"][1]
    said = 1 if suspects else -1
    found[line["label"] == -1].append(said == line["label"])
  wrong, right = (sum(found[key]) / len(found[key]) for key in (False, True))
  assert 0 < wrong < 1
  assert 0 < right < 1
  assert row["first_error_accuracy"] == pytest.approx(wrong, abs=1e-6)
  assert row["no_error_accuracy"] == pytest.approx(right, abs=1e-6)
  assert row["first_error_f1"] == pytest.approx(2 * wrong * right / (wrong + right), abs=1e-6)
  assert row["verdict"] == "no"  # Of needless steps such a file says nothing.


MINE = """
import dataclasses

from dca_jax.review import Review, ReviewerConfig


@dataclasses.dataclass(frozen=True)
class Mine(ReviewerConfig):
  def review(self, request):
    suspects = not request.correct or "5" in request.steps[1]
    roles = ["necessary"] * len(request.steps)
    roles[1] = "error" if suspects else "necessary"
    return Review("ok", tuple(roles))
"""


@pytest.mark.parametrize(
  ("line", "part"),
  [
    ("{", "line 1: Invalid JSON"),
    ('{"problem": "p", "steps": ["a"]}', "line 1: label: Field required"),
    ('{"problem": "p", "solution": "a", "label": 0}', "line 1: steps: Field required"),
    ('{"problem": "p", "steps": [], "label": -1}', "line 1: steps"),
    ('{"problem": "p", "steps": ["a"], "label": 1}', "line 1: label 1 of 1 steps"),
    ('{"problem": "p", "steps": ["a"], "label": "0"}', "line 1: label"),
    ("", "holds no solution"),
  ],
)
def test_another_form_is_refused_in_one_sentence(tmp_path, line, part):
  path = tmp_path / "other.jsonl"
  path.write_text(line + "\n")
  with pytest.raises(UserError) as error:
    read_processbench(str(path), 10)
  assert part in str(error.value)
  assert "\n" not in str(error.value)
  with pytest.raises(UserError, match="cannot be read"):
    read_processbench(str(tmp_path / "nowhere"), 10)
