"""Common rules for settings: each returns the keys of a section that break it, and what they must
be."""

from typing import Any


def at_least(least: int, section: Any, *keys: str) -> dict[str, str]:
  why = f"must be at least {least}" if least else "must not be negative"
  return {key: why for key in keys if getattr(section, key) < least}


def positive(section: Any, *keys: str, most: float = float("inf")) -> dict[str, str]:
  why = "must be positive" + (f" and at most {most}" if most < float("inf") else "")
  return {key: why for key in keys if not 0 < getattr(section, key) <= most}


def between(least: int, most: int, section: Any, *keys: str) -> dict[str, str]:
  return {
    key: f"must be between {least} and {most}"
    for key in keys
    if not least <= getattr(section, key) <= most
  }


def one_of(section: Any, key: str, *known: str | int) -> dict[str, str]:
  *most, last = map(repr, known)
  return {} if getattr(section, key) in known else {key: f"must be {', '.join(most)} or {last}"}
