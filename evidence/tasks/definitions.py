"""Names defined by other names, some of them beside the point, and checks that are needed at times.

    a=3;b=a+2;c=4;d=b*a?d>        a3;b4;?b;b5;d5;#5$

A step writes the value of a name (modulo 10), and the last write of a name holds. `?b;` announces a
look at b again. Such a check is necessary where it stands directly before a repair of b that the
answer reads, and needless wherever nothing comes of it: from the check alone nobody can tell.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from dca_jax.checks import between
from dca_jax.tasks import SPLITS, Outcome, Problem, TaskConfig, character_tokenizer

_NAMES = "abcdefghijkl"
_DEFINITION = re.compile(r"([a-l])=(\w)(?:([+*])(\w))?")
_STEP = re.compile(r"([a-l])(\d);|\?([a-l]);|#(\d)\$")


class _Asked(NamedTuple):
  """A prompt, read: what defines each name, the true values, and the name that is asked for."""

  parts: dict[str, tuple[str, str, str]]
  true: dict[str, int]
  query: str


@dataclasses.dataclass(frozen=True)
class Definitions(TaskConfig):
  """The task; a name is defined by a digit, or by two earlier names or digits."""

  names: int = 6
  """Definitions in a prompt, 2 to 12."""
  wrong: float = 0.25
  """Demonstrations with mistakes: chance that a value is wrong."""
  checks: float = 0.25
  """Demonstrations: chance of a check behind a value, which finds a mistake if there is one."""

  offers: ClassVar[tuple[str, ...]] = ("labels", "demonstrations")
  step_end: ClassVar[str] = ";"

  def check(self) -> dict[str, str]:
    return between(0, 1, self, "wrong", "checks") | between(2, 12, self, "names")

  def tokenizer(self) -> Any:
    return character_tokenizer("0123456789=+*;?#>" + _NAMES[: self.names], "$")

  def problem(self, split: str, index: int) -> Problem:
    rng = np.random.default_rng([34, SPLITS.index(split), index])
    lines = []
    for k in range(self.names):
      digit = str(rng.integers(10))
      if k < 2 or rng.random() < 0.25:
        lines.append(f"{_NAMES[k]}={digit}")
      else:
        left = _NAMES[rng.integers(k)]
        right = _NAMES[rng.integers(k)] if rng.random() < 0.5 else digit
        lines.append(f"{_NAMES[k]}={left}{rng.choice(['+', '*'])}{right}")
    prompt = f"{';'.join(lines)}?{_NAMES[self.names - 1 - rng.integers(2)]}>"
    asked = _read(prompt)
    return Problem(index, prompt, str(asked.true[asked.query]))

  def demonstration(self, index: int, mistakes: bool) -> tuple[str, str]:
    """Every name in order; a mistake is carried on unless a check finds it."""
    prompt = self.problem("demonstrations", index).prompt
    asked, rng = _read(prompt), np.random.default_rng([35, index])
    said: dict[str, int] = {}
    steps = []
    for name in asked.parts:
      right = _value(asked, name, said)
      slips = mistakes and rng.random() < self.wrong
      said[name] = (right + int(rng.integers(1, 10)) * slips) % 10
      steps.append(f"{name}{said[name]};")
      if rng.random() < self.checks:
        steps.append(f"?{name};")
        if said[name] != right:
          said[name] = right
          steps.append(f"{name}{right};")
    return prompt, "".join(steps) + f"#{said[asked.query]}$"

  def verify(self, problem: Problem, completion: str, truncated: bool) -> Outcome:
    """Correct exactly when the completion ends with `#`, the true digit and the end token."""
    right = not truncated and completion.endswith(f"#{problem.answer}$")
    return Outcome(float(right), right, truncated)

  def label_steps(self, prompt: str, steps: Sequence[str], truncated: bool) -> list[str]:
    """The exact role of every step.

    A write reads the values that stand for the names in its definition, and works out in the head
    what is not written. `irrelevant`: a name that the question does not depend on. `redundant`: the
    value that stands already, or a right value that the answer does not read, or a check from which
    no repair follows that it reads. `error`: neither what follows from what is read, nor true.
    `inherits`: what follows, and not true. `repair`: true, where another value stood or followed.
    `necessary`: any other true value that the answer reads, and a check that brought a repair.
    """
    asked = _read(prompt)
    needed, said, writer = _needs(asked, asked.query), dict[str, int](), dict[str, int]()
    roles, reads = [], dict[int, set[int]]()
    for k, step in enumerate(steps):
      match, last = _STEP.fullmatch(step), k == len(steps) - 1
      name = match and (match[1] or match[3] or asked.query)
      if not match or name not in asked.parts or (match[4] and not last):
        roles.append("irrelevant" if last and truncated and not match else "error")
      elif name not in needed:
        roles.append("irrelevant")
      elif match[3]:
        roles.append("redundant")  # Until a repair follows.
      else:
        value = int(match[2] or match[4])
        ask = name if match[1] else None
        roles.append(_role(asked, name, value, said, is_answer=ask is None))
        if roles[-1] == "redundant":
          continue
        own = [asked.query] if ask is None else _operands(asked, name)
        reads[k] = {writer[x] for x in _sources(asked, own, said)}
        if ask:
          said[name], writer[name] = value, k
    live = _live(reads, steps, writer, asked)
    for k, role in enumerate(roles):
      if role in ("necessary", "repair") and k not in live:
        roles[k] = "redundant"
    for k, step in enumerate(steps[:-1]):
      mends = roles[k + 1] == "repair" and steps[k + 1][0] == step[1:2]
      if step.startswith("?") and roles[k] == "redundant" and mends:
        roles[k] = "necessary"
    return roles


def _role(asked: _Asked, name: str, value: int, said: Mapping[str, int], is_answer: bool) -> str:
  """Of a write, or of the answer, before it is known whether anything reads it."""
  stands = None if is_answer else said.get(name)
  if stands == value:
    return "redundant"
  follows = _follow(asked, name, said) if is_answer else _value(asked, name, said)
  true = asked.true[name]
  if value != true:
    return "inherits" if value == follows else "error"
  return "repair" if follows != true or stands is not None else "necessary"


def _live(
  reads: Mapping[int, set[int]], steps: Sequence[str], writer: Mapping[str, int], asked: _Asked
) -> set[int]:
  """The steps that the answer reads, directly or not; where there is none, that it would read."""
  last = len(steps) - 1
  answered = last in reads and steps[last].startswith("#")
  waiting = [last] if answered else [writer[asked.query]] if asked.query in writer else [*reads]
  live: set[int] = set()
  while waiting:
    if (k := waiting.pop()) not in live:
      live.add(k)
      waiting += reads[k]
  return live


def _read(prompt: str) -> _Asked:
  body, _, query = prompt.rstrip(">").rpartition("?")
  parts = {m[1]: (m[2], m[3] or "", m[4] or "") for m in _DEFINITION.finditer(body)}
  asked = _Asked(parts, {}, query)
  for name in parts:
    asked.true[name] = _value(asked, name, asked.true)
  return asked


def _operands(asked: _Asked, name: str) -> list[str]:
  left, _, right = asked.parts[name]
  return [x for x in (left, right) if x in asked.parts]


def _needs(asked: _Asked, name: str) -> set[str]:
  """The names that a name depends on, itself included."""
  return {name}.union(*(_needs(asked, x) for x in _operands(asked, name)))


def _sources(asked: _Asked, names: Sequence[str], said: Mapping[str, int]) -> set[str]:
  """The written names that these are read from, those in between worked out in the head."""
  found: set[str] = set()
  for name in names:
    found |= {name} if name in said else _sources(asked, _operands(asked, name), said)
  return found


def _follow(asked: _Asked, name: str, said: Mapping[str, int]) -> int:
  """What stands for a name, or follows for it from what stands."""
  return said[name] if name in said else _value(asked, name, said)


def _value(asked: _Asked, name: str, said: Mapping[str, int]) -> int:
  """What follows for a name from what stands for those in its definition."""
  left, sign, right = asked.parts[name]
  x, y = (int(v) if v.isdigit() else _follow(asked, v, said) if v else 0 for v in (left, right))
  return (x * y if sign == "*" else x + y) % 10
