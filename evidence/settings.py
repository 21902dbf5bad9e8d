"""docs/settings.md: every setting, from the docstrings of its section.

python -m evidence.settings > docs/settings.md
"""

import ast
import dataclasses
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from typing import Any

from dca_jax.config import CHOICES, Config

HEAD = """# Settings

Every key of a recipe, which the command line can override, with its default. This page is made
from the source: `python -m evidence.settings > docs/settings.md`. A key that is misspelt,
impossible or without effect is an error. Where a section begins with a choice, such as `task.name`,
each of the built-in choices has keys of its own beside those that all have; yours too
([extending.md](extending.md)).
"""
ESCAPED = r"\|"
"""A bar in a cell."""


def meanings(kind: type[Any]) -> dict[str, str]:
  """What a class's own fields are said to be, each by the docstring right below it."""
  found: dict[str, str] = {}
  (parsed,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
  assert isinstance(parsed, ast.ClassDef)
  for line, below in itertools.pairwise(parsed.body):
    if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)):
      continue
    if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
      found[line.target.id] = " ".join(str(below.value.value).split())
  return found


def rows(prefix: str, section: Any, known: frozenset[str] = frozenset()) -> Iterator[str]:
  """A line of a table for each field that is not known yet; a section in it has a line of its own,
  above those of its fields.

  Raises:
    ValueError: a field has no docstring, neither here nor where the class that it is from has it.
  """
  said: dict[str, str] = {}
  for kind in reversed(type(section).__mro__[:-1]):
    said |= meanings(kind)
  for field in dataclasses.fields(section):
    value = getattr(section, field.name)
    if field.name in known:
      continue
    key = f"{prefix}{field.name}"
    if not said.get(field.name):
      raise ValueError(f"{key}: {type(section).__name__} has no docstring below this field")
    nested = dataclasses.is_dataclass(value)
    cells = f"`{key}`", "a section" if nested else f"`{value!r}`", said[field.name]
    yield f"| {' | '.join(cell.replace('|', ESCAPED) for cell in cells)} |"
    if nested:
      yield from rows(f"{key}.", value)


def table(lines: Iterator[str]) -> list[str]:
  return ["", "| key | default | what it does |", "|---|---|---|", *lines]


def page() -> str:
  config = Config()
  fields = [field.name for field in dataclasses.fields(config)]
  sections = [name for name in fields if dataclasses.is_dataclass(getattr(config, name))]
  out = [HEAD.rstrip(), *table(rows("", config, frozenset(sections)))]
  for place in sections:
    section = getattr(config, place)
    out += ["", f"## {place}"]
    choice = next((c for key, c in CHOICES.items() if key.startswith(f"{place}.")), None)
    if choice is None:
      out += table(rows(f"{place}.", section))
      continue
    shared = choice.base() if choice.base is not type(section) else section
    names = frozenset(f.name for f in dataclasses.fields(choice.base))
    out += table(rows(f"{place}.", shared))
    for name, kind in choice.known.items():
      own = [*rows(f"{place}.", kind(), names)]
      first = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
      out += ["", f"### {place}: {name}", "", first, *(table(iter(own)) if own else [])]
  return "\n".join(out) + "\n"


if __name__ == "__main__":
  print(page(), end="")
