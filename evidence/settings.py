"""docs/settings.md: every setting, from the docstrings of its section.

python -m evidence.settings > docs/settings.md
"""

import ast
import dataclasses
import inspect
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


def meanings(kind: type[Any]) -> dict[str, str]:
  """What a class's own fields are said to be; fields in a row share what stands below them."""
  found: dict[str, str] = {}
  waiting: list[str] = []
  (parsed,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
  assert isinstance(parsed, ast.ClassDef)
  for line in parsed.body:
    if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
      waiting.append(line.target.id)
    elif isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and waiting:
      found |= dict.fromkeys(waiting, " ".join(str(line.value.value).split()))
      waiting = []
    else:
      waiting = []
  return found


def rows(
  prefix: str, section: Any, known: frozenset[str] = frozenset(), above: str = ""
) -> Iterator[str]:
  """A line of a table for each field that is not known yet, sections in it included; what is said
  of such a section stands for fields of which nothing is."""
  said: dict[str, str] = {}
  escaped = r"\|"
  for kind in reversed(type(section).__mro__[:-1]):
    said |= meanings(kind)
  for field in dataclasses.fields(section):
    value = getattr(section, field.name)
    if field.name in known:
      continue
    if dataclasses.is_dataclass(value):
      yield from rows(f"{prefix}{field.name}.", value, above=said.get(field.name, ""))
    else:
      cells = f"`{prefix}{field.name}`", f"`{value!r}`", said.get(field.name, above)
      yield f"| {' | '.join(cell.replace('|', escaped) for cell in cells)} |"


def table(lines: Iterator[str]) -> list[str]:
  return ["", "| key | default | what it does |", "|---|---|---|", *lines]


def page() -> str:
  config = Config()
  outside = (row for row in rows("", config) if "." not in row.split("`")[1])
  out = [HEAD.rstrip(), *table(outside)]
  for field in dataclasses.fields(config):
    section = getattr(config, field.name)
    if not dataclasses.is_dataclass(section):
      continue
    out += ["", f"## {field.name}"]
    choice = next((c for key, c in CHOICES.items() if key.startswith(f"{field.name}.")), None)
    if choice is None:
      out += table(rows(f"{field.name}.", section))
      continue
    shared = choice.base() if choice.base is not type(section) else section
    names = frozenset(f.name for f in dataclasses.fields(choice.base))
    out += table(rows(f"{field.name}.", shared))
    for name, kind in choice.known.items():
      own = [*rows(f"{field.name}.", kind(), names)]
      first = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
      out += ["", f"### {field.name}: {name}", "", first, *(table(iter(own)) if own else [])]
  return "\n".join(out) + "\n"


if __name__ == "__main__":
  print(page(), end="")
