"""Cutting completions into steps, and at stop strings."""

import bisect
import codecs
import itertools
from collections.abc import Sequence

from dca_jax import patterns
from dca_jax.rollout.sampler import Samples
from dca_jax.tasks.tokenizer import token_bytes


def cut(
  pieces: Sequence[bytes], step_end: str, least: int = 0, most: int = 0
) -> list[tuple[int, int]]:
  """Token spans [start, end) of the steps of one completion; they partition it.

  Args:
    pieces: the bytes of each token; joined, they are the completion.
    step_end: regular expression; the token that holds the last byte of a match ends a step. What follows the last
      match, the end token included, is the last step.
    least: a step with fewer characters, white space aside, joins the next one; such a last step, the one before.
    most: steps after so many are joined to the last of them; 0 sets no limit.

  Raises:
    TimeoutError: the expression takes too long on this text.
  """

  def visible(start: int, end: int) -> int:
    return len("".join(b"".join(pieces[start:end]).decode(errors="replace").split()))

  ends = list(itertools.accumulate(map(len, pieces)))
  # Bytes that are no text become one character each, so every place in the text is a place in the bytes.
  text = b"".join(pieces).decode(errors="surrogateescape")
  spans: list[tuple[int, int]] = []
  start = position = place = 0
  counted = seen = (
    0  # Tokens that were looked at, and what is visible of the step under way: each token is read once.
  )
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
  """The texts of steps; joined, they are that of the completion. A character belongs to the step with its last byte."""
  decoder = codecs.getincrementaldecoder("utf-8")("replace")
  return tuple(
    decoder.decode(b"".join(pieces[start:end]), end == len(pieces)) for start, end in spans
  )


def stop_length(stop: Sequence[str], pieces: Sequence[bytes]) -> int | None:
  """How many tokens there are up to the one that completes the first of the strings `stop`; None where none stands."""
  text = b"".join(pieces)
  ends = [text.index(s) + len(s) for s in (string.encode() for string in stop) if s in text]
  return (
    bisect.bisect_left(list(itertools.accumulate(map(len, pieces))), min(ends)) + 1
    if ends
    else None
  )


def cut_at_stops(stop: Sequence[str], tokenizer, samples: Samples) -> Samples:
  """Samples on the host, each ended by the token that completes its first stop string."""
  if not stop:
    return samples
  lengths_B, truncated_B = samples.lengths_B.copy(), samples.truncated_B.copy()
  for i, (tokens_T, length) in enumerate(zip(samples.tokens_BxT, samples.lengths_B, strict=True)):
    if end := stop_length(stop, token_bytes(tokenizer, tokens_T[:length])):
      lengths_B[i], truncated_B[i] = end, False
  return samples._replace(lengths_B=lengths_B, truncated_B=truncated_B)
