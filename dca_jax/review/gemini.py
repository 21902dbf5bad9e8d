"""Gemini through google-genai: with a key, or through Google Cloud with ambient credentials."""

import math
import os
from functools import partial
from typing import Any

import aiohttp

from dca_jax.errors import UserError
from dca_jax.review.batches import Batches
from dca_jax.review.cache import Cache
from dca_jax.review.client_config import ClientConfig
from dca_jax.review.contexts import Contexts
from dca_jax.review.dialect import Dialect, Part, without_lengths
from dca_jax.review.keys import key_from_environment
from dca_jax.review.transports import (
  CallFailed,
  Reply,
  ended_early,
  malformed,
  object_with,
  part_of,
  stated,
  tokens,
  version_of,
)
from dca_jax.review.wire import close, connection_failure, open_session

_LEAST_SECONDS = 10
"""The Developer API refuses a shorter limit; shorter ones are kept by the caller."""


class Gemini:
  """The SDK makes requests and finds credentials; connections and reading are ours."""

  def __init__(self, config: ClientConfig):
    import google.genai  # Takes a second, which is not spent within the event loop.

    self._open = google.genai.Client
    self._config = config
    self._key = None if config.vertex else key_from_environment("GOOGLE_API_KEY", "GEMINI_API_KEY")
    if config.vertex and not os.environ.get("GOOGLE_CLOUD_PROJECT"):
      raise UserError(
        "reviewer.client.vertex: there is no project; set GOOGLE_CLOUD_PROJECT"
        " (and GOOGLE_CLOUD_LOCATION) in the environment"
      )
    if not config.vertex and not self._key:
      raise UserError(
        "reviewer.name 'gemini': there is no key; set GEMINI_API_KEY in the environment"
        " (a key is had at aistudio.google.com)"
      )
    self._client: google.genai.Client | None = None
    self._session: aiohttp.ClientSession | None = None
    self._batches: Batches | None = None
    self._contexts: Contexts | None = None
    self._kept: Cache | None = None
    parts = {
      "response_json_schema": Part((True, False), "schema|constraint"),
      "seed": Part((True, False), r"\bseed\b"),
    }
    if config.thinking:
      parts["thinking_level"] = Part((True, False), "thinking")
    self._dialect = Dialect(config.base_url or "Gemini", parts)

  def remember(self, kept: Cache) -> None:
    self._kept = kept

  def _connect(self) -> Any:
    from google.genai import types

    config = self._config
    self._session = self._session or open_session(config.concurrency, trust_env=True)
    options = types.HttpOptions(
      base_url=config.base_url or None,
      timeout=1000 * max(_LEAST_SECONDS, math.ceil(config.attempt_seconds)),
      retry_options=types.HttpRetryOptions(attempts=1),  # Ours knows deadlines and budgets.
      aiohttp_client=self._session,
    )
    if config.vertex:
      project = os.environ["GOOGLE_CLOUD_PROJECT"]
      location = os.environ.get("GOOGLE_CLOUD_LOCATION", "global")
      return self._open(enterprise=True, project=project, location=location, http_options=options)
    return self._open(enterprise=False, api_key=self._key, http_options=options)

  async def __call__(
    self, system: str, user: str, schema: dict[str, Any], max_tokens: int, seed: int
  ) -> Reply:
    from google.auth.exceptions import GoogleAuthError
    from google.genai import types

    model, tier = self._config.model, self._config.tier
    level = self._config.thinking.upper()
    thinking = types.ThinkingConfig(thinking_level=types.ThinkingLevel(level)) if level else None

    async def send(ways: dict[str, Any], name: str = "") -> Reply:
      asked = types.GenerateContentConfig(
        system_instruction=None if name else system,
        cached_content=name or None,
        response_mime_type="application/json",
        response_json_schema=without_lengths(schema) if ways["response_json_schema"] else None,
        max_output_tokens=max_tokens,
        seed=seed if ways["seed"] else None,
        candidate_count=1,
        thinking_config=thinking if ways.get("thinking_level") else None,
      )
      if self._batches:
        return read_reply(await self._batches.ask(user, asked), model)
      asked.service_tier = types.ServiceTier(tier) if tier else None
      asked.automatic_function_calling = types.AutomaticFunctionCallingConfig(disable=True)
      asked.automatic_continuation = False  # It is on by default; one call may become any number.
      asked.should_return_http_response = True
      response = await client.aio.models.generate_content(model=model, contents=user, config=asked)
      body = response.sdk_http_response and response.sdk_http_response.body
      return read_reply(body or "", model)

    try:
      # Within the loop, where its connections belong.
      client = self._client = self._client or self._connect()
      if tier == "batch":
        assert self._kept is not None
        self._batches = self._batches or Batches(client, model, self._kept)
      if self._config.keep_instructions:
        self._contexts = self._contexts or Contexts(client, model)
        call = self._dialect.call
        return await self._contexts.call(system, lambda name: call(partial(send, name=name)))
      return await self._dialect.call(send)
    except GoogleAuthError as error:
      name = type(error).__name__
      if error.retryable:
        raise CallFailed("connection", f"{name}: {error}", again=True) from None
      raise CallFailed("client_error", f"{name}: {error}", about="settings") from None
    except Exception as error:
      raise connection_failure(error) from None

  async def close(self) -> None:
    if self._contexts:
      await self._contexts.close()
    await close(self._session)


def read_reply(text: str, model: str) -> Reply:
  """The reply in a response's body; `model` is its name where the server does not say.

  Raises:
    CallFailed: there is none.
  """
  answer = object_with(text, "candidates", "promptFeedback")
  candidate, usage = part_of(answer, "candidates", 0), answer.get("usageMetadata")
  thought = tokens(part_of(usage, "thoughtsTokenCount")) or 0
  answered = tokens(part_of(usage, "candidatesTokenCount"))
  reply = Reply(
    None,
    tokens(part_of(usage, "promptTokenCount")),
    tokens(part_of(usage, "cachedContentTokenCount")) or 0,
    None if answered is None else answered + thought,
    thought,
    version_of(answer.get("modelVersion"), model),
  )
  if answered is None and reply.prompt_tokens is not None and not part_of(candidate, "content"):
    reply = reply._replace(output_tokens=thought)  # Nothing was written, so nothing is stated.
  used, finish = stated(reply), part_of(candidate, "finishReason")
  if finish in ("MAX_TOKENS", "CONTINUATION"):
    raise ended_early("truncated", "the model ran out of tokens", used)
  if blocked := part_of(answer, "promptFeedback", "blockReason"):
    raise ended_early("blocked", f"the prompt was refused: {blocked}", used)
  if finish not in (None, "STOP", "FINISH_REASON_UNSPECIFIED"):
    raise ended_early("blocked", f"the model stopped: {finish}", used)
  parts = part_of(candidate, "content", "parts")
  if not isinstance(parts, list):
    raise malformed("the reply has no text", used)
  said = [part_of(part, "text") for part in parts if not part_of(part, "thought")]
  return reply._replace(text="".join(text for text in said if isinstance(text, str)))
