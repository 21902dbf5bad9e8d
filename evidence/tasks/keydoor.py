"""A key that must fit a door, with a long way between them on which nothing matters.

    4>        k2;w7;w0;w3;d5$

The code in the prompt decides which key is right, and code and key which door. Steps that walk
change nothing. So credit has to find the first step across many inert ones, and a reviewer that
thinks that effort helps will be wrong about most of an answer.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from dca_jax.checks import at_least, between
from dca_jax.tasks import SPLITS, Outcome, Problem, TaskConfig, character_tokenizer

_KEYS = np.random.default_rng(30).permutation(8).tolist()
_DOORS = np.random.default_rng(31).integers(8, size=(8, 8)).tolist()
_STEP = re.compile(r"([kw])([0-7]);|(d)([0-7])\$")


@dataclasses.dataclass(frozen=True)
class KeyDoor(TaskConfig):
  """The task; `key` and `door` say what is right."""

  walk: int = 8
  """Inert steps of a demonstration."""
  right: float = 0.6
  """Demonstrations with mistakes: chance of the right key, and of the door that fits."""
  again: float = 0.2
  """Demonstrations: chance that the key is taken again on the way; the right one, if there was a
  wrong one before."""

  offers: ClassVar[tuple[str, ...]] = ("labels", "corrections", "demonstrations")
  step_end: ClassVar[str] = ";"

  def check(self) -> dict[str, str]:
    return at_least(1, self, "walk") | between(0, 1, self, "right", "again")

  def tokenizer(self) -> Any:
    return character_tokenizer("01234567>;kwd", "$")

  def problem(self, split: str, index: int) -> Problem:
    code = int(np.random.default_rng([32, SPLITS.index(split), index]).integers(8))
    return Problem(index, f"{code}>", str(_DOORS[code][_KEYS[code]]))

  def demonstration(self, index: int, mistakes: bool) -> tuple[str, str]:
    """The key, the walk, perhaps the key again in its middle, and the door."""
    prompt = self.problem("demonstrations", index).prompt
    code, rng = int(prompt[0]), np.random.default_rng([33, index])

    def pick(true: int) -> int:
      return int(rng.integers(8)) if mistakes and rng.random() > self.right else true

    key = pick(_KEYS[code])
    steps = [f"k{key};", *(f"w{x};" for x in rng.integers(8, size=self.walk))]
    if rng.random() < self.again:
      key = _KEYS[code]
      steps.insert(1 + self.walk // 2, f"k{key};")
    return prompt, "".join(steps) + f"d{pick(_DOORS[code][key])}$"

  def verify(self, problem: Problem, completion: str, truncated: bool) -> Outcome:
    """Correct exactly when the last key taken is right and the door is the one it opens."""
    code, keys = int(problem.prompt[0]), re.findall(r"k([0-7]);", completion)
    right = not truncated and bool(keys) and int(keys[-1]) == _KEYS[code]
    right = right and completion.endswith(f"d{problem.answer}$")
    return Outcome(float(right), right, truncated)

  def label_steps(self, prompt: str, steps: Sequence[str], truncated: bool) -> list[str]:
    """The exact role of every step.

    Only the key that is held at the end counts. It is `necessary` if right, `repair` if it
    replaces a wrong one; a wrong one is an `error`; a right one that is given up again and one
    that is held already are `redundant`. The door is `necessary` where it fits code and key and
    the key is right, `inherits` where it fits a wrong key, else `error`. Walking is `irrelevant`;
    what is no step of this task is an `error`.
    """
    code, key = int(prompt[0]), -1
    held_from = _held_from(steps)
    roles = []
    for k, step in enumerate(steps):
      match = _STEP.fullmatch(step)
      if not match or (match[3] and k < len(steps) - 1):
        roles.append("irrelevant" if truncated and k == len(steps) - 1 else "error")
      elif match[1] == "w":
        roles.append("irrelevant")
      elif match[1]:
        before, key = key, int(match[2])
        if key == before or (key == _KEYS[code] and k != held_from):
          roles.append("redundant")
        elif key != _KEYS[code]:
          roles.append("error")
        else:
          roles.append("necessary" if before < 0 else "repair")
      elif key < 0 or int(match[4]) != _DOORS[code][key]:
        roles.append("error")
      else:
        roles.append("necessary" if key == _KEYS[code] else "inherits")
    return roles

  def correct_step(self, prompt: str, steps: Sequence[str], k: int) -> str:
    """The right key in the place of a wrong one, or of a door that comes without; else the door."""
    code, match = int(prompt[0]), _STEP.fullmatch(steps[k])
    if match is None or match[1] == "w":
      return ""
    if match[1] or f"k{_KEYS[code]};" not in steps[:k]:
      return f"k{_KEYS[code]};"
    return f"d{_DOORS[code][_KEYS[code]]}"


def _held_from(steps: Sequence[str]) -> int:
  """Where the key that is held at the end was taken; -1 where none is."""
  first, held = -1, ""
  for k, step in enumerate(steps):
    if re.fullmatch(r"k[0-7];", step) and step != held:
      first, held = k, step
  return first
