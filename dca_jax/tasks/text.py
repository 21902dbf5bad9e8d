"""Free-text tasks: questions and answers from TensorFlow Datasets or JSONL files, for language models."""

import codecs
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from dca_jax import patterns
from dca_jax.doors import door
from dca_jax.errors import UserError
from dca_jax.tasks.judge import Judge, Verdict, VerifierError
from dca_jax.tasks.tokenizer import load_tokenizer
from dca_jax.tasks.types import Outcome, Problem, TaskConfig
from dca_jax.tasks.verifiers import VERIFIERS, reference

_STEPS = {
  "line": r"\n(?:[^\S\n]*\n)*",
  "paragraph": r"\n[^\S\n]*\n\s*",
  # What closes a sentence is looked at once, from its beginning: anything else takes a time quadratic in its length.
  "sentence": r"(?<![.!?\"'”’)\]*])[\"'”’)\]*]*+[.!?][.!?\"'”’)\]*]*+\s+|[。！？]+\s*|\n\s*",
}

# Set before a chat template that asks for the day: what a run asks may not depend on when it runs.
_TODAY = datetime.datetime(2024, 7, 26)
_CALENDAR = "".join(
  f"|replace('%{code}', '{_TODAY.strftime(f'%{code}')}')"
  for code in ("-d", "-m", *"aAbBcdeFHIjmMpSTuUVwWxXyY%")
)
_CLOCK = f"{{% macro strftime_now(format) %}}{{{{ format{_CALENDAR} }}}}{{% endmacro %}}\n"


_MEND = "mend it, then run again to go on"


