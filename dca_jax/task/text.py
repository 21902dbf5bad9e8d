"""Free-text tasks: questions and answers from TensorFlow Datasets or JSONL files, for language models."""

import contextlib
import dataclasses
import functools
import importlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from dca_jax.errors import UserError
from dca_jax.task.tokenizer import load_tokenizer
from dca_jax.task.types import Outcome, Problem
from dca_jax.task.verifiers import VERIFIERS

_STEPS = {
  "line": r"\n(?:[^\S\n]*\n)*",
  "paragraph": r"\n[^\S\n]*\n\s*",
  "sentence": r"[.!?][.!?\"'”’)\]*]*\s+|[。！？]+\s*|\n\s*",
}


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """The `task` section for `tfds` and `jsonl`."""

  name: str = "tfds"
  dataset: str = ""
  """`tfds`: a data set's name as TFDS writes it, such as `gsm8k`. TensorFlow is not needed."""
  data_dir: str = ""
  """`tfds`: where the data is, or is downloaded to; empty is TFDS's own folder."""
  split: str = "train"
  heldout_split: str = "test"
  path: str = ""
  """`jsonl`: a file with one JSON object a line."""
  heldout_path: str = ""
  """`jsonl`: the file of held-out problems; empty holds out some of `path`."""
  heldout_frac: float = 0.1
  """`jsonl`: how many, always the same ones."""
  question: str = "question"
  answer: str = "answer"
  """Names of fields; the answer may be a worked solution that states the answer, as GSM8K's are with `####`."""
  verifier: str = "number"
  """`number`, `exact` or `choice` (see `verifiers`), or a function of your own, MODULE:FUNCTION: called with (question,
  completion, reference answer) it returns whether the completion is right, or a number from 0 to 1; only 1 counts as
  correct. If it raises, the run stops with what it said and can go on later. It is not called for truncated
  completions; they are never correct."""
  thinking_end: str = ""
  """Such as `</think>`: the verifier reads only what follows the last one, and nothing where there is none."""
  format: str = ""
  """Regular expression for the form of a whole completion; white space around that is left out, and `.` matches line
  ends too."""
  format_weight: float = 0.0
  """The reward is (1 - format_weight) for correctness and format_weight for form; accuracy never counts form."""
  steps: str = "line"
  """`line`, `paragraph`, `sentence`, or a regular expression: a step ends where a match ends."""
  min_step_chars: int = 4
  """A step with fewer characters, such as `1.` on a line of its own, is joined to the next one."""
  max_steps: int = 32
  """What follows is joined to the last step."""
  tokenizer: str = ""
  """Folder or hub id of a tokenizer; empty is that of policy.pretrained."""
  prompt: str = "{question}"
  """What the policy is asked, such as `{question} Put the answer after ####.`"""
  chat_template: bool = True
  """Writes the prompt as the tokenizer's chat template does."""
  system_prompt: str = ""
  template_kwargs: str = "{}"
  """JSON object of further arguments to the chat template, such as `{"enable_thinking": false}`."""

  def check(self) -> dict[str, str]:
    bad = {}
    source = "path" if self.name == "jsonl" else "dataset"
    if not getattr(self, source):
      bad[source] = f"must be given, because task.name is '{self.name}'"
    if self.name == "tfds" and self.heldout_split == self.split:
      bad["heldout_split"] = "must differ from task.split"
    if not 0 < self.heldout_frac < 1:
      bad["heldout_frac"] = "must be between 0 and 1"
    if self.verifier not in VERIFIERS and not re.fullmatch(r"[\w.]+:\w+", self.verifier):
      bad["verifier"] = f"must be one of {', '.join(VERIFIERS)}, or MODULE:FUNCTION"
    if not 0 <= self.format_weight < 1:
      bad["format_weight"] = "must be at least 0 and below 1"
    if bool(self.format) != bool(self.format_weight):
      bad["format"] = f"must be given exactly where task.format_weight ({self.format_weight:g}) is not 0"
    if self.steps not in _STEPS and re.fullmatch(r"\w*", self.steps):
      bad["steps"] = f"must be one of {', '.join(_STEPS)}, or a regular expression"
    for key in ("format", "steps"):
      try:
        re.compile(getattr(self, key))
      except re.error as error:
        bad[key] = f"is no regular expression ({error})"
    for key in ("min_step_chars", "max_steps"):
      if getattr(self, key) < 1:
        bad[key] = "must be at least 1"
    if "{question}" not in self.prompt:
      bad["prompt"] = "must hold {question}"
    try:
      if not isinstance(json.loads(self.template_kwargs), dict):
        raise ValueError
    except ValueError:
      bad["template_kwargs"] = "must be a JSON object"
    return bad

  def unused(self) -> dict[str, str]:
    other = ("dataset", "data_dir", "split", "heldout_split")
    if self.name == "tfds":
      other = ("path", "heldout_path", "heldout_frac")
    unused = dict.fromkeys(other, f"task.name is '{self.name}'")
    if self.heldout_path:
      unused["heldout_frac"] = "task.heldout_path is given"
    if not self.chat_template:
      unused |= dict.fromkeys(("system_prompt", "template_kwargs"), "task.chat_template is False")
    return unused


