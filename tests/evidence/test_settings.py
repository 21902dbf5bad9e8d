"""docs/settings.md is what the sections say of themselves, and says something of every key."""

import dataclasses
import pathlib

import pytest

from evidence.settings import page, rows


def test_the_page_is_made_from_the_source():
  shown = (pathlib.Path(__file__).parents[2] / "docs" / "settings.md").read_text()
  assert shown == page(), "run: python -m evidence.settings > docs/settings.md"


def test_nothing_is_left_unsaid():
  assert not [line for line in page().splitlines() if line.endswith("|  |")]


@dataclasses.dataclass
class Inner:
  depth: int = 1
  """Of the well."""


@dataclasses.dataclass
class Spoken:
  width: int = 2
  """Of the | door."""
  inner: Inner = dataclasses.field(default_factory=Inner)
  """What is in it."""


@dataclasses.dataclass
class Heir(Spoken):
  width: int = 3


@dataclasses.dataclass
class Mumbled:
  first: int = 0
  """Has a text."""
  second: int = 0
  third: int = 0
  """Has a text."""


@dataclasses.dataclass
class Unsaid:
  inner: Inner = dataclasses.field(default_factory=Inner)


def test_a_section_in_a_section_has_a_line_above_its_keys():
  assert list(rows("a.", Spoken())) == [
    r"| `a.width` | `2` | Of the \| door. |",
    "| `a.inner` | a section | What is in it. |",
    "| `a.inner.depth` | `1` | Of the well. |",
  ]


def test_another_default_leaves_what_a_field_is_said_to_be():
  assert next(rows("a.", Heir())) == r"| `a.width` | `3` | Of the \| door. |"


@pytest.mark.parametrize(("section", "key"), [(Mumbled(), "a.second"), (Unsaid(), "a.inner")])
def test_a_field_without_a_docstring_borrows_none(section, key):
  with pytest.raises(ValueError, match=rf"^{key}: {type(section).__name__} has no docstring"):
    list(rows("a.", section))
