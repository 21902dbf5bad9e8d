"""The text of completions, and cutting it into steps."""

import functools
import re
from collections.abc import Sequence


@functools.lru_cache
def token_pieces(tokenizer) -> list[str]:
  """The text of every token."""
  return [tokenizer.decode([i]) for i in range(len(tokenizer))]


def cut(pieces: Sequence[str], step_end: str) -> list[tuple[int, int]]:
  """Token spans [start, end) of the steps of one completion; they partition it.

  Args:
    pieces: the text of each token; joined, they are the completion.
    step_end: regular expression; the token that holds the last character of a match ends a step. What follows the last
      match, the end token included, is the last step.
  """
  ends, position = [], 0
  for piece in pieces:
    position += len(piece)
    ends.append(position)
  boundaries = {m.end() for m in re.finditer(step_end, "".join(pieces)) if m.end() > m.start()}
  spans, start, position = [], 0, 0
  for i, end in enumerate(ends):
    if any(position < b <= end for b in boundaries) or i == len(ends) - 1:
      spans.append((start, i + 1))
      start = i + 1
    position = end
  return spans