class _Split(NamedTuple):
  rows: Sequence[Any]
  """Mappings from fields to values, with random access."""
  place: Callable[[int], str]
  """Where a row is, for people."""


class Text:
  """The task; reads its data and its tokenizer when it is made, and problems when they are asked for.

  Raises:
    UserError: the data, the tokenizer, or the verifier's function cannot be loaded; from `problem`, a field is missing
      or empty, or the verifier cannot read the reference answer.
  """

  def __init__(self, config: TextConfig):
    self.config = config
    self.step_end = _STEPS.get(config.steps, config.steps)
    self.min_step_chars, self.max_steps = config.min_step_chars, config.max_steps
    self._own = _import(config.verifier) if config.verifier not in VERIFIERS else None
    self._final = VERIFIERS.get(config.verifier, VERIFIERS["exact"])
    self._splits = _open_jsonl(config) if config.name == "jsonl" else _open_tfds(config)
    self.sizes = {name: len(split.rows) for name, split in self._splits.items()}
    self._tokenizer = load_tokenizer(config.tokenizer)
    if config.chat_template and not self._tokenizer.chat_template:
      raise UserError(f"task.chat_template: {config.tokenizer!r} has none; set it to False and write task.prompt in full")
    # As a chat template would, start with what the tokenizer starts with.
    starts = self._tokenizer.bos_token_id in self._tokenizer("")["input_ids"]
    self._start = self._tokenizer.bos_token if starts else ""
    self._order = functools.lru_cache(4)(
      lambda seed, epoch: np.random.default_rng([seed, epoch]).permutation(self.sizes["train"])
    )

  def tokenizer(self):
    return self._tokenizer

  def problem(self, split: str, index: int) -> Problem:
    """Problem number `index`. Training goes through the data again and again, each time in an order of its own, which
    depends on the seed in the index's upper bits (see `batch.collect`)."""
    row = index
    if split == "train":
      seed, number = divmod(index, 2**32)
      epoch, place = divmod(number, self.sizes[split])
      row = int(self._order(seed, epoch)[place])
    fields, place = self._splits[split].rows[row], self._splits[split].place(row)
    question, answer = (self._field(fields, key, place) for key in ("question", "answer"))
    if not self._own:
      # A bare answer is held to what a statement is held to: it may not be ambiguous.
      stated = "####" in answer or "\\boxed" in answer
      final = self._final(answer if stated else f"#### {' '.join(answer.split())}")
      if final is None:
        raise UserError(f"{place}: the verifier {self.config.verifier!r} finds no answer in {answer[-60:]!r}")
      answer = final
    return Problem(index, question, answer, self._render(question))

  def verify(self, problem: Problem, completion: str, truncated: bool) -> Outcome:
    """See `TextConfig`: `verifier`, `thinking_end`, `format`."""
    if truncated:
      return Outcome(0.0, False, True)
    if self._own:
      score = self._ask(self._own, problem, self._after_thinking(completion))
    else:
      score = float(self.final_answer(completion) == problem.answer)
    weight = self.config.format_weight
    formed = bool(weight) and re.fullmatch(self.config.format, completion.strip(), re.DOTALL) is not None
    return Outcome((1 - weight) * score + weight * formed, score == 1, False)

  def final_answer(self, completion: str) -> str | None:
    return self._final(self._after_thinking(completion))

  def _after_thinking(self, completion: str) -> str:
    end = self.config.thinking_end
    if not end:
      return completion
    return completion.rpartition(end)[2] if end in completion else ""

  def _ask(self, function: Callable, problem: Problem, text: str) -> float:
    where = f"task.verifier: {self.config.verifier} on the question {problem.prompt[:60]!r}"
    try:
      score = float(function(problem.prompt, text, problem.answer))
    except Exception as error:
      raise UserError(f"{where}: {type(error).__name__}: {error}; mend it, then run again to go on") from error
    if not 0 <= score <= 1:
      raise UserError(f"{where}: gave {score}, not a number from 0 to 1; mend it, then run again to go on")
    return score

  def _field(self, row, key: str, place: str) -> str:
    name = getattr(self.config, key)
    if name not in row:
      raise UserError(f"task.{key}: {place} has no field {name!r}; there are {', '.join(row)}")
    value = row[name].decode(errors="replace") if isinstance(row[name], bytes) else row[name]
    if not isinstance(value, str | int | float | np.number) or not str(value).strip():
      raise UserError(f"task.{key}: {place}: the field {name!r} must be text or a number, not {value!r}")
    return str(value).strip()

  def _render(self, question: str) -> str:
    text = self.config.prompt.replace("{question}", question)
    if not self.config.chat_template:
      return self._start + text
    messages = [{"role": "system", "content": self.config.system_prompt}] if self.config.system_prompt else []
    messages.append({"role": "user", "content": text})
    options = json.loads(self.config.template_kwargs)
    try:
      return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    except Exception as error:  # A template raises what it likes.
      raise UserError(f"task.chat_template: the tokenizer's template fails ({type(error).__name__}: {error})") from None


