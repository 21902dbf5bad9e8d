"""Ways to reach a language model. Each sends one prompt and returns one reply, and tells every failure in our words.

To add one: a class with `__call__` and `close` as in `Transport`, and a line in `TRANSPORTS`.
"""

import contextlib
import datetime
import email.utils
import json
import os
import time
import zoneinfo
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import aiohttp

from dca_jax.errors import UserError

# How long a server may take. The Developer API refuses less than ten; shorter limits are kept by the caller.
SERVER_SECONDS = 30


class Reply(NamedTuple):
  text: str | None
  prompt_tokens: int | None = None
  cached_tokens: int = 0
  output_tokens: int | None = None
  """Thought included; None where the server did not say."""
  thought_tokens: int = 0
  model: str = ""


class CallFailed(Exception):
  """A call without a usable reply.

  Attributes:
    status: `rate_limited`; `quota`, one that does not refill within minutes; `server_error`,
      `connection`, `timeout`; `malformed`; `truncated` and `blocked`, replies that ended early;
      `client_error`, what we sent was refused.
    again: whether another try can help.
    wait: the seconds that the server asked for, in full.
    billed: whether it may have been billed all the same.
    usage: the tokens that the server stated for it, if it did; then the text is None.
    about: what has to change before it works: the `server`, whose faults pass; the `content`, this
      very text; or the `settings`: key, model, address, and what has been paid for.
    until: when a quota refills, as seconds since 1970, where that is known.
  """

  def __init__(
    self,
    status: str,
    message: str,
    again: bool = False,
    wait: float | None = None,
    billed: bool = False,
    usage: Reply | None = None,
    about: str = "server",
    until: float | None = None,
  ):
    super().__init__(message)
    self.status, self.again, self.wait, self.billed = status, again, wait, billed
    self.usage, self.about, self.until = usage, about, until


class Transport(Protocol):
  async def __call__(self, system: str, user: str, schema: dict[str, Any], max_tokens: int, seed: int) -> Reply:
    """Raises CallFailed, and nothing else, where there is no reply."""
    ...

  async def close(self) -> None: ...


class Gemini:
  """Gemini through google-genai: a developer key from the environment, or Google Cloud with ambient credentials."""

  def __init__(self, model: str, thinking: str, base_url: str, vertex: bool, connections: int):
    from google import genai
    from google.genai import types

    del connections  # The SDK takes aiohttp where it is installed, which does not count them, and is the faster.
    project, location = os.environ.get("GOOGLE_CLOUD_PROJECT"), os.environ.get("GOOGLE_CLOUD_LOCATION", "global")
    if vertex and not project:
      raise UserError("reviewer.vertex: set GOOGLE_CLOUD_PROJECT (and GOOGLE_CLOUD_LOCATION) in the environment")
    if not vertex and not (os.environ.get("GOOGLE_API_KEY") or os.environ.get("GEMINI_API_KEY")):
      raise UserError("reviewer.name 'gemini': no key; set GEMINI_API_KEY in the environment (aistudio.google.com)")
    options = types.HttpOptions(
      base_url=base_url or None,
      timeout=SERVER_SECONDS * 1000,
      retry_options=types.HttpRetryOptions(attempts=1),  # Ours knows deadlines, budgets and what the server asked for.
    )
    cloud: dict[str, Any] = {"enterprise": True, "project": project, "location": location} if vertex else {}
    self._client = genai.Client(http_options=options, **cloud)
    self._model, self._thinking = model, thinking

  async def __call__(self, system, user, schema, max_tokens, seed) -> Reply:
    from google.genai import errors, types

    level = types.ThinkingLevel(self._thinking.upper()) if self._thinking else None

    config = types.GenerateContentConfig(
      system_instruction=system,
      response_mime_type="application/json",
      response_json_schema=schema,
      max_output_tokens=max_tokens,
      seed=seed,
      candidate_count=1,
      thinking_config=types.ThinkingConfig(thinking_level=level) if level else None,
      automatic_function_calling=types.AutomaticFunctionCallingConfig(disable=True),
      automatic_continuation=False,  # It is on by default, and then one call may become any number.
    )
    try:
      response = await self._client.aio.models.generate_content(model=self._model, contents=user, config=config)
    except errors.APIError as error:
      headers = getattr(error.response, "headers", None) or {}
      raise http_failure(error.code, str(error), headers, error.details) from None
    except Exception as error:
      raise _connection_failure(error) from None
    usage = response.usage_metadata or types.GenerateContentResponseUsageMetadata()
    thought, answered = usage.thoughts_token_count or 0, usage.candidates_token_count
    if response.candidates:
      finish = getattr(response.candidates[0].finish_reason, "name", None)
      stopped = {None: "", "STOP": "", "MAX_TOKENS": "truncated"}.get(finish, "blocked")
    else:
      stopped = "blocked" if response.prompt_feedback and response.prompt_feedback.block_reason else ""
    reply = Reply(
      None if stopped else response.text,
      usage.prompt_token_count,
      usage.cached_content_token_count or 0,
      None if answered is None else answered + thought,
      thought,
      response.model_version or self._model,
    )
    if stopped:
      raise CallFailed(stopped, "the reply ended early", billed=True, usage=reply, about="content")
    return reply

  async def close(self) -> None:
    await self._client.aio.aclose()


