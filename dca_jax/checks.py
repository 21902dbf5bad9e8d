"""Common rules for settings: each returns the keys of a section that break it, and what they must be."""


def at_least(least: int, section, *keys: str) -> dict[str, str]:
  why = f"must be at least {least}" if least else "must not be negative"
  return {key: why for key in keys if getattr(section, key) < least}


def positive(section, *keys: str) -> dict[str, str]:
  return {key: "must be positive" for key in keys if not getattr(section, key) > 0}


def fraction(section, *keys: str) -> dict[str, str]:
  return {key: "must be between 0 and 1" for key in keys if not 0 <= getattr(section, key) <= 1}


def one_of(section, key: str, *known: str) -> dict[str, str]:
  *most, last = map(repr, known)
  return {} if getattr(section, key) in known else {key: f"must be {', '.join(most)} or {last}"}
