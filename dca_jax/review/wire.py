"""HTTP for the transports: nothing but an answer of the server that was asked gets through."""

import asyncio
from typing import Any

import aiohttp

from dca_jax.review.transports import CallFailed, http_failure, json_of

_MOST_BYTES = 8 * 2**20
"""A review is a few kilobytes."""
_KEY_HEADERS = ("Authorization", "x-goog-api-key")


async def only_answers(
  request: aiohttp.ClientRequest,
  handler: aiohttp.ClientHandlerType,
) -> aiohttp.ClientResponse:
  """Reads the response to one request; a redirect is a failure like every status but 200."""
  response = await handler(request)
  body = bytearray()
  try:
    async for chunk in response.content.iter_any():
      body += chunk
      if len(body) > _MOST_BYTES:
        raise CallFailed("malformed", "the server's reply exceeds 8 MiB", again=True)
  except (CallFailed, aiohttp.ClientError):
    response.close()
    if response.status == 200:
      raise
  response._body = bytes(body)  # What `read` keeps, which has no limit.
  if response.status == 200:
    return response
  sent = [header.split()[-1] for name in _KEY_HEADERS if (header := request.headers.get(name))]
  text = response._body[:100_000].decode("utf-8", "replace")
  try:
    said = json_of(text)
  except ValueError:
    said = text
  raise http_failure(response.status, said, response.headers, sent)


def connection_failure(error: Exception) -> CallFailed:
  """For what is no HTTP status."""
  if isinstance(error, CallFailed):
    return error
  name = type(error).__name__
  if isinstance(error, TimeoutError):
    return CallFailed("timeout", name, again=True, billed=True)
  if isinstance(error, UnicodeDecodeError):
    return CallFailed("malformed", "the server's reply is no text", again=True)
  if isinstance(error, aiohttp.InvalidURL):
    return CallFailed("client_error", f"{name}: {error}", about="settings")
  if isinstance(error, (OSError, aiohttp.ClientError)):
    reached = not isinstance(error, (aiohttp.ClientConnectorError, ConnectionRefusedError))
    return CallFailed("connection", f"{name}: {error}", again=True, billed=reached)
  return CallFailed("client_error", f"{name}: {error}", about="settings")


def open_session(concurrency: int, **more: Any) -> aiohttp.ClientSession:
  """For so many calls at once; `more` goes to aiohttp. Opened within the loop, where it belongs."""
  connector = aiohttp.TCPConnector(limit=2 * concurrency)
  return aiohttp.ClientSession(connector=connector, middlewares=(only_answers,), **more)


async def close(session: aiohttp.ClientSession | None) -> None:
  """Closes it and lets its connections go, which takes the loop a few turns."""
  if session is not None:
    await session.close()
    await asyncio.sleep(0)