@dataclasses.dataclass(frozen=True)
class TextConfig(TaskConfig):
  """The `task` section for `tfds` and `jsonl`."""

  name: str = "tfds"
  dataset: str = ""
  data_dir: str = ""
  """`tfds`: a data set such as `gsm8k`, and where it is or is downloaded to, if that is not TFDS's own folder."""
  split: str = "train"
  heldout_split: str = "test"
  """`tfds`: splits; `train[:90%]` is one too."""
  path: str = ""
  heldout_path: str = ""
  heldout_fraction: float = 0.0
  """`jsonl`: files with one JSON object a line; or one file, and the share of its questions that is held out. A hash of
  each question decides, so its copies stay on one side, and neither another order nor further lines move any."""
  question: str = "question"
  answer: str = "answer"
  """Names of fields; the answer may be a worked solution that states the answer, as GSM8K's are with `####`."""
  verifier: str = door("number")
  """`number`, `exact` or `choice` (see `verifiers`), or your own, MODULE:FUNCTION or
  path/to/file.py:FUNCTION: called with the row of the data set and the completion it gives a reward
  from 0 to 1, of which only 1 counts as correct, or a dict with
  a `reward` and further numbers (see `judge`). If it raises, the run stops and can go on later.
  Truncated completions are wrong; it never sees them."""
  verifier_seconds: float = 10.0
  """How long your own may take for a completion, which is otherwise not trained on."""
  thinking_end: str = ""
  """Such as `</think>`: the verifier reads only what follows the last one, and nothing where there is none."""
  format: str = ""
  format_weight: float = 0.0
  """Regular expression for a whole completion, without the white space around it (`.` matches line ends too), and the
  share of the reward that it decides; correctness decides the rest, and accuracy never counts form."""
  steps: str = "line"
  """`line`, `paragraph`, `sentence`, or a regular expression: a step ends where a match ends."""
  min_step_chars: int = 4
  max_steps: int = 32
  """A shorter step, such as `1.` on a line of its own, joins the next one; steps beyond the most join the last."""
  tokenizer: str = ""
  """Folder or hub id of a tokenizer; empty is that of policy.pretrained."""
  prompt: str = "{question}"
  """What the policy is asked, such as `{question} Put the answer after ####.`"""
  chat_template: bool = True
  """Writes the prompt as the tokenizer's chat template does."""
  system_prompt: str = ""
  template_kwargs: str = "{}"
  """JSON object of further arguments to the chat template, such as `{"enable_thinking": false}`. A
  template that asks for today's date is told 26 July 2024, which is Llama's where it knows none."""

  def open(self) -> "Text":
    return Text(self)

  def implied(self, pretrained: str) -> dict[str, Any]:
    return {"tokenizer": pretrained}

  def check(self) -> dict[str, str]:
    known = self.verifier in VERIFIERS or re.fullmatch(r"([\w.]+|.+\.py):[\w.]+", self.verifier)
    # A lone word is a slip; nobody ends steps with one.
    typo = self.steps not in _STEPS and not re.search(r"\W", self.steps)
    source = "path" if self.name == "jsonl" else "dataset"
    not_one = self.name == "jsonl" and bool(self.heldout_path) == bool(self.heldout_fraction)
    rules = {
      source: (not getattr(self, source), f"must be given, because task.name is '{self.name}'"),
      "heldout_path": (not_one, "either this or task.heldout_fraction must be given, and not both"),
      "heldout_fraction": (not 0 <= self.heldout_fraction < 1, "must be above 0 and below 1"),
      "heldout_split": (self.heldout_split == self.split, "must differ from task.split"),
      "verifier": (not known, f"must be one of {', '.join(VERIFIERS)}, or MODULE:FUNCTION"),
      "verifier_seconds": (
        not 0 < self.verifier_seconds <= 3600,
        "must be positive and at most 3600",
      ),
      "format": (
        bool(self.format) != (self.format_weight > 0),
        "must be given where format_weight is, and only there",
      ),
      "format_weight": (not 0 <= self.format_weight < 1, "must be at least 0 and below 1"),
      "steps": (typo, f"must be one of {', '.join(_STEPS)}, or a regular expression"),
      "max_steps": (self.max_steps < 1, "must be at least 1"),
      "prompt": ("{question}" not in self.prompt, "must hold {question}"),
      "tokenizer": (not self.tokenizer, "must be given, because policy.pretrained is not"),
    }
    bad = {key: why for key, (wrong, why) in rules.items() if wrong}
    return bad | {
      key: why for key in ("format", "steps") if (why := patterns.mistake(getattr(self, key)))
    }

  def unused(self) -> dict[str, str]:
    tfds, jsonl = (
      ("dataset", "data_dir", "split", "heldout_split"),
      ("path", "heldout_path", "heldout_fraction"),
    )
    unused = dict.fromkeys(tfds if self.name == "jsonl" else jsonl, f"task.name is '{self.name}'")
    if self.verifier in VERIFIERS:
      unused["verifier_seconds"] = f"task.verifier '{self.verifier}' needs no limit"
    if not self.chat_template:
      unused |= dict.fromkeys(("system_prompt", "template_kwargs"), "task.chat_template is False")
    return unused


