"""Free-text tasks: questions and answers for language models, from wherever a source has them (see
`sources`)."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dca_jax import patterns
from dca_jax.doors import door, require
from dca_jax.errors import UserError
from dca_jax.tasks.chat import Chat, ChatConfig
from dca_jax.tasks.judge import Judge, Verdict, VerifierError
from dca_jax.tasks.types import Outcome, Problem
from dca_jax.tasks.verifiers import JUDGED, VERIFIERS, boxed, formula, given_answer, reference

_STEPS = {
  "line": r"\n(?:[^\S\n]*\n)*",
  "paragraph": r"\n[^\S\n]*\n\s*",
  # What closes a sentence is looked at once, from its beginning: anything else takes a time
  # quadratic in its length.
  "sentence": r"(?<![.!?\"'”’)\]*])[\"'”’)\]*]*+[.!?][.!?\"'”’)\]*]*+\s+|[。！？]+\s*|\n\s*",
}

_MEND = "mend it, then run again to go on"


class Rows(NamedTuple):
  """The rows of a data set, of which some make a part of the task."""

  rows: Sequence[Any]
  where: Callable[[int], str]
  """Where a row is, for messages."""
  numbers: Sequence[int]
  """Of the rows that belong to the part."""


@dataclasses.dataclass(frozen=True)
class TextConfig(ChatConfig):
  """The `task` section of every source, which extends it with where its data are."""

  question: str = "question"
  """Name of the field that holds a row's question."""
  answer: str = "answer"
  """Name of the field that holds a row's right answer; that may be a worked solution that states
  the answer, as GSM8K's are with `####`."""
  verifier: str = door("number")
  """`number`, `exact` or `choice` (see `verifiers`), `math` (formulas, by math-verify), or your
  own, MODULE:FUNCTION or path/to/file.py:FUNCTION: called with the row of the data set and the
  completion it gives a reward from 0 to 1, of which only 1 counts as correct, or a dict with a
  `reward` and further numbers (see `judge`). If it raises, the run stops and can go on later.
  Truncated completions are wrong; it never sees them."""
  verifier_seconds: float = 10.0
  """How long `math` or your own may take for a completion, which is otherwise not trained on."""
  thinking_end: str = ""
  """Such as `</think>`: the verifier reads only what follows the last one, and nothing
  where there is none."""
  format: str = ""
  """Regular expression that a whole completion should match, without the white space around it (`.`
  matches line ends too); empty asks for no form."""
  format_weight: float = 0.0
  """Share of the reward that `format` decides, below 1; correctness decides the rest, and accuracy
  never counts form."""
  steps: str = "line"
  """`line`, `paragraph`, `sentence`, or a regular expression: a step ends where a match ends."""
  min_step_chars: int = 4
  """Fewest characters of a step, white space aside: a shorter one, such as `1.` on a line of its
  own, joins the next one, and at the end the one before."""
  max_steps: int = 32
  """Most steps of a completion; what comes after them is part of the last."""

  def parts(self) -> dict[str, Rows]:
    """`train` and `heldout`; UserError where they cannot be read."""
    raise NotImplementedError

  def field(self, row: Mapping[str, Any], key: str, here: str) -> str:
    """The text of a row's `question` or `answer`; UserError where there is none."""
    name = getattr(self, key)
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

  def open(self) -> "Text":
    return Text(self)

  def check(self) -> dict[str, str]:
    built_in = {**VERIFIERS, **JUDGED}
    known = self.verifier in built_in or re.fullmatch(r"([\w.]+|.+\.py):[\w.]+", self.verifier)
    # A lone word is a slip; nobody ends steps with one.
    typo = self.steps not in _STEPS and not re.search(r"\W", self.steps)
    rules = {
      "verifier": (not known, f"must be one of {', '.join(built_in)}, or MODULE:FUNCTION"),
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
      "tokenizer": (not self.tokenizer, "must be given, because policy.pretrained is not"),
    }
    bad = {key: why for key, (wrong, why) in rules.items() if wrong}
    return (
      super().check()
      | bad
      | {key: why for key in ("format", "steps") if (why := patterns.mistake(getattr(self, key)))}
    )

  def unused(self) -> dict[str, str]:
    unlimited = {"verifier_seconds": f"task.verifier '{self.verifier}' needs no limit"}
    return super().unused() | (unlimited if self.verifier in VERIFIERS else {})


