"""Free-text tasks: where problems come from, what is refused, and how an answer is judged."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest
import words

from dca_jax import patterns
from dca_jax.errors import UserError
from dca_jax.rollout import cut
from dca_jax.rollout.verify import verify
from dca_jax.tasks import TASKS, JsonlConfig, Outcome, Text

N = len(words.PROBLEMS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("text")
  words.save_tokenizer(path)
  words.write_jsonl(path / "train.jsonl")
  words.write_jsonl(path / "test.jsonl", words.PROBLEMS[:4])
  return path


@pytest.fixture
def make(folder):
  """A task with the settings given."""

  def make(**changes) -> Text:
    given = {"name": "jsonl", "tokenizer": str(folder), **changes}
    if given["name"] == "jsonl":
      files = {"path": folder / "train.jsonl", "heldout_path": folder / "test.jsonl"}
      given = {key: str(path) for key, path in files.items()} | given
    config = TASKS[given["name"]](**given)
    assert not config.check()
    return Text(config)

  return make


@pytest.fixture
def with_rows(make, tmp_path):
  """A task whose training data are the rows, or the text, given."""

  def with_rows(rows, **changes) -> Text:
    path = tmp_path / "rows.jsonl"
    path.write_text(
      rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    )
    return make(path=str(path), **changes)

  return with_rows


def every_problem(task: Text):
  return [task.problem("train", i) for i in range(task.sizes["train"])]


# Problems.


def test_every_epoch_has_every_problem_once_in_an_order_of_its_own(make):
  task = make()
  asked = [p["question"] for p in words.PROBLEMS]
  epochs = [[task.problem("train", e * N + i).prompt for i in range(N)] for e in range(4)]
  assert all(sorted(epoch) == sorted(asked) for epoch in epochs)
  assert all(epochs[i] != epochs[j] for i in range(4) for j in range(i))
  seeded = [task.problem("train", (7 << 32) + i).prompt for i in range(N)]
  assert sorted(seeded) == sorted(asked)
  assert seeded != epochs[0]


def test_a_problem_is_a_function_of_its_index(make):
  ours, theirs = make(), make()
  indices = [5, 3 * N + 1, (2**31 - 1 << 32) + 10**6, 0, 5]
  expected = [ours.problem("train", i) for i in indices]
  assert [theirs.problem("train", i) for i in reversed(indices)] == expected[::-1]
  assert [p.id for p in expected] == indices


def test_held_out_problems_keep_their_order(make):
  task = make()
  assert task.sizes == {"train": N, "heldout": 4}
  assert [task.problem("heldout", i).prompt for i in range(4)] == [
    p["question"] for p in words.PROBLEMS[:4]
  ]
  assert [task.problem("heldout", i).answer for i in range(4)] == ["2", "3", "4", "5"]


@pytest.mark.parametrize(("answer", "reference"), [("short_answer", "9"), ("answer", "9")])
def test_a_data_set_of_tfds_without_tensorflow(make, tmp_path_factory, answer, reference):
  data_dir = words.build_gsm8k(tmp_path_factory.mktemp("tfds"))
  task = make(name="tfds", dataset="gsm8k", data_dir=data_dir, answer=answer)
  assert task.sizes == {"train": 16, "heldout": N - 16}
  assert sorted(p.prompt for p in every_problem(task)) == sorted(
    p["question"] for p in words.PROBLEMS[:16]
  )
  assert task.problem("heldout", 0).answer == reference
  assert "tensorflow" not in sys.modules
  with pytest.raises(UserError, match=r"task\.heldout_split: cannot open 'tset' .*test"):
    make(
      name="tfds",
      dataset="gsm8k",
      data_dir=data_dir,
      heldout_split="tset",
    )
  with pytest.raises(
    UserError,
    match=r"gsm8k, split 'train', example \d+:"
    r" the field 'query' must be text .*; there are .*question",
  ):
    make(
      name="tfds",
      dataset="gsm8k",
      data_dir=data_dir,
      answer=answer,
      question="query",
    ).problem("train", 0)


HUB = {"name": "hub", "split": "train[:16]", "heldout_split": "train[16:]"}


@pytest.fixture
def no_network(monkeypatch, tmp_path):
  datasets = pytest.importorskip("datasets")
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
  datasets.disable_progress_bars()
  return datasets


@pytest.mark.parametrize("kind", ["json", "parquet", "csv"])
def test_a_data_set_of_the_hub_from_a_folder(make, no_network, tmp_path, kind):
  rows = no_network.Dataset.from_list([p | {"level": [1, 2]} for p in words.PROBLEMS])
  if kind == "csv":
    rows = rows.remove_columns("level")
  (tmp_path / "data").mkdir()
  getattr(rows, f"to_{kind}")(str(tmp_path / "data" / f"train.{kind}"))
  task = make(**HUB, dataset=str(tmp_path / "data"))
  assert task.sizes == {"train": 16, "heldout": N - 16}
  asked = [p["question"] for p in words.PROBLEMS]
  assert sorted(p.prompt for p in every_problem(task)) == sorted(asked[:16])
  held_out = [task.problem("heldout", i) for i in range(N - 16)]
  assert [p.prompt for p in held_out] == asked[16:]
  assert held_out[0].answer == "6"


def test_a_data_set_of_the_hub_has_parts_and_splits_of_its_own(own, no_network, tmp_path):
  for part, first in (("easy", 0), ("hard", 8)):
    rows = no_network.Dataset.from_list([p | {"level": [1]} for p in words.PROBLEMS[first:]])
    for split in ("train", "test"):
      rows.to_parquet(str(tmp_path / "data" / part / f"{split}.parquet"))
  names = "".join(
    f"- config_name: {part}\n  data_files:\n"
    + "".join(f"  - split: {s}\n    path: {part}/{s}.parquet\n" for s in ("train", "test"))
    for part in ("easy", "hard")
  )
  (tmp_path / "data" / "README.md").write_text(f"---\nconfigs:\n{names}---\n")
  given = {"name": "hub", "dataset": str(tmp_path / "data")}
  task = own("given", **given, subset="hard")
  problem = task.problem("heldout", 0)
  assert problem.prompt == words.PROBLEMS[8]["question"]
  assert dict(problem.row) == words.PROBLEMS[8] | {"level": [1]}
  assert task.verify(problem, json.dumps(dict(problem.row)), False).correct
  for wrong, said in (
    ({"subset": "hard", "split": "tset"}, r"task\.split: cannot open 'tset' .*tset"),
    ({"subset": "herd"}, r"task\.split: cannot open 'train' of task\.dataset .*herd"),
    ({"subset": "hard", "question": "query"}, r"example \d+: the field 'query' must be text"),
  ):
    with pytest.raises(UserError, match=said):
      own("given", **given, **wrong).problem("train", 0)


def test_a_data_set_of_the_hub_that_is_not_there(make, no_network):
  with pytest.raises(UserError, match=r"task\.split: cannot open 'train\[:16\]' of .*'no/such'"):
    make(**HUB, dataset="no/such")


def test_without_the_package_the_hub_is_one_sentence(make, monkeypatch):
  monkeypatch.setitem(sys.modules, "datasets", None)
  with pytest.raises(UserError, match=r"^task\.name: needs .* datasets: pip .*dca-jax\[hub\]"):
    make(**HUB, dataset="gsm8k")


def test_a_data_set_that_is_not_there(make, tmp_path):
  with pytest.raises(
    UserError, match=r"task\.split: cannot open 'train' of task\.dataset 'no_such_set'"
  ):
    make(name="tfds", dataset="no_such_set", data_dir=str(tmp_path))


# One file, of which a part is held out.


@pytest.fixture
def split(with_rows):
  """The task that splits the rows given."""
  return lambda rows, fraction=0.3, **changes: with_rows(
    rows, heldout_path="", heldout_fraction=fraction, **changes
  )


def held_out(task: Text) -> list[str]:
  return [task.problem("heldout", i).prompt for i in range(task.sizes["heldout"])]


def many(count: int) -> list[dict]:
  return [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(count)]


def test_the_fraction_of_a_file_is_held_out(split):
  rows = many(2000)
  task = split(rows)
  own = held_out(task)
  trained = [p.prompt for p in every_problem(task)]
  assert sorted(own + trained) == sorted(row["question"] for row in rows)
  assert own == [
    row["question"] for row in rows if row["question"] in own
  ]  # They keep their order.
  assert abs(len(own) / 2000 - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5
  assert set(held_out(split(rows, 0.1))) < set(own)
  # Another split would train old runs on what they are measured on, so it may never change.
  assert [int(re.findall(r"\d+", question)[0]) for question in own[:4]] == [7, 8, 9, 15]


def test_problems_held_out_stay_so(split):
  """In whatever order they stand, whatever is added, however often they are there,
  whatever else is asked of them."""
  rows = many(60)
  own = held_out(split(rows))
  assert held_out(split(rows[::-1])) == own[::-1]
  grown = held_out(split(many(200)))
  assert grown[: len(own)] == own
  assert len(grown) > len(own)
  copies = [{"question": f" {row['question']}\n", "answer": "7"} for row in rows]
  task = split(rows + copies)
  assert held_out(task) == own * 2
  assert not set(own) & {p.prompt for p in every_problem(task)}
  changed = split(rows, prompt="{question}!", answer="question", verifier="exact")
  assert held_out(changed) == own


def test_lines_of_a_split_file_have_their_own_numbers(split):
  rows = many(60)
  own = held_out(split(rows))
  trained = [row["question"] for row in rows if row["question"] not in own]
  for read, wrong in ((held_out, own[1]), (every_problem, trained[1])):
    line = 1 + [row["question"] for row in rows].index(wrong)
    task = split([{**row, "answer": "?"} if row["question"] == wrong else row for row in rows])
    with pytest.raises(UserError, match=rf"rows\.jsonl, line {line}: .*'number' finds no answer"):
      read(task)
  with pytest.raises(
    UserError, match=r"task\.question: .*rows\.jsonl, line 61: the field 'question' must be text"
  ):
    split([*rows, {"answer": "1"}])


@pytest.mark.parametrize(("fraction", "said"), [(1e-9, "hold out"), (1 - 1e-9, "train on")])
def test_a_split_with_an_empty_side(split, fraction, said):
  with pytest.raises(
    UserError, match=rf"task\.heldout_fraction: .* leaves nothing to {said} of .*rows\.jsonl; set"
  ):
    split(many(5), fraction)


def test_half_a_character(split):
  rows = [{"question": f"{i} \ud83d", "answer": "1"} for i in range(40)]
  assert all(prompt.endswith(" ?") for prompt in held_out(split(rows)))


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    (
      {"heldout_path": "b"},
      {"heldout_path": "either this or task.heldout_fraction must be given, and not both"},
    ),
    (
      {"heldout_fraction": 0.0},
      {"heldout_path": "either this or task.heldout_fraction must be given, and not both"},
    ),
    ({"heldout_fraction": 1.0}, {"heldout_fraction": "must be above 0 and below 1"}),
    ({"heldout_fraction": -0.1}, {"heldout_fraction": "must be above 0 and below 1"}),
    ({"path": ""}, {"path": "must be given, because task.name is 'jsonl'"}),
    ({}, {}),
  ],
)
def test_one_way_to_hold_out(changes, said):
  assert (
    JsonlConfig(**{"path": "a", "heldout_fraction": 0.1, "tokenizer": "t", **changes}).check()
    == said
  )


# What is refused; always the file and the line are named.


@pytest.mark.parametrize(
  ("rows", "said"),
  [
    ("", r"rows\.jsonl, line 1 is not a JSON object"),
    (
      '{"question": "1?", "answer": "1"}\n{"question"\n',
      r"rows\.jsonl, line 2 is not a JSON object",
    ),
    ('{"question": "1?", "answer": "1"}\n\n\r\n{"question": "2?"\n', "line 4 is not a JSON object"),
    (
      '{"question": "1?", "answer": "1"}\n\n{"question": "2?", "answer": "?"}\n',
      "line 3: .*'number' finds no answer",
    ),
    ("\n \n", r"line 1 is not a JSON object \(the file is empty\)"),
    ("[1, 2]\n", "line 1 is not a JSON object"),
    ('[["question", "1?"], ["answer", "1"]]\n', r"line 1 is not a JSON object \(it is a list\)"),
    ('{"question": "1?", "answer": "1", "question": "2?"}\n', "line 1 .*it has 'question' twice"),
    ('{"question": "1?", "answer": NaN}\n', "line 1 .*NaN is no number in JSON"),
    ('{"question": "1?", "answer": -Infinity}\n', "line 1 .*-Infinity is no number in JSON"),
    (
      '{"question": "1?", "answer": 1e999}\n',
      "line 1: the field 'answer' must be text or a number, not inf",
    ),
    (
      f'{{"question": "1?", "answer": 1{"0" * 5000}}}\n',
      r"line 1 is not a JSON object \(Exceeds the limit",
    ),
    (
      f'{{"question": "1?", "answer": 1{"0" * 4000}}}\n',
      "line 1: .*'number' finds no answer in '0+'",
    ),
    (f'{{"question": "1?", "answer": {"[" * 100_000}}}\n', "line 1 is not a JSON object"),
    ("3\n", "line 1 is not a JSON object"),
    (
      [{"question": "1?", "solution": "1"}],
      "line 1: the field 'answer' must be text or a number, not None; there are question, solution",
    ),
    (
      [{"question": "1?", "answer": "1"}, {"question": " ", "answer": "1"}],
      "line 2: the field 'question' must be text",
    ),
    ([{"question": "1?", "answer": ["1"]}], "line 1: the field 'answer' must be text or a number"),
    ([{"question": "1?", "answer": None}], "line 1: the field 'answer' must be text or a number"),
    (
      [{"question": "1?", "answer": "1"}, {"question": "2?", "answer": "two"}],
      "line 2: .*'number' finds no answer in 'two'",
    ),
    ([{"question": "1?", "answer": "1 or 2"}], "line 1: .*'number' finds no answer"),
    ([{"question": "1?", "answer": "3 cats and 2 dogs"}], "line 1: .*'number' finds no answer"),
    (
      [{"question": "1?", "answer": "We get 3 + 4 = 7.\n#### 7 or 8"}],
      "line 1: .*'number' finds no answer",
    ),
    ([{"question": "1?", "answer": "\\frac{\\sqrt{2}}{2}"}], "line 1: .*'number' finds no answer"),
    (
      [{"question": "1?", "answer": "So 3 x + 2, \\boxed{2x+3}"}],
      "line 1: .*'number' finds no answer",
    ),
    (
      [{"question": "1?", "answer": "It is 7, \\boxed{\\frac{1}{2}"}],
      "line 1: .*'number' finds no answer",
    ),
  ],
)
def test_bad_rows(with_rows, rows, said):
  with pytest.raises(UserError, match=said):
    every_problem(with_rows(rows))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"], ids=repr)
@pytest.mark.parametrize("start", ["", "\ufeff"], ids=repr)
def test_only_a_line_feed_ends_a_line(make, tmp_path, start, end):
  """Unicode, and `str.splitlines`, know eight more ends of lines, and JSON allows most
  of them within a string."""
  rows = [
    {"question": f"What{c}is{c} {i}?", "answer": str(i)}
    for i, c in enumerate("\u2028\u2029\x85\x7f\ufeff")
  ]
  path = tmp_path / "rows.jsonl"
  for last in (end, ""):
    text = start + end.join(json.dumps(row, ensure_ascii=False) for row in rows) + last
    path.write_bytes(text.encode())
    task = make(path=str(path))
    asked = {(p.prompt, p.answer) for p in every_problem(task)}
    assert asked == {(row["question"], row["answer"]) for row in rows}


def test_a_line_that_is_not_utf_8_is_named(make, tmp_path):
  path = tmp_path / "mixed.jsonl"
  path.write_bytes(b'{"question": "1?", "answer": "1"}\n\n{"question": "\xe9?", "answer": "1"}\n')
  with pytest.raises(UserError, match=r"cannot read .*mixed\.jsonl, line 3, which is not UTF-8"):
    make(path=str(path))
  with pytest.raises(UserError, match=r"task\.path: cannot read"):
    make(path=str(tmp_path))


def test_a_file_that_cannot_be_read(make, tmp_path):
  with pytest.raises(UserError, match=r"task\.path: cannot read .*none\.jsonl"):
    make(path=str(tmp_path / "none.jsonl"))
  (tmp_path / "latin.jsonl").write_bytes('{"question": "é?", "answer": "1"}'.encode("latin-1"))
  with pytest.raises(UserError, match=r"task\.heldout_path: cannot read .*latin\.jsonl"):
    make(heldout_path=str(tmp_path / "latin.jsonl"))


@pytest.mark.parametrize(
  ("answer", "reference"),
  [
    ("#### 1,000", "1000"),
    (7, "7"),
    (0.5, "1/2"),
    ("x = 7", "7"),
    ("3/4", "3/4"),
    ("So \\boxed{12}, done in 3 steps", "12"),
  ],
)
def test_reference_answers(with_rows, answer, reference):
  assert every_problem(with_rows([{"question": "?", "answer": answer}]))[0].answer == reference


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("path", ""),
    ("heldout_path", ""),
    ("verifier", "numbers"),
    ("verifier", "a b:c"),
    ("format", "(.*"),
    ("format_weight", 1.0),
    ("format_weight", 0.2),
    ("steps", "lines"),
    ("steps", ""),
    ("steps", "(\n"),
    ("max_steps", 0),
    ("prompt", "Solve it."),
  ],
)
def test_impossible_settings(key, value):
  good = JsonlConfig(
    path="a",
    heldout_path="b",
    format="x" if key == "format_weight" and value == 1 else "",
  )
  bad = dataclasses.replace(good, **{key: value}).check()
  assert key in bad or (key == "format_weight" and "format" in bad)


# The prompt.


def test_the_prompt_is_rendered_and_the_reviewer_reads_the_question(make):
  problem = make(prompt="{question} Use ####.", system_prompt="Be {brief}.").problem("heldout", 0)
  question = words.PROBLEMS[0]["question"]
  assert problem.prompt == question
  assert problem.rendered == (
    f"<|start|>system\nBe {{brief}}.<|end|>\n<|start|>user\n{question} Use ####."
    "<|end|>\n<|start|>assistant\n"
  )


def test_arguments_of_the_template(make):
  rendered = make(template_kwargs='{"enable_thinking": false}').problem("heldout", 0).rendered
  assert rendered.endswith("<|start|>assistant\n<think></think>")
  for given in ("[]", "{", '{"messages": 3}'):
    with pytest.raises(
      UserError, match=r"task\.chat_template or task\.template_kwargs: the template fails"
    ):
      make(template_kwargs=given).problem("heldout", 0)


@pytest.mark.parametrize("start", ["", "\n", "  "], ids=repr)
def test_the_prompts_of_a_run_do_not_change_at_midnight(make, tmp_path, start):
  """Else the template stays as it is, also where it begins with white space."""
  asked = ["%d %b %Y", "%A, %-d. %B %y, %H:%M:%S", "%Y-%m-%d is 100%%", "%c"]
  days = [
    "26 Jul 2024",
    "Friday, 26. July 24, 00:00:00",
    "2024-07-26 is 100%",
    "Fri Jul 26 00:00:00 2024",
  ]
  body = "{% set name = 'a' %}{{ messages[0]['content'] }}"
  calls = "".join(
    f"{{% if strftime_now is defined %}}|{{{{ strftime_now('{ask}') }}}}{{% endif %}}"
    for ask in asked
  )
  rendered = [
    make(tokenizer=words.save_tokenizer(tmp_path / str(len(more)), template=start + body + more))
    .problem("heldout", 0)
    .rendered
    for more in ("", calls)
  ]
  assert rendered[0].endswith(words.PROBLEMS[0]["question"])
  assert rendered[1] == "|".join([rendered[0], *days])


def test_without_a_template_the_prompt_starts_as_the_tokenizer_does(make, tmp_path):
  assert make(chat_template=False).problem("heldout", 0).rendered == words.PROBLEMS[0]["question"]
  plain = words.save_tokenizer(tmp_path, words.sentencepiece_like, template=None, starts=True)
  rendered = make(chat_template=False, tokenizer=plain).problem("heldout", 0).rendered
  assert rendered == "<bos>" + words.PROBLEMS[0]["question"]
  with pytest.raises(UserError, match=r"task\.chat_template: .* has none"):
    make(tokenizer=plain)


# Verdicts.


@pytest.mark.parametrize(
  ("completion", "right"),
  [
    ("1 + 1 = 2.\n#### 2", True),
    ("#### 3", False),
    ("The answer is 2.", True),
    ("2, 3", False),
    ("", False),
  ],
)
def test_numbers(make, completion, right):
  task = make()
  problem = task.problem("heldout", 0)
  assert task.verify(problem, completion, False) == Outcome(float(right), right, False)
  assert task.verify(problem, completion, True) == Outcome(0.0, False, True)
  assert (task.final_answer(completion) == problem.answer) == right


@pytest.mark.parametrize(
  ("completion", "right"),
  [
    ("3</think>2", True),
    ("2</think>3", False),
    ("2", False),
    ("2</think>", False),
    ("a</think>The answer is 2.</think>3", False),
  ],
)
def test_only_what_follows_the_thinking_is_read(make, completion, right):
  task = make(thinking_end="</think>")
  assert task.verify(task.problem("heldout", 0), completion, False).correct == right


@pytest.mark.parametrize(
  ("completion", "reward", "correct"),
  [
    ("Tom\n#### 2\n", 1.0, True),
    ("2", 0.75, True),
    ("Tom\n#### 3", 0.25, False),
    ("3", 0.0, False),
    ("#### 2 apples", 0.75, True),
  ],
)
def test_form_is_rewarded_beside_correctness_and_never_counts_as_it(
  make, completion, reward, correct
):
  task = make(format=r".*#### \d+", format_weight=0.25)
  assert task.verify(task.problem("heldout", 0), completion, False) == Outcome(
    reward, correct, False
  )
  assert task.verify(task.problem("heldout", 0), completion, True).reward == 0


def test_a_format_that_takes_for_ever_is_not_met_and_says_so(make, monkeypatch, capsys):
  monkeypatch.setattr(patterns, "SECONDS", 0.05)
  patterns.warn_slow.cache_clear()
  task = make(format=r"(?:[a-z]|[a-z][a-z])+\d\.", format_weight=0.25)
  assert task.verify(task.problem("heldout", 0), "abcd" * 100 + " $ 2.", False) == Outcome(
    0.75, True, False
  )
  assert task.verify(task.problem("heldout", 0), "three3.", False) == Outcome(0.25, False, False)
  assert (
    r"task.format: '(?:[a-z]|[a-z][a-z])+\\d\\.' took over 0.05 s on a completion"
    in capsys.readouterr().err
  )


# A verifier of one's own.

OWN = """
import json, os, sys, time