class Text:
  """The task. What is wrong with its data, tokenizer or verifier raises a UserError, here or in `problem`."""

  def __init__(self, config: TextConfig):
    self.config = config
    self.step_end = _STEPS.get(config.steps, config.steps)
    self.step_limits = config.min_step_chars, config.max_steps
    own = config.verifier not in VERIFIERS
    self.concurrency = min(8, os.cpu_count() or 1) if own else 1
    self._judge = Judge(config.verifier, config.verifier_seconds, self.concurrency) if own else None
    votes = self._judge is None or self._judge.has_final_answer
    self.final_answer = self._final_answer if votes else None
    read, key = (_read_jsonl, "path") if config.name == "jsonl" else (_open_tfds, "split")
    train = read(config, key)
    self._rows = {
      "train": train,
      "heldout": train if config.heldout_fraction else read(config, f"heldout_{key}"),
    }
    self._numbers: Mapping[str, Sequence[int]] = {
      split: range(len(rows)) for split, (rows, _) in self._rows.items()
    }
    if config.heldout_fraction:
      self._numbers = self._hold_out(*train)
    self.sizes = {split: len(numbers) for split, numbers in self._numbers.items()}
    tokenizer = self._tokenizer = load_tokenizer(config.tokenizer)
    if config.chat_template and not tokenizer.chat_template:
      raise UserError(
        f"task.chat_template: {config.tokenizer!r} has none; set it to False, and see task.prompt"
      )
    # As a chat template would, start with what the tokenizer starts with.
    self._start = (
      tokenizer.bos_token if tokenizer.bos_token_id in tokenizer("")["input_ids"] else ""
    )
    self._order = functools.lru_cache(4)(
      lambda *key: np.random.default_rng(key).permutation(self.sizes["train"])
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
    rows, where = self._rows[split]
    row = self._numbers[split][row]
    here = where(row)
    question, answer = (self._field(rows[row], key, here) for key in ("question", "answer"))
    if self._judge is None:
      final = reference(self.config.verifier, answer)
      if final is None:
        raise UserError(
          f"{here}: task.verifier '{self.config.verifier}' finds no answer in {answer[-60:]!r}"
        )
      answer = final
    return Problem(
      index, question, answer, self.render(question), _plain(rows[row]) if self._judge else {}
    )

  def _hold_out(self, rows: Sequence, where: Callable[[int], str]) -> dict[str, list[int]]:
    """The numbers of each split's rows, where `task.heldout_fraction` splits them."""
    numbers: dict[str, list[int]] = {"train": [], "heldout": []}
    for i, row in enumerate(rows):
      digest = hashlib.sha256(self._field(row, "question", where(i)).encode()).digest()
      held_out = int.from_bytes(digest[:8]) / 2**64 < self.config.heldout_fraction
      numbers["heldout" if held_out else "train"].append(i)
    if not all(numbers.values()):
      said = f"{self.config.heldout_fraction} leaves nothing to {'hold out' if numbers['train'] else 'train on'}"
      raise UserError(
        f"task.heldout_fraction: {said} of {self.config.path}; set another, or give task.heldout_path"
      )
    return numbers

  def verify(self, problem: Problem, completion: str, truncated: bool) -> Outcome:
    """See `TextConfig`: `verifier`, `thinking_end`, `format`."""
    if truncated:
      return Outcome(0.0, False, True)
    text, weight = self._after_thinking(completion), self.config.format_weight
    verdict: Verdict | None
    if self._judge is None:
      verdict = Verdict(float(VERIFIERS[self.config.verifier](text) == problem.answer), {})
    else:
      try:
        verdict = self._judge.verify(problem.row, text)
      except VerifierError as error:
        where = f"question {problem.prompt[:60]!r} (problem {problem.id})"
        raise UserError(
          f"task.verifier {self.config.verifier}, {where}: {error}; {_MEND}"
        ) from None
    if verdict is None:
      return Outcome(0.0, False, False, judged=False)
    try:
      formed = bool(weight) and patterns.fullmatch(self.config.format, completion.strip())
    except TimeoutError:
      patterns.warn_slow("task.format", self.config.format, "then counts as not formed")
      formed = False
    reward = (1 - weight) * verdict.reward + weight * formed
    return Outcome(reward, verdict.reward == 1, False, parts=verdict.parts)

  def _final_answer(self, completion: str) -> str | None:
    text = self._after_thinking(completion)
    if self._judge is None:
      return VERIFIERS[self.config.verifier](text)
    try:
      return self._judge.final_answer(text)
    except VerifierError as error:
      raise UserError(
        f"task.verifier {self.config.verifier}, final_answer: {error}; {_MEND}"
      ) from None

  def _after_thinking(self, completion: str) -> str:
    end = self.config.thinking_end
    return completion if not end else completion.rpartition(end)[2] if end in completion else ""

  def _field(self, row, key: str, here: str) -> str:
    name = getattr(self.config, key)
    value = row.get(name)
    # JSON can hold half a character.
    raw = value if isinstance(value, bytes) else str(value).encode(errors="replace")
    text = raw.decode(errors="replace").strip()
    words = isinstance(value, bytes | str)
    readable = words or (
      isinstance(value, int | float | np.number) and text not in ("nan", "inf", "-inf")
    )
    if not readable or not text:
      said = (
        f"the field {name!r} must be text or a number, not {value!r}; there are {', '.join(row)}"
      )
      raise UserError(f"task.{key}: {here}: {said}")
    return text

  def render(self, question: str) -> str:
    text = self.config.prompt.replace("{question}", question)
    if not self.config.chat_template:
      return self._start + text
    said = {"system": self.config.system_prompt, "user": text}
    messages = [{"role": role, "content": content} for role, content in said.items() if content]
    try:
      options = json.loads(self.config.template_kwargs)
      template = self._tokenizer.get_chat_template(options.pop("chat_template", None))
      template = _CLOCK + template if "strftime_now" in template else template
      return self._tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True, **options
      )
    except Exception as error:  # A template raises what it likes.
      raise UserError(
        f"task.chat_template or task.template_kwargs: the template fails ({error})"
      ) from None


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
  """A row as plain Python values, which TFDS gives as bytes and arrays."""
  plain = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in row.items()}
  return {k: v.decode(errors="replace") if isinstance(v, bytes) else v for k, v in plain.items()}


