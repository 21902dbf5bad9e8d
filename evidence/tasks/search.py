"""A hidden table to look up in, where each entry names the next, and the last one a digit.

    d417>           d$b;b$f;f$6;#6$

The policy writes a key and ends its turn with `$`; the environment answers with what the table has
there. Where a digit stands the search is over, and `#6$` is the answer; how long that takes is the
table's secret, and when to stop is the policy's choice. The number in the prompt says which table
it is, to whoever made it.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from dca_jax.checks import between
from dca_jax.tasks import SPLITS, EnvironmentConfig, Outcome, Problem, Turn, character_tokenizer

_KEYS = "abcdefgh"
_ANSWER = re.compile(r"#(\d)\$")


@dataclasses.dataclass(frozen=True)
class Search(EnvironmentConfig):
  """The task."""

  longest: int = 4
  """Look-ups that a search needs at most; it needs at least 1. Up to 8."""
  needless: float = 0.35
  """Demonstrations with mistakes: chance of a look-up that nothing needs, before each that is
  needed; of these every second repeats an earlier one."""
  early: float = 0.25
  """Demonstrations with mistakes: chance of a guessed answer in the place of a look-up."""

  offers: ClassVar[tuple[str, ...]] = ("environment", "labels", "demonstrations")
  step_end: ClassVar[str] = r"\$"

  def check(self) -> dict[str, str]:
    bad = super().check() | between(0, 1, self, "needless", "early")
    return bad | between(1, len(_KEYS), self, "longest")

  def tokenizer(self) -> Any:
    return character_tokenizer(f"0123456789>#;?{_KEYS}", "$")

  def problem(self, split: str, index: int) -> Problem:
    rng = np.random.default_rng([43, SPLITS.index(split), index])
    prompt = f"{rng.choice([*_KEYS])}{rng.integers(1000):03d}>"
    return Problem(index, prompt, self._path(prompt)[-1])

  def table(self, prompt: str) -> dict[str, str]:
    """A chain of keys from each to a digit."""
    rng = np.random.default_rng([44, int(prompt[1:4])])
    keys = [*rng.permutation([*_KEYS])]
    table: dict[str, str] = {}
    while keys:
      length = min(int(rng.integers(1, self.longest + 1)), len(keys))
      chain, keys = keys[:length], keys[length:]
      table |= dict(zip(chain, [*chain[1:], str(rng.integers(10))], strict=True))
    return table

  def _path(self, prompt: str) -> list[str]:
    table, path = self.table(prompt), [prompt[0]]
    while path[-1] in table:
      path.append(table[path[-1]])
    return path

  def environment(self, problem: Problem, seed: int) -> "Table":
    return Table(self.table(problem.prompt), self._path(problem.prompt))

  def demonstration(self, index: int, mistakes: bool) -> tuple[str, str]:
    prompt = self.problem("demonstrations", index).prompt
    rng, table, path = np.random.default_rng([45, index]), self.table(prompt), self._path(prompt)
    made: list[str] = []
    for key in path[:-1]:
      if mistakes and rng.random() < self.needless:
        made.append(str(rng.choice(made if made and rng.random() < 0.5 else [*_KEYS])))
      if mistakes and rng.random() < self.early:
        return prompt, "".join(f"{k}${table[k]};" for k in made) + f"#{rng.integers(10)}$"
      made.append(key)
    return prompt, "".join(f"{k}${table[k]};" for k in made) + f"#{path[-1]}$"

  def label_steps(self, prompt: str, steps: Sequence[str], truncated: bool) -> list[str]:
    """The exact role of every turn.

    `necessary`: a look-up on the way, and the right answer, guessed or not. `redundant`: a look-up
    that was made before. `irrelevant`: one that is not on the way, and the unfinished last turn of
    a truncated episode. `error`: a wrong answer, or no key.
    """
    path, roles = self._path(prompt), list[str]()
    for k, step in enumerate(steps):
      if final := _ANSWER.fullmatch(step):
        roles.append("necessary" if final[1] == path[-1] else "error")
      elif len(step) == 2 and step[0] in _KEYS:
        on_the_way = "necessary" if step[0] in path else "irrelevant"
        roles.append("redundant" if step in steps[:k] else on_the_way)
      else:
        roles.append("irrelevant" if truncated and not step.endswith("$") else "error")
    return roles


class Table:
  """The table of one episode."""

  def __init__(self, table: dict[str, str], path: list[str]):
    self._table, self._path, self._found = table, path, set[str]()

  def begin(self, problem: Problem) -> str | None:
    return None

  def step(self, text: str) -> Turn:
    if final := _ANSWER.fullmatch(text):
      right = final[1] == self._path[-1]
      return Turn(None, True, Outcome(float(right), right, False))
    key = text.removesuffix("$")
    self._found |= {key} & {*self._path}
    score = (len(self._found) + 1) / (len(self._path) + 1)
    return Turn(f"{self._table.get(key, '?')};", score=score, error=key not in self._table)

  def close(self) -> None:
    pass
