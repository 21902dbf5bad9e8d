"""Cutting completions into steps, and finding stop strings."""

import bisect
import codecs
import itertools
from collections.abc import Sequence

from dca_jax import patterns


def cut(
  pieces: Sequence[bytes], step_end: str, least: int = 0, most: int = 0
) -> list[tuple[int, int]]:
  """Token spans [start, end) of the steps of one completion; they partition it.

  Args:
    pieces: the bytes of each token; joined, they are the completion.
    step_end: regular expression; the token that holds the last byte of a match ends a step. What
      follows the last match, the end token included, is the last step.
    least: a step with fewer characters, white space aside, joins the next one; such a last step,
      the one before.
    most: steps after so many are joined to the last of them; 0 sets no limit.

  Raises:
    TimeoutError: the expression takes too long on this text.
  """

  def visible(start: int, end: int) -> int:
    return len("".join(b"".join(pieces[start:end]).decode(errors="replace").split()))

  ends = list(itertools.accumulate(map(len, pieces)))
  # Bytes that are no text become one character each, so every place in the text is a place in the
  # bytes.
  text = b"".join(pieces).decode(errors="surrogateescape")
  spans: list[tuple[int, int]] = []
  start = position = place = 0
  # Tokens that were looked at, and what is visible of the step under way: each is read once.
  counted = seen = 0
  for match in patterns.finditer(step_end, text):
    if len(spans) + 1 == most:
      break
    place += len(text[position : match.end()].encode(errors="surrogateescape"))
    position = match.end()
    end = bisect.bisect_left(ends, place) + 1
    if match[0] and end > start:
      seen, counted = seen + visible(counted, end), end
      if seen >= least:
        spans.append((start, end))
        start, seen = end, 0
  if start < len(pieces):
    joined = spans and seen + visible(counted, len(pieces)) < least
    spans.append((spans.pop()[0] if joined else start, len(pieces)))
  return spans


def step_texts(pieces: Sequence[bytes], spans: Sequence[tuple[int, int]]) -> tuple[str, ...]:
  """The texts of steps; joined, they are that of the completion. A character belongs to the step
  with its last byte."""
  decoder = codecs.getincrementaldecoder("utf-8")("replace")
  return tuple(
    decoder.decode(b"".join(pieces[start:end]), end == len(pieces)) for start, end in spans
  )


class StopFinder:
  """Finds the first of some strings in an answer that comes piece by piece."""

  def __init__(self, strings: Sequence[str], begun: bytes = b""):
    """`begun` is the text before the first token that is fed; none of the strings stands in it."""
    self._strings = [string.encode() for string in strings]
    self._kept = max(map(len, self._strings), default=1) - 1
    self._tail = begun[max(0, len(begun) - self._kept) :]
    self._tokens = 0

  def feed(self, pieces: Sequence[bytes]) -> int | None:
    """How many tokens were fed in all up to the one that completes a string; None where none does.

    Args:
      pieces: the bytes of each of the next tokens.
    """
    text = self._tail + b"".join(pieces)
    ends = [text.index(string) + len(string) for string in self._strings if string in text]
    if ends:
      lengths = list(itertools.accumulate(map(len, pieces), initial=len(self._tail)))
      return self._tokens + bisect.bisect_left(lengths, min(ends))
    self._tail = text[max(0, len(text) - self._kept) :]
    self._tokens += len(pieces)
    return None