def _open_tfds(config: TextConfig, key: str) -> tuple[Sequence, Callable[[int], str]]:
  """The rows of a split, and where each of them is, for messages."""
  import tensorflow_datasets as tfds

  split = getattr(config, key)
  with contextlib.suppress(
    ImportError
  ):  # TFDS knows its text data sets only once they are imported.
    importlib.import_module(f"tensorflow_datasets.text.{re.split('[/:]', config.dataset)[0]}")
  try:
    rows = tfds.data_source(config.dataset, split=split, data_dir=config.data_dir or None)
    if not len(rows):
      raise ValueError("it is empty")
  except (
    Exception
  ) as error:  # Of many types: no such data set, no such split, no network, another file format.
    reason = " ".join(str(error).split())[:300]
    raise UserError(
      f"task.{key}: cannot open {split!r} of task.dataset {config.dataset!r} ({reason})"
    ) from None
  return rows, lambda row: f"{config.dataset}, split {split!r}, example {row + 1}"


def _read_jsonl(config: TextConfig, key: str) -> tuple[Sequence, Callable[[int], str]]:
  """As `_open_tfds`. Lines end with a line feed alone: a text may hold other ends of lines."""
  path, rows, numbers = getattr(config, key), [], []
  try:
    lines = epath.Path(path).expanduser().read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
  except OSError as error:
    raise UserError(f"task.{key}: cannot read {path} ({error})") from None
  for number, line in enumerate(lines, 1):
    try:
      if line.strip():
        row = json.loads(line.decode(), object_pairs_hook=_unique, parse_constant=_no_number)
        if not isinstance(row, dict):
          raise TypeError(f"it is a {type(row).__name__}")
        rows.append(row)
        numbers.append(number)
    except UnicodeDecodeError as error:
      raise UserError(
        f"task.{key}: cannot read {path}, line {number}, which is not UTF-8 ({error})"
      ) from None
    except (RecursionError, TypeError, ValueError) as error:
      raise UserError(f"task.{key}: {path}, line {number} is not a JSON object ({error})") from None
  if not rows:
    raise UserError(f"task.{key}: {path}, line 1 is not a JSON object (the file is empty)")
  return rows, lambda row: f"{path}, line {numbers[row]}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """An object whose keys differ; which of two was meant, nobody can know."""
  made = dict(pairs)
  if len(made) < len(pairs):
    twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
    raise ValueError(f"it has {twice!r} twice")
  return made


def _no_number(name: str):
  raise ValueError(f"{name} is no number in JSON")
