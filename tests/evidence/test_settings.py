"""docs/settings.md is what the sections say of themselves, and says something of every key."""

import pathlib

from evidence.settings import page


def test_the_page_is_made_from_the_source():
  shown = (pathlib.Path(__file__).parents[2] / "docs" / "settings.md").read_text()
  assert shown == page(), "run: python -m evidence.settings > docs/settings.md"


def test_nothing_is_left_unsaid():
  assert not [line for line in page().splitlines() if line.endswith("|  |")]
