"""Two interleaved chains of modular arithmetic: one is queried, the other is a distractor.

A prompt with four lines, and a completion that solves it:

    +3a*2b-4c+1d?cm7n3;        a0;c6;#6$

Line `+3a` says "a is the value two lines above, plus 3"; above the first two lines stand the
starting values `m7` and `n3`. Even lines form one chain and odd lines the other; `?c` asks for the
last value of one of them. A completion writes values line by line, in any order and as often as it
likes (the last write counts), and ends with `#` and the answer. Only that final digit is rewarded.

Every step of any text can be labelled exactly, because a step either writes a value or it does not.
A write of line x *reads* the nearest line above x on the same chain that has been written (or the
starting value), so leaving lines out and computing in the head is a legitimate longer step. A write
is *live* when the answer reads it, directly or through later reads. See `label_steps` for the
rules.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from dca_jax.checks import between, one_of
from dca_jax.tasks.tokenizer import character_tokenizer
from dca_jax.tasks.types import SPLITS, Outcome, Problem, TaskConfig

_OPERATIONS = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y}
_SYMBOLS = "".join(_OPERATIONS)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_EOS = "$"
_PROMPT = re.compile(r"((?:[-+*]\d[a-z])+)\?([a-z])([a-z])(\d)([a-z])(\d);")
_WRITE = re.compile(r"([a-z])(\d);")
_ANSWER = re.compile(r"#(\d)\$\Z")


@dataclasses.dataclass(frozen=True)
class ChainsConfig(TaskConfig):
  """The `task` section for `chains`."""

  name: str = "chains"
  notation: ClassVar[str] = (
    "Two chains of arithmetic modulo 10, interleaved. `+3a*2b-4c+1d?cm7n3;` says: start from m = 7"
    " and n = 3; a is the value two lines before it, m, plus 3, so 0; b is n times 2; c is a minus"
    " 4, so 6; d is b plus 1; what is c? A right answer is `a0;c6;#6$`: each step writes a value,"
    " and the last one the result, which alone is verified."
  )
  lines: int = 12
  """Lines in the prompt, both chains together; even, 2 to 24."""
  modulus: int = 10
  """All values are taken modulo this; 2 to 10."""
  repeat: float = 0.12
  """Demonstrations: chance that a line is written twice; at most two lines
  of a demonstration are."""
  drop: float = 0.15
  """Demonstrations: chance that a line of the distractor chain is left out."""
  wrong: str = "table"
  """Demonstrations: `table` makes fixed entries of the arithmetic table wrong in a fixed way (a
  misconception, which outcome-only training must unlearn), `slips` draws a fresh wrong digit each
  time."""
  misconceptions: float = 0.5
  """Share of the table's entries that are sometimes wrong; read when `wrong` is `table`."""
  wrong_low: float = 0.3
  """Least chance that an entry of the table with a misconception is wrong, or under `slips` that a
  line is; each entry, or demonstration, has its own, uniform between this and `wrong_high`."""
  wrong_high: float = 0.7
  """Largest chance that such an entry, or such a line, is wrong; see `wrong_low`."""

  offers: ClassVar[tuple[str, ...]] = ("labels", "values", "corrections", "demonstrations")

  def open(self) -> "Chains":
    return Chains(self)

  def check(self) -> dict[str, str]:
    bad = between(0, 1, self, "repeat", "drop", "misconceptions", "wrong_low", "wrong_high")
    bad |= between(2, 10, self, "modulus") | one_of(self, "wrong", "table", "slips")
    if self.lines % 2 or not 2 <= self.lines <= 24:
      bad["lines"] = "must be even and between 2 and 24"
    if self.wrong_low > self.wrong_high:
      bad["wrong_low"] = "must not exceed wrong_high"
    return bad

  def unused(self) -> dict[str, str]:
    return {"misconceptions": "task.wrong is 'slips'"} if self.wrong == "slips" else {}


class _Parsed(NamedTuple):
  """A prompt, read: `chain[x]` lists the labels from the start of x's chain up to x,
  `value` holds the true values."""

  operation: dict[str, tuple[str, int]]
  chain: dict[str, list[str]]
  start: dict[str, int]
  value: dict[str, int]
  query: str