def _import(name: str) -> Callable:
  module, _, function = name.partition(":")
  try:
    return getattr(importlib.import_module(module), function)
  except Exception as error:  # The module may raise anything.
    raise UserError(
      f"task.verifier: cannot import {name} ({type(error).__name__}: {error}); its folder must be on PYTHONPATH"
    ) from None


def _open_tfds(config: TextConfig) -> dict[str, _Split]:
  import tensorflow_datasets as tfds

  with contextlib.suppress(ImportError):  # TFDS knows its text data sets only once they are imported.
    importlib.import_module(f"tensorflow_datasets.text.{re.split('[/:]', config.dataset)[0]}")
  splits = {}
  for name, split in (("train", config.split), ("heldout", config.heldout_split)):
    try:
      rows = tfds.data_source(config.dataset, split=split, data_dir=config.data_dir or None)
    except Exception as error:  # Of many types: no such data set, no such split, no network, another file format.
      reason = " ".join(str(error).split())[:300]
      raise UserError(
        f"task.dataset: cannot open {config.dataset!r}, split {split!r}, in task.data_dir {config.data_dir!r} ({reason})"
      ) from None
    if not len(rows):
      raise UserError(f"task.dataset: split {split!r} of {config.dataset!r} is empty")
    splits[name] = _Split(rows, functools.partial("{}, split '{}', example {}".format, config.dataset, split))
  return splits


def _open_jsonl(config: TextConfig) -> dict[str, _Split]:
  train = _read_jsonl("path", config.path)
  if config.heldout_path:
    return {"train": train, "heldout": _read_jsonl("heldout_path", config.heldout_path)}
  if len(train.rows) < 2:
    raise UserError(f"task.path: {config.path} has one problem, so none can be held out; set task.heldout_path")
  order = np.random.default_rng(0).permutation(len(train.rows)).tolist()
  count = min(max(1, round(config.heldout_frac * len(order))), len(order) - 1)
  rows = {"heldout": order[:count], "train": sorted(order[count:])}
  return {
    name: _Split([train.rows[i] for i in own], lambda i, own=own: train.place(own[i])) for name, own in rows.items()
  }


def _read_jsonl(key: str, path: str) -> _Split:
  try:
    lines = epath.Path(path).expanduser().read_text(encoding="utf-8").split("\n")
  except (OSError, ValueError) as error:
    raise UserError(f"task.{key}: cannot read {path} ({error})") from None
  rows, numbers = [], []
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
      if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    except ValueError as error:
      raise UserError(f"task.{key}: {path}, line {number} is not a JSON object ({error})") from None
    rows.append(row)
    numbers.append(number)
  if not rows:
    raise UserError(f"task.{key}: {path} is empty")
  return _Split(rows, lambda i: f"{path}, line {numbers[i]}")
