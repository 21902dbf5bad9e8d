"""The tasks with exact labels under `evidence`: labels by hand, and against what edits do."""

import re

import pytest

from dca_jax.episode import ROLES
from evidence.tasks import Definitions, KeyDoor
from evidence.tasks.keydoor import _DOORS, _KEYS


def cut(text: str) -> list[str]:
  return re.findall(r"[^;$]*[;$]|[^;$]+$", text)


@pytest.mark.parametrize("task", [KeyDoor(), Definitions()], ids=lambda t: type(t).__name__)
def test_demonstrations_are_tokens_and_right_where_no_mistakes_are_allowed(task):
  tokenizer, wins = task.tokenizer(), 0
  for i in range(60):
    for mistakes in (False, True):
      prompt, text = task.demonstration(i, mistakes)
      ids = tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
      assert tokenizer.decode(ids) == prompt + text
      problem = task.problem("demonstrations", i)
      assert problem.prompt == prompt
      steps = cut(text)
      assert "".join(steps) == text
      labels = task.label_steps(prompt, steps, False)
      assert len(labels) == len(steps)
      assert set(labels) <= set(ROLES)
      right = task.verify(problem, text, False).correct
      assert right == (labels[-1] in ("necessary", "repair"))
      assert not task.verify(problem, text, True).correct
      if not mistakes:
        assert right
        assert not {"error", "inherits"} & set(labels)
      wins += right
  assert 60 < wins < 115


def test_the_key_counts_the_walk_does_not():
  task, key = KeyDoor(), _KEYS[4]
  door, other = _DOORS[4][key], (key + 1) % 8

  def labels(text: str, truncated: bool = False) -> list[str]:
    return task.label_steps("4>", cut(text), truncated)

  n, w = "necessary", "irrelevant"
  assert labels(f"k{key};w1;w2;d{door}$") == [n, w, w, n]
  assert labels(f"k{other};w1;k{key};d{door}$") == ["error", w, "repair", n]
  assert labels(f"k{key};w1;k{key};d{door}$") == [n, w, "redundant", n]
  assert labels(f"k{key};k{other};k{key};d{door}$") == ["redundant", "error", "repair", n]
  wrong = _DOORS[4][other]
  assert labels(f"k{other};d{wrong}$") == ["error", "inherits"]
  assert labels(f"k{key};d{(door + 1) % 8}$") == [n, "error"]
  assert labels(f"k{key};w1;w", truncated=True) == [n, w, w]
  assert labels("x;")[0] == "error"
  assert task.correct_step("4>", (f"k{other};", f"d{wrong}$"), 0) == f"k{key};"
  assert task.correct_step("4>", (f"k{key};", f"d{wrong}$"), 1) == f"d{door}"
  assert task.correct_step("4>", ("w1;", f"d{door}$"), 1) == f"k{key};"
  assert task.correct_step("4>", ("x;",), 0) == ""


PROMPT = "a=3;b=a+2;c=4;d=b*a?d>"  # d is 5 * 3 = 15, which is 5.


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("a3;b5;c4;d5;#5$", "necessary necessary irrelevant necessary necessary"),
    ("d5;#5$", "necessary necessary"),  # In the head.
    ("a3;b4;?b;b5;d5;#5$", "necessary error necessary repair necessary necessary"),
    ("a3;b5;?b;d5;#5$", "necessary necessary redundant necessary necessary"),
    ("a3;b5;b5;d5;#5$", "necessary necessary redundant necessary necessary"),
    ("a3;b4;d2;#2$", "necessary error inherits inherits"),
    ("a3;b4;d5;#5$", "necessary error repair necessary"),
    ("a3;b4;?b;b5;#5$", "necessary error necessary repair necessary"),
    ("d5;a3;b5;#5$", "necessary redundant redundant necessary"),  # Nothing reads them.
    ("?c;a3;b5;#5$", "irrelevant necessary necessary necessary"),
    ("a3;b5;#7$", "necessary necessary error"),
    ("zz;#5$", "error necessary"),
  ],
)
def test_a_check_is_necessary_where_a_repair_comes_of_it(text, expected):
  assert Definitions(names=4).label_steps(PROMPT, cut(text), False) == expected.split()


def test_leaving_out_what_is_needless_leaves_the_other_roles_as_they_are():
  task = Definitions()
  for i in range(80):
    prompt, text = task.demonstration(i, True)
    steps = cut(text)
    labels = task.label_steps(prompt, steps, False)
    kept = [k for k, role in enumerate(labels) if role not in ("redundant", "irrelevant")]
    again = task.label_steps(prompt, [steps[k] for k in kept], False)
    assert again == [labels[k] for k in kept], (prompt, text)
