"""A line of sums, and a calculator to ask for each of them.

    7+3*4-2>        7+3$0;0*4$0;0-2$8;#8$

The policy writes a call and ends its turn with `$`; the environment answers with the result (modulo
10) and `;`, or with `?;` where there is no such sum. `#8$` is the answer. Sums are worked out from
left to right. How many calls are made is the policy's choice.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from dca_jax.checks import between
from dca_jax.tasks import SPLITS, EnvironmentConfig, Outcome, Problem, Turn, character_tokenizer

_OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
_CALL = re.compile(r"(\d)([-+*])(\d)\$")
_ANSWER = re.compile(r"#(\d)\$")
_PART = re.compile(r"([-+*])(\d)")


@dataclasses.dataclass(frozen=True)
class Calculator(EnvironmentConfig):
  """The task."""

  sums: int = 4
  """In a prompt, 1 to 8."""
  wrong: float = 0.15
  """Demonstrations with mistakes: chance that a call begins with a wrong digit."""
  needless: float = 0.2
  """Demonstrations with mistakes: chance of a call that nothing needs, before each that is needed;
  of these every second repeats an earlier one."""
  early: float = 0.15
  """Demonstrations with mistakes: chance of an answer in the place of a call."""

  offers: ClassVar[tuple[str, ...]] = ("environment", "labels", "demonstrations")
  step_end: ClassVar[str] = r"\$"

  def check(self) -> dict[str, str]:
    bad = super().check() | between(0, 1, self, "wrong", "needless", "early")
    return bad | between(1, 8, self, "sums")

  def tokenizer(self) -> Any:
    return character_tokenizer("0123456789+-*>#;?", "$")

  def problem(self, split: str, index: int) -> Problem:
    rng = np.random.default_rng([41, SPLITS.index(split), index])
    digits = rng.integers(10, size=self.sums + 1)
    signs = rng.choice([*_OPERATIONS], self.sums)
    prompt = str(digits[0]) + "".join(f"{s}{d}" for s, d in zip(signs, digits[1:], strict=True))
    return Problem(index, f"{prompt}>", str(_values(prompt)[-1]))

  def environment(self, problem: Problem, seed: int) -> "Desk":
    return Desk(problem)

  def demonstration(self, index: int, mistakes: bool) -> tuple[str, str]:
    """All calls in order, with what the calculator answers; a mistake is carried on."""
    prompt = self.problem("demonstrations", index).prompt
    rng = np.random.default_rng([42, index])
    value, said = prompt[0], ""
    made: list[str] = []
    for sign, digit in _PART.findall(prompt):
      if mistakes and rng.random() < self.needless:
        random = f"{rng.integers(10)}{rng.choice([*_OPERATIONS])}{rng.integers(10)}$"
        call = str(rng.choice(made)) if made and rng.random() < 0.5 else random
        said += f"{call}{answer(call)}"
      if mistakes and rng.random() < self.early:
        break
      if mistakes and rng.random() < self.wrong:
        value = str(rng.integers(10))
      made.append(f"{value}{sign}{digit}$")
      value = answer(made[-1])[0]
      said += f"{made[-1]}{value};"
    return prompt, f"{said}#{value}$"

  def label_steps(self, prompt: str, steps: Sequence[str], truncated: bool) -> list[str]:
    """The exact role of every turn.

    `redundant`: a call that was made before, or one whose result is no longer needed. `necessary`:
    a call that the right value goes into, further than any before it, also where what lies between
    was worked out in the head; and the right answer. `repair`: the same after a wrong call.
    `error`: one of the prompt's sums with a wrong value, a wrong answer, or text that is neither.
    `inherits`: what follows from the result of a wrong call. `irrelevant`: a sum that the prompt
    does not have; the unfinished last turn of a truncated episode.
    """
    values, parts = _values(prompt), _PART.findall(prompt)
    made, roles = set[str](), list[str]()
    reached, astray = 0, None  # Where a wrong result stands: how many sums it is, and its value.
    for step in steps:
      call, final = _CALL.fullmatch(step), _ANSWER.fullmatch(step)
      if not call and not final:
        roles.append("irrelevant" if truncated and not step.endswith("$") else "error")
        continue
      if step in made:
        roles.append("redundant")
        continue
      made.add(step)
      if final:
        now = (len(parts), int(final[1]))
        right = now[1] == values[-1]
        role = "repair" if astray and astray != now else "necessary"
        roles.append(role if right else "inherits" if now == astray else "error")
        continue
      assert call
      first, result = int(call[1]), int(answer(step)[0])
      places = [k for k, part in enumerate(parts) if part == (call[2], call[3])]
      on_the_way = [k for k in places if values[k] == first]
      further = [k for k in on_the_way if k >= reached]
      if further:
        roles.append("repair" if astray else "necessary")
        reached, astray = further[0] + 1, None
      elif on_the_way:
        roles.append("redundant")
      elif astray and astray[0] in places and astray[1] == first:
        roles.append("inherits")
        astray = astray[0] + 1, result
      elif places:
        roles.append("error")
        astray = next((k for k in places if k >= reached), places[0]) + 1, result
      else:
        roles.append("irrelevant")
    return roles


class Desk:
  """The calculator of one episode."""

  def __init__(self, problem: Problem):
    self._problem = problem
    self._reached = 0

  def begin(self, problem: Problem) -> str | None:
    return None

  def step(self, text: str) -> Turn:
    if final := _ANSWER.fullmatch(text):
      right = final[1] == self._problem.answer
      return Turn(None, True, Outcome(float(right), right, False))
    values, parts = _values(self._problem.prompt), _PART.findall(self._problem.prompt)
    if call := _CALL.fullmatch(text):
      on_the_way = (
        k + 1
        for k, part in enumerate(parts)
        if (str(values[k]), *part) == call.groups() and k >= self._reached
      )
      self._reached = next(on_the_way, self._reached)
    # How far the right sums have come; without a look at what the policy does next.
    return Turn(answer(text), score=(self._reached + 1) / (len(parts) + 2), error=not call)

  def close(self) -> None:
    pass


def answer(call: str) -> str:
  """What the calculator says."""
  match = _CALL.fullmatch(call)
  return f"{_OPERATIONS[match[2]](int(match[1]), int(match[3])) % 10};" if match else "?;"


def _values(prompt: str) -> list[int]:
  """The values from left to right, the first digit and the result included."""

  def walk() -> Iterator[int]:
    value = int(prompt[0])
    yield value
    for sign, digit in _PART.findall(prompt):
      value = _OPERATIONS[sign](value, int(digit)) % 10
      yield value

  return [*walk()]
