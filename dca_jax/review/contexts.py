"""Instructions that Gemini keeps, so that calls which share them pay a tenth for them."""

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from dca_jax.review.transports import CallFailed, Reply
from dca_jax.review.wire import connection_failure

SECONDS = 600.0
"""How long the server keeps them; it deletes those of a killed process by itself."""
_OWED = 3
"""What keeping costs, in tokens of prompt for each token: one for reading it, and at most two for
the time (1 dollar an hour for a million tokens of Flash, 4.50 of Pro, as published for 2.5)."""


def is_long_enough(model: str, system: str) -> bool:
  """Whether the server keeps it: from 4,096 tokens on, of generation 2.5 from 2,048."""
  return len(system) >= 4 * (2048 if "2.5" in model else 4096)


class Contexts:
  """The kept instructions of a google-genai client, in the loop in which they are asked for."""

  def __init__(self, client: Any, model: str):
    self._client, self._model = client, model
    self._names: dict[str, str] = {}
    self._tries: dict[str, tuple[float, asyncio.Task[None]]] = {}
    """When each is to be kept anew; where it cannot be, it is tried as seldom."""
    self._owed = 0

  async def call(self, system: str, send: Callable[[str], Awaitable[Reply]]) -> Reply:
    """The reply to what `send` sends, which is given the name of the kept instructions, or empty
    where they have to go along. Making a name is not waited for."""
    now = asyncio.get_running_loop().time()
    due = system not in self._tries or self._tries[system][0] <= now
    if due and is_long_enough(self._model, system):  # Those that there are still hold for a while.
      self._tries[system] = now + 0.9 * SECONDS, asyncio.create_task(self._keep(system))
    name = self._names.get(system, "")
    try:
      reply = await send(name)
    except CallFailed as failed:
      if not name or failed.status != "client_error":
        raise
      reply = await send("")
      self._names.pop(system, None)  # It was the name that was refused.
    if reply.prompt_tokens:
      reply, self._owed = reply._replace(prompt_tokens=reply.prompt_tokens + self._owed), 0
    return reply

  async def _keep(self, system: str) -> None:
    from google.genai import types

    config = types.CreateCachedContentConfig(system_instruction=system, ttl=f"{SECONDS:.0f}s")
    try:
      kept = await self._client.aio.caches.create(model=self._model, config=config)
    except Exception as error:
      self._names.pop(system, None)
      print(f"note: instructions are sent: {connection_failure(error)}", file=sys.stderr)
      return
    self._names[system] = kept.name
    stated = kept.usage_metadata and kept.usage_metadata.total_token_count
    self._owed += _OWED * (stated or len(system) // 3)

  async def close(self) -> None:
    """Deletes them, if that takes no longer than a second."""
    deleting = [self._client.aio.caches.delete(name=name) for name in self._names.values()]
    with contextlib.suppress(TimeoutError):
      await asyncio.wait_for(asyncio.gather(*deleting, return_exceptions=True), 1.0)