class Chains:
  """The task; see the module's text."""

  step_end, step_limits, concurrency = ";", (0, 0), 1

  def __init__(self, config: ChainsConfig):
    self.config, self.sizes = config, dict[str, int]()
    self._parse = functools.lru_cache(maxsize=4096)(self._read_prompt)
    # Misconceptions belong to the task, not to a run: every seed trains against the same ones.
    rng, m = np.random.default_rng(20), config.modulus
    shape = (len(_OPERATIONS), m, m)
    has_one = rng.random(shape) < config.misconceptions
    chance = config.wrong_low + (config.wrong_high - config.wrong_low) * rng.random(shape)
    self._wrong_chance = (chance * has_one).tolist()
    self._wrong_shift = rng.integers(1, m, shape).tolist()

  def problem(self, split: str, index: int) -> Problem:
    """Problem number `index` of `split`; the same one on every call and every machine."""
    n, m = self.config.lines, self.config.modulus
    rng = np.random.default_rng([n, m, SPLITS.index(split), index])
    symbols = rng.integers(len(_SYMBOLS), size=n).tolist()
    digits = rng.integers(m, size=n + 2).tolist()
    lines = "".join(f"{_SYMBOLS[symbols[i]]}{digits[i]}{_LETTERS[i]}" for i in range(n))
    start = "".join(f"{_LETTERS[i]}{digits[i]}" for i in (n, n + 1))
    prompt = f"{lines}?{_LETTERS[n - 1 - rng.integers(2)]}{start};"
    parsed = self._parse(prompt)
    return Problem(index, prompt, str(parsed.value[parsed.query]))

  def render(self, prompt: str) -> str:
    return prompt

  def tokenizer(self):
    return character_tokenizer("0123456789+-*?;#" + _LETTERS[: self.config.lines + 2], _EOS)

  def demonstration(self, index: int, mistakes: bool) -> tuple[str, str]:
    """A problem and a worked solution in line order; its mistakes, if any, are carried forward
    consistently."""
    prompt = self.problem("demonstrations", index).prompt
    parsed, config, m = self._parse(prompt), self.config, self.config.modulus
    rng = np.random.default_rng([21, index])
    chances = rng.random((len(parsed.operation), 3)).tolist()
    slip_chance = rng.uniform(config.wrong_low, config.wrong_high)
    shifts = rng.integers(1, m, len(parsed.operation)).tolist()
    values, written, repeats = dict(parsed.start), [], 0
    lines = zip(parsed.operation.items(), chances, shifts, strict=True)
    for (label, (symbol, y)), (wrong, drop, repeat), slip in lines:
      x, kind = values[parsed.chain[label][-2]], _SYMBOLS.index(symbol)
      chance, shift = slip_chance, slip
      if config.wrong == "table":
        chance, shift = self._wrong_chance[kind][x][y], self._wrong_shift[kind][x][y]
      slipped = shift if mistakes and wrong < chance else 0
      values[label] = (_OPERATIONS[symbol](x, y) + slipped) % m
      if label not in parsed.chain[parsed.query] and drop < config.drop:
        continue
      written.append(f"{label}{values[label]};")
      if repeats < 2 and repeat < config.repeat:
        written.append(written[-1])
        repeats += 1
    return prompt, "".join(written) + f"#{values[parsed.query]}{_EOS}"

  def verify(self, problem: Problem, completion: str, truncated: bool) -> Outcome:
    """Correct exactly when the completion ends with `#`, the true digit and the end token."""
    correct = not truncated and self.final_answer(completion) == problem.answer
    return Outcome(float(correct), correct, truncated)

  def final_answer(self, completion: str) -> str | None:
    return match[1] if (match := _ANSWER.search(completion)) else None

  def label_steps(self, prompt: str, steps: Sequence[str], truncated: bool) -> list[str]:
    """The exact role of every step.

    A step `x7;` is a write of line x; the last step `#7$` is the answer and reads the query. With
    `expected` the value that follows from what the step reads, and `true` the line's true value:

    * `irrelevant`: a write to the other chain, or the unfinished last step of a truncated
      completion;
    * `redundant`: rewrites the value that already stands, or is right but not live;
    * `error`: the value is neither expected nor true; also any text that is neither a write nor the
      answer;
    * `inherits`: the value is expected but not true: it follows correctly from an earlier error;
    * `repair`: the value is true although another was expected, or it replaces a wrong value;
    * `necessary`: any other true value that the answer reads, or, where there is no answer, would
      have read.
    """
    parsed = self._parse(prompt)
    chain = parsed.chain[parsed.query]
    state = {chain[0]: parsed.start[chain[0]]}  # label -> the value that stands
    writer: dict[str, int] = {}  # label -> the step that wrote it
    reads: dict[int, int | None] = {}  # step -> the step whose write it reads
    roles: list[str] = []

    for k, step in enumerate(steps):
      last = k == len(steps) - 1
      write, answer = _WRITE.fullmatch(step), _ANSWER.search(step) if last else None
      label, digit = write.groups() if write else (parsed.query, answer[1]) if answer else ("", "0")
      value = int(digit)
      unfinished = last and truncated and not step.endswith(";")
      if unfinished or (label in parsed.chain and label not in chain):
        roles.append("irrelevant")
        continue
      if label not in chain:
        # A label that the prompt does not have says nothing that could be true.
        roles.append("error")
        continue
      if write and state.get(label) == value:
        roles.append("redundant")
        continue
      above = chain[: chain.index(label) + (0 if write else 1)]
      source = next((x for x in reversed(above) if x in state), None)
      if source is None:
        expected = parsed.start[label]
      else:
        expected = self._follow(parsed, source, label, state[source])
      true = parsed.value[label]
      if value == true:
        replaces = expected != true or state.get(label, true) != true
        roles.append("repair" if replaces else "necessary")
      else:
        roles.append("inherits" if value == expected else "error")
      reads[k] = writer.get(source or "")
      if write:
        state[label], writer[label] = value, k

    # Where there is no answer, what it would have read.
    end: int | None = len(steps) - 1
    if end not in reads or _WRITE.fullmatch(steps[-1]):
      end = writer.get(next(x for x in reversed(chain) if x in state))
    return _without_dead(roles, end, reads)

  def correct_step(self, prompt: str, steps: Sequence[str], k: int) -> str:
    """See `Corrected`. Where the wrong step had left lines out, the first of them."""
    parsed = self._parse(prompt)
    chain, write = parsed.chain[parsed.query], _WRITE.fullmatch(steps[k])
    if not (write or _ANSWER.search(steps[k])) or (write and write[1] not in chain[1:]):
      return ""
    written = {match[1] for step in steps[:k] if (match := _WRITE.fullmatch(step))}
    end = chain.index(write[1]) if write else len(chain)
    first = 1 + max(i for i, x in enumerate(chain[:end]) if x in written or not i)
    value = parsed.value[parsed.query if first == len(chain) else chain[first]]
    return f"#{value}" if first == len(chain) else f"{chain[first]}{value};"

  def expected_steps(self, prompt: str, steps: Sequence[str]) -> list[str]:
    """See `Labelled`: the value that follows from what a step reads, in the place of its own."""
    parsed = self._parse(prompt)
    state = dict(parsed.start)
    expected = []
    for step in steps:
      write, answer = _WRITE.fullmatch(step), _ANSWER.search(step)
      label = write[1] if write else parsed.query
      if label not in parsed.chain or not (write or answer):
        expected.append("")
        continue
      above = parsed.chain[label][: -1 if write and label not in parsed.start else None]
      source = next(x for x in reversed(above) if x in state)
      value = self._follow(parsed, source, label, state[source])
      expected.append(f"{label}{value};" if write else f"#{value}{_EOS}")
      if write:
        state[label] = int(write[2])
    return expected

  def prefix_values(self, prompt: str, completions: Sequence[Sequence[str]]) -> list[list[float]]:
    """See `Valued`. The share of the other completions that got as far as this prefix and then
    succeeded, smoothed.

    A prefix has got as far as the last line of the queried chain that is written, if what stands
    there leads to the right answer when it is followed correctly; otherwise its value is 0. From
    each line on, the chance to get one further is counted over the others, with half a success and
    half a failure added; a value is the product of what is left, the answer's own chance included.
    """
    parsed = self._parse(prompt)
    chain, true = parsed.chain[parsed.query], parsed.value[parsed.query]
    progress: list[list[int]] = []  # for each prefix the place in the chain that it got to, or -1
    for steps in completions:
      state = {chain[0]: parsed.start[chain[0]]}
      progress.append([])
      for step in steps:
        last = next(x for x in reversed(chain) if x in state)
        leads = self._follow(parsed, last, parsed.query, state[last]) == true
        progress[-1].append(chain.index(last) if leads else -1)
        if (write := _WRITE.fullmatch(step)) and write[1] in chain:
          state[write[1]] = int(write[2])
    succeeded = [self.final_answer("".join(steps)) == str(true) for steps in completions]
    furthest = [
      len(chain) if won else max(own, default=0)
      for won, own in zip(succeeded, progress, strict=True)
    ]
    values = []
    for i, own in enumerate(progress):
      others = furthest[:i] + furthest[i + 1 :]
      reached = [sum(f >= place for f in others) for place in range(len(chain) + 1)]
      onward = [(reached[j + 1] + 0.5) / (reached[j] + 1) for j in range(len(chain))]
      values.append([math.prod(onward[place:]) if place >= 0 else 0.0 for place in own])
    return values

  def _follow(self, parsed: _Parsed, source: str, label: str, value: int) -> int:
    """The value of `label` that follows where `source`, above it on its chain, has `value`."""
    for x in parsed.chain[label][len(parsed.chain[source]) :]:
      symbol, y = parsed.operation[x]
      value = _OPERATIONS[symbol](value, y) % self.config.modulus
    return value

  def _read_prompt(self, prompt: str) -> _Parsed:
    match = _PROMPT.fullmatch(prompt)
    if match is None:
      raise ValueError(f"not a prompt of the task chains: {prompt!r}")
    body, query, *start = match.groups()
    operation = {body[i + 2]: (body[i], int(body[i + 1])) for i in range(0, len(body), 3)}
    starts = {start[0]: int(start[1]), start[2]: int(start[3])}
    chain, value, above = {x: [x] for x in starts}, dict(starts), list(starts)
    for label, (symbol, y) in operation.items():
      chain[label] = [*chain[above[-2]], label]
      value[label] = _OPERATIONS[symbol](value[above[-2]], y) % self.config.modulus
      above.append(label)
    return _Parsed(operation, chain, starts, value, query)


def _without_dead(roles: list[str], end: int | None, reads: dict[int, int | None]) -> list[str]:
  """The roles, where a right step that nothing on the way to step `end` has read is redundant.

  Args:
    reads: for each step the step whose write it reads, or None.
  """
  live = set()
  while end is not None:
    live.add(end)
    end = reads[end]
  return [
    "redundant" if role in ("necessary", "repair") and k not in live else role
    for k, role in enumerate(roles)
  ]