class Text:
  """The task. What is wrong with its data, tokenizer or verifier raises a UserError, here
  or in `problem`."""

  def __init__(self, config: TextConfig):
    self.config = config
    self.step_end = _STEPS.get(config.steps, config.steps)
    self.step_limits = config.min_step_chars, config.max_steps
    apart, self._reads_formulas = config.verifier not in VERIFIERS, config.verifier in JUDGED
    if self._reads_formulas:
      require("math_verify", "math", "task.verifier")
    self.concurrency = min(8, os.cpu_count() or 1) if apart else 1
    verifier = JUDGED.get(config.verifier, config.verifier)
    self._judge = Judge(verifier, config.verifier_seconds, self.concurrency) if apart else None
    votes = self._judge is None or self._judge.has_final_answer
    self.final_answer = self._final_answer if votes else None
    self._value = functools.cache(self._judged)
    self._parts = config.parts()
    self.sizes = {part: len(rows.numbers) for part, rows in self._parts.items()}
    self._chat = Chat(config)
    self._order = functools.lru_cache(4)(
      lambda *key: np.random.default_rng(key).permutation(self.sizes["train"])
    )

  def tokenizer(self):
    return self._chat.tokenizer

  def problem(self, split: str, index: int) -> Problem:
    """Problem number `index`. Training goes through the data again and again, each time in an order
    of its own, which depends on the seed in the index's upper bits (see `rollout.collect`)."""
    row = index
    if split == "train":
      seed, number = divmod(index, 2**32)
      epoch, place = divmod(number, self.sizes[split])
      row = int(self._order(seed, epoch)[place])
    rows, where, numbers = self._parts[split]
    row, here = rows[numbers[row]], where(numbers[row])
    question, answer = (self.config.field(row, key, here) for key in ("question", "answer"))
    if self._judge and not self._reads_formulas:
      return Problem(index, question, answer, self.render(question), _plain(row))
    final = self._reference(answer)
    if final is None:
      raise UserError(
        f"{here}: task.verifier '{self.config.verifier}' finds no answer in {answer[-60:]!r}"
      )
    asked = {"answer": boxed(final)} if self._reads_formulas else {}
    return Problem(index, question, final, self.render(question), {**_plain(row), **asked})

  def _reference(self, answer: str) -> str | None:
    """What a data set's answer says, or None where the verifier cannot read it."""
    if not self._reads_formulas:
      return reference(self.config.verifier, answer)
    text = given_answer(answer)
    return text if self._value(boxed(text)) else None

  def verify(self, problem: Problem, completion: str, truncated: bool) -> Outcome:
    """See `TextConfig`: `verifier`, `thinking_end`, `format`."""
    if truncated:
      return Outcome(0.0, False, True)
    text, weight = self._read(completion), self.config.format_weight
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
    text = self._read(completion)
    if self._judge is None:
      return VERIFIERS[self.config.verifier](text)
    return self._judged(text)

  def _judged(self, text: str) -> str | None:
    assert self._judge
    try:
      return self._judge.final_answer(text)
    except VerifierError as error:
      raise UserError(
        f"task.verifier {self.config.verifier}, final_answer: {error}; {_MEND}"
      ) from None

  def _read(self, completion: str) -> str:
    """What the verifier reads of a completion."""
    end = self.config.thinking_end
    text = completion if not end else completion.rpartition(end)[2] if end in completion else ""
    return formula(text) if self._reads_formulas else text

  def render(self, question: str) -> str:
    return self._chat.ask(question)


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
  """A row as plain Python values, which TFDS gives as bytes and arrays."""
  plain = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in row.items()}
  return {k: v.decode(errors="replace") if isinstance(v, bytes) else v for k, v in plain.items()}
