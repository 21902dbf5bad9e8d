"""What a server takes: the optional parts of a request, learned from what it refuses."""

import re
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dca_jax.review.keys import struck_out
from dca_jax.review.transports import CallFailed, Reply


class Part(NamedTuple):
  """A part of a request, and how else it can be sent."""

  ways: Sequence[Any]
  """From the best to the last; False leaves it out."""
  name: str
  """A pattern for what a refusal calls it."""


def without_lengths(schema: Any) -> Any:
  """A JSON schema without the lengths of texts, which not every server knows."""
  if not isinstance(schema, dict):
    return schema
  return {key: without_lengths(part) for key, part in schema.items() if key != "maxLength"}


class Dialect:
  """How to talk to one server.

  A call whose refusal names a part is made again at once, with that part in another way; one whose
  refusal names none, with as little as can be sent. What then works is kept, except for parts that
  have worked before: those are refused for one content only.
  """

  def __init__(self, server: str, parts: Mapping[str, Part]):
    self._server, self._parts = server, parts
    self._ways = dict.fromkeys(parts, 0)
    self._worked: set[tuple[str, int]] = set()

  async def call(self, send: Callable[[dict[str, Any]], Awaitable[Reply]]) -> Reply:
    """The reply to what `send` sends, which is given a way for every part."""
    ways = dict(self._ways)
    while True:
      try:
        reply = await send({name: self._parts[name].ways[way] for name, way in ways.items()})
      except CallFailed as failed:
        if failed.status != "client_error" or failed.about != "content":
          raise
        other = self._otherwise(str(failed), ways)
        if other == ways:
          raise
        ways = other
        continue
      self._learn(ways)
      return reply

  def _otherwise(self, refusal: str, ways: dict[str, int]) -> dict[str, int]:
    for name, part in self._parts.items():
      if ways[name] + 1 < len(part.ways) and re.search(part.name, refusal, re.IGNORECASE):
        return ways | {name: ways[name] + 1}
    # It does not say what, as Gemini where a schema is too large for it.
    last = {name: len(part.ways) - 1 for name, part in self._parts.items() if not part.ways[-1]}
    return ways | last

  def _learn(self, ways: dict[str, int]) -> None:
    for name, way in ways.items():
      known = self._ways[name]
      if way != known and (name, known) not in self._worked:
        self._ways[name] = way
        now = self._parts[name].ways[way]
        instead = f"it is asked with {now}" if now else "it is asked without"
        print(f"note: {struck_out(self._server)} refuses {name}; {instead}", file=sys.stderr)
    self._worked |= set(ways.items())