calls = 0

def half(row, completion):
  return 0.5

def same(row, completion):
  return completion in row["answer"]

def given(row, completion):
  assert json.loads(completion) == row, row
  return True

def parts(row, completion):
  return {"reward": 0.25, "tests": 3, "style": completion == "neat"}

def first_word(row, completion):
  return completion.split()[0] == row["answer"].split()[0]

first_word.final_answer = lambda completion: completion.split()[0] if completion.split() else None

def counts(row, completion):
  global calls
  calls += 1
  return calls / 100

def odd(row, completion):
  print("printed", completion)
  if completion == "hang":
    time.sleep(60)
  if completion == "spin":
    # Holds the lock of the interpreter, so no thread of the process gets a word in.
    sum(range(10**12))
  if completion == "exit":
    os._exit(3)
  if completion == "crash":
    import ctypes
    ctypes.string_at(0)
  return completion == "right"

def broken(row, completion):
  return 1 / 0

def quits(row, completion):
  sys.exit("enough")

def double(row, completion):
  return 2

def nothing(row, completion):
  return float("nan")

def endless(row, completion):
  return {"reward": 1, "length": float("inf")}

def nameless(row, completion):
  return {"tests": 1}

def old(question, completion, reference):
  return True

number = 3
"""


@pytest.fixture
def own(make, tmp_path, monkeypatch):
  (tmp_path / "own_verifier.py").write_text(OWN)
  monkeypatch.syspath_prepend(tmp_path)
  return lambda function, **changes: make(verifier=f"own_verifier:{function}", **changes)


def test_a_function_of_ones_own(own):
  task = own("half", thinking_end="</think>")
  problem = task.problem("heldout", 0)
  assert problem.answer == words.PROBLEMS[0]["answer"]
  assert task.verify(problem, "x</think> y", False) == Outcome(0.5, False, False)
  assert task.verify(problem, "x</think> y", True) == Outcome(0.0, False, True)
  assert own("same").verify(problem, "#### 2", False) == Outcome(1.0, True, False)
  assert own("same").verify(problem, "#### 3", False) == Outcome(0.0, False, False)
  assert "own_verifier" not in sys.modules  # It is called in other processes alone.


def test_it_gets_the_whole_row(own, tmp_path):
  row = {"question": "1?", "answer": "1", "level": 3, "tests": ["a", None, {"b": 0.5}]}
  path = tmp_path / "rows.jsonl"
  path.write_text(json.dumps(row) + "\n")
  task = own("given", path=str(path))
  assert task.verify(task.problem("train", 0), json.dumps(row), False).correct


def test_it_gets_a_row_of_tfds_as_plain_values(own, tmp_path_factory):
  data_dir = words.build_gsm8k(tmp_path_factory.mktemp("tfds"))
  task = own("given", name="tfds", dataset="gsm8k", data_dir=data_dir)
  problem = task.problem("heldout", 0)
  assert task.verify(problem, json.dumps(dict(problem.row)), False).correct
  assert set(problem.row) == {"question", "answer", "annotation", "short_answer"}


def test_a_reward_may_have_named_parts(own):
  task = own("parts", format=".*", format_weight=0.5)
  outcome = task.verify(task.problem("heldout", 0), "neat", False)
  assert outcome == Outcome(0.625, False, False, parts={"tests": 3.0, "style": 1.0})


def test_final_answers_are_the_verifiers_own_or_there_are_none(own):
  task = own("first_word", thinking_end="</think>")
  assert task.final_answer("so</think> 4 apples") == "4"
  assert task.final_answer("so</think>") is None
  assert own("half").final_answer is None


@pytest.mark.parametrize("completion", ["hang", "spin", "exit", "crash"])
def test_one_that_hangs_or_crashes_gives_no_verdict_and_the_next_one_is_fresh(
  own, capfd, completion
):
  task = own("odd", verifier_seconds=2.0 if completion in ("hang", "spin") else 60.0)
  problem = task.problem("heldout", 0)
  assert task.verify(problem, "right", False) == Outcome(1.0, True, False)
  assert task.verify(problem, completion, False) == Outcome(0.0, False, False, judged=False)
  assert task.verify(problem, "right", False) == Outcome(1.0, True, False)
  said = {
    "hang": "took over 2 s",
    "spin": "took over 2 s",
    "exit": "exit status 3",
    "crash": "SIGSEGV",
  }[completion]
  warning = capfd.readouterr().err
  assert (
    f"warning: task.verifier own_verifier:odd {said}" in warning
    or f"ended its process ({said})" in warning
  )
  assert "such ones are not trained on (train/unjudged)" in warning


def test_one_that_never_gives_a_verdict_ends_the_run(own):
  task = own("odd")
  problem = task.problem("heldout", 0)
  assert not any(task.verify(problem, "exit", False).judged for _ in range(15))
  said = r"own_verifier:odd: no verdict on 16 completions in a row: it ended its process"
  with pytest.raises(UserError, match=said):
    task.verify(problem, "exit", False)


def test_many_are_verified_at_once_and_their_outcomes_keep_their_order(own):
  task = own("same")
  attempts = [
    (task.problem("train", i), f"#### {j}", i % 5 == 0) for i in range(N) for j in range(2, 6)
  ]
  outcomes = verify(task, attempts)
  assert [o.correct for o in outcomes] == [
    not cut and text in p.answer for p, text, cut in attempts
  ]
  broken = own("broken")
  with pytest.raises(UserError, match="ZeroDivisionError"):
    verify(broken, attempts)


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("broken", r"ZeroDivisionError: division by zero \(.*own_verifier\.py, line \d+\)"),
    ("quits", "SystemExit: enough"),
    ("double", "it gave 2"),
    ("nothing", "nan"),
    ("endless", "a part that is not finite"),
    ("nameless", "has no 'reward'"),
    ("old", r"old\(\) missing 1 required positional argument: 'reference'"),
  ],
)
def test_a_function_that_fails_stops_the_run_with_a_sentence(own, name, said):
  task = own(name)
  with pytest.raises(
    UserError, match=rf"task\.verifier own_verifier:{name}, question 'Tom.*{said}.*run again"
  ):
    task.verify(task.problem("heldout", 0), "2", False)


@pytest.mark.parametrize("name", ["no_such_module:f", "json:no_such_function", "sys:maxsize"])
def test_a_function_that_does_not_exist(make, name):
  with pytest.raises(UserError, match=rf"task\.verifier: cannot import {name} .*PYTHONPATH"):
    make(verifier=name)


@pytest.mark.parametrize("completion", ["right", "spin"])
def test_no_verifier_outlives_the_run(tmp_path, completion):
  """Not even where the run is killed while a call hangs."""
  (tmp_path / "own_verifier.py").write_text(OWN)
  program = (
    "import sys, threading, time\n"
    "from dca_jax.tasks.judge import Judge\n"
    "judge = Judge('own_verifier:odd', 0.5, 1)\n"
    "print(judge._idle.queue[0]._process.pid, flush=True)\n"
    f"threading.Thread(target=judge.verify, args=({{}}, {completion!r}), daemon=True).start()\n"
    "time.sleep(0.2)\nprint('asked', flush=True)\ntime.sleep(60)\n"
  )
  path = os.pathsep.join([str(tmp_path), str(pathlib.Path(patterns.__file__).parents[1])])
  run = subprocess.Popen(
    [sys.executable, "-c", program],
    stdout=subprocess.PIPE,
    text=True,
    env=os.environ | {"PYTHONPATH": path},
  )
  worker = int(run.stdout.readline())
  while run.stdout.readline() != "asked\n":
    pass
  run.kill()
  run.wait()
  deadline = time.monotonic() + 300
  while pathlib.Path(f"/proc/{worker}").exists() and _state(worker) != "Z":
    assert time.monotonic() < deadline, "the verifier's process is still there"
    time.sleep(0.05)


def _state(process: int) -> str:
  try:
    return pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0]
  except OSError:
    return "Z"


# Steps.

TEXT = "Let me see.\n\n1.\nTom has 3 apples. He buys 4!\n\\[\n3 + 4 = 7\n\\]\n\nSo it is 7."


@pytest.mark.parametrize(
  ("steps", "expected"),
  [
    (
      "line",
      [
        "Let me see.\n\n",
        "1.\nTom has 3 apples. He buys 4!\n",
        "\\[\n3 + 4 = 7\n",
        "\\]\n\nSo it is 7.",
      ],
    ),
    (
      "paragraph",
      [
        "Let me see.\n\n",
        "1.\nTom has 3 apples. He buys 4!\n\\[\n3 + 4 = 7\n\\]\n\n",
        "So it is 7.",
      ],
    ),
    (
      "sentence",
      [
        "Let me see.\n\n",
        "1.\nTom has 3 apples. ",
        "He buys 4!\n",
        "\\[\n3 + 4 = 7\n",
        "\\]\n\nSo it is 7.",
      ],
    ),
    (
      r"\. ",
      ["Let me see.\n\n1.\nTom has 3 apples. ", "He buys 4!\n\\[\n3 + 4 = 7\n\\]\n\nSo it is 7."],
    ),
  ],
)
def test_steps_of_a_text(make, steps, expected):
  task = make(steps=steps)
  pieces = [c.encode() for c in TEXT] + [b""]  # The end token is silent.
  spans = cut(pieces, task.step_end, *task.step_limits)
  assert [TEXT[a:b] for a, b in spans] == expected
  spans = cut([c.encode() for c in TEXT + "\n"] + [b""], task.step_end, task.step_limits[0], 2)
  assert len(spans) == 2
  assert spans[-1][1] == len(TEXT) + 2