class OpenAI:
  """Any server that speaks OpenAI's chat completions, such as vLLM or SGLang; the key, if any, is OPENAI_API_KEY."""

  def __init__(self, model: str, thinking: str, base_url: str, vertex: bool, connections: int):
    del vertex
    self._url, self._model, self._thinking = base_url.rstrip("/") + "/chat/completions", model, thinking
    self._connections = connections
    self._session: aiohttp.ClientSession | None = None

  async def __call__(self, system, user, schema, max_tokens, seed) -> Reply:
    body = {
      "model": self._model,
      "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
      "max_tokens": max_tokens,
      "seed": seed,
      "response_format": {"type": "json_schema", "json_schema": {"name": "review", "schema": schema, "strict": True}},
    }
    if self._thinking:
      body["reasoning_effort"] = self._thinking
    if self._session is None:  # Within the loop, where it belongs.
      key = os.environ.get("OPENAI_API_KEY")
      self._session = aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        connector=aiohttp.TCPConnector(limit=2 * self._connections),
        timeout=aiohttp.ClientTimeout(total=SERVER_SECONDS),
      )
    try:
      async with self._session.post(self._url, json=body) as response:
        if response.status != 200:
          raise http_failure(response.status, (await response.text())[:200], response.headers, None)
        answer = await response.json(content_type=None)
      choice, usage = answer["choices"][0], answer.get("usage") or {}
      stopped = {"length": "truncated", "content_filter": "blocked"}.get(choice.get("finish_reason"))
      reply = Reply(
        None if stopped else choice["message"].get("content"),
        usage.get("prompt_tokens"),
        (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        usage.get("completion_tokens"),
        (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0,
        answer.get("model") or self._model,
      )
      if stopped:
        raise CallFailed(stopped, "the reply ended early", billed=True, usage=reply, about="content")
      return reply
    except (KeyError, IndexError, TypeError, AttributeError) as error:
      raise CallFailed("malformed", f"the server's reply has no {error}", again=True, billed=True) from None
    except Exception as error:
      raise _connection_failure(error) from None

  async def close(self) -> None:
    if self._session is not None:
      await self._session.close()


TRANSPORTS: dict[str, Callable[..., Transport]] = {"gemini": Gemini, "openai": OpenAI}


def http_failure(code: int, message: str, headers: Mapping[str, str], details: Any) -> CallFailed:
  """What an HTTP status means: a limit, a passing fault of the server, this text, or the settings."""
  message = f"{code}: {message}"[:300]
  if code == 429:
    return _over_a_limit(message, headers, details)
  if code == 408 or code >= 500:
    return CallFailed("server_error", message, True, asked_wait(headers, details))
  return CallFailed("client_error", message, about="settings" if code in (401, 403, 404) else "content")


def _over_a_limit(message: str, headers: Mapping[str, str], details: Any) -> CallFailed:
  error = details.get("error") if isinstance(details, dict) else None
  error = error if isinstance(error, dict) else {}
  if "insufficient_quota" in (error.get("code"), error.get("type")):
    return CallFailed("quota", message, about="settings")
  entries = error.get("details")
  for entry in entries if isinstance(entries, list) else []:
    violations = entry.get("violations") if isinstance(entry, dict) else None
    for violation in violations if isinstance(violations, list) else []:
      if isinstance(violation, dict) and "PerDay" in str(violation.get("quotaId")):
        midnight = _midnight_in_california()
        return CallFailed("quota", message, True, midnight - time.time(), until=midnight)
  wait = asked_wait(headers, details)
  return CallFailed("rate_limited", message, True, wait)


def _midnight_in_california() -> float:
  """The next one, when Google's quotas per day refill."""
  now = datetime.datetime.now(zoneinfo.ZoneInfo("America/Los_Angeles"))
  return datetime.datetime.combine(now + datetime.timedelta(days=1), datetime.time(), now.tzinfo).timestamp()


def asked_wait(headers: Mapping[str, str], details: Any) -> float | None:
  """The seconds that a server asks to wait for, in a RetryInfo or a Retry-After header; None where it does not."""
  error = details.get("error") if isinstance(details, dict) else None
  entries = error.get("details") if isinstance(error, dict) else None
  for entry in entries if isinstance(entries, list) else []:
    if isinstance(entry, dict) and str(entry.get("@type", "")).endswith("google.rpc.RetryInfo"):
      return _seconds(str(entry.get("retryDelay", "")).removesuffix("s"))
  after = headers.get("retry-after") or headers.get("Retry-After") or ""
  if (seconds := _seconds(after)) is not None:
    return seconds
  with contextlib.suppress(TypeError, ValueError):
    return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())
  return None


def _seconds(text: str) -> float | None:
  with contextlib.suppress(ValueError):
    # What is longer than a month is no delay.
    return max(0.0, float(text)) if float(text) < 31 * 86400 else None
  return None


def _connection_failure(error: Exception) -> CallFailed:
  """For what is no HTTP status: never the key or a header, only the kind of failure."""
  if isinstance(error, CallFailed):
    return error
  name = type(error).__name__
  if isinstance(error, TimeoutError):
    return CallFailed("timeout", name, again=True, billed=True)
  if isinstance(error, json.JSONDecodeError):
    return CallFailed("malformed", "the server's reply is not JSON", again=True, billed=True)
  if isinstance(error, (OSError, aiohttp.ClientError)):
    reached = not isinstance(error, (aiohttp.ClientConnectorError, ConnectionRefusedError))
    return CallFailed("connection", f"{name}: {error}"[:200], again=True, billed=reached)
  return CallFailed("client_error", f"{name}: {error}"[:200])
