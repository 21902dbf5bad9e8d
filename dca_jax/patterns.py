"""Regular expressions of a user's, with a limit on their time: on some texts some of them would
take forever."""

import functools
import sys
from collections.abc import Iterator

import regex

SECONDS = 1.0
"""Of processor time for one text. What a policy writes takes a sound pattern less than a thousandth
of that."""


def mistake(pattern: str) -> str:
  """What is wrong with a pattern; empty if nothing is."""
  try:
    regex.compile(pattern)
  except regex.error as error:
    return f"is no regular expression ({error})"
  return ""


def finditer(pattern: str, text: str) -> Iterator[regex.Match[str]]:
  """As `re.finditer`; raises a TimeoutError when it takes too long."""
  return regex.finditer(pattern, text, timeout=SECONDS, concurrent=True)


def fullmatch(pattern: str, text: str) -> bool:
  """Whether the whole text matches (`.` matches line ends too); raises a TimeoutError when it takes
  too long."""
  return regex.fullmatch(pattern, text, regex.DOTALL, timeout=SECONDS, concurrent=True) is not None


@functools.cache
def warn_slow(key: str, pattern: str, harm: str) -> None:
  """Says once that a pattern took too long for a text, and what that means for the run."""
  print(
    f"warning: {key}: {pattern!r} took over {SECONDS:g} s on a completion, which {harm};"
    " write it without nested repetition",
    file=sys.stderr,
  )
