"""Any server that speaks OpenAI's chat completions."""

from typing import Any

import aiohttp

from dca_jax.review.client_config import ClientConfig
from dca_jax.review.dialect import Dialect, Part, without_lengths
from dca_jax.review.keys import key_from_environment
from dca_jax.review.transports import (
  Reply,
  ended_early,
  http_failure,
  malformed,
  object_with,
  part_of,
  stated,
  tokens,
  version_of,
)
from dca_jax.review.wire import close, connection_failure, open_session

# Of a limit's name; its value too can be refused, as too large.
_NO_SUCH = "(?:un(?:supported|known|recogni|expected)|extra|not (?:a|support|permit|recogni))"


class OpenAI:
  """vLLM, SGLang, llama.cpp, OpenAI or a gateway; the key, if any, is OPENAI_API_KEY."""

  def __init__(self, config: ClientConfig):
    self._url = config.base_url.rstrip("/") + "/chat/completions"
    self._model, self._thinking = config.model, config.thinking
    self._key, self._connections = key_from_environment("OPENAI_API_KEY"), config.concurrency
    self._session: aiohttp.ClientSession | None = None
    limits, forms = ("max_tokens", "max_completion_tokens"), ("json_schema", "json_object", False)
    parts = {
      "maxLength": Part((True, False), "max_?length"),
      "max_tokens": Part(limits, f"{limits[1]}|max_tokens.*{_NO_SUCH}|{_NO_SUCH}.*max_tokens"),
      "response_format": Part(forms, "response.?format|schema|json.?object|grammar"),
      "seed": Part((True, False), r"\bseed\b"),
    }
    if self._thinking:
      parts["reasoning_effort"] = Part((True, False), "reasoning|thinking")
    self._dialect = Dialect(config.base_url, parts)

  async def __call__(
    self, system: str, user: str, schema: dict[str, Any], max_tokens: int, seed: int
  ) -> Reply:
    session = self._session = self._session or open_session(
      self._connections,
      headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
      timeout=aiohttp.ClientTimeout(total=None),  # The caller's limit is the one that holds.
    )

    async def send(ways: dict[str, Any]) -> Reply:
      body: dict[str, Any] = {
        "model": self._model,
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
        ways["max_tokens"]: max_tokens,
      }
      if form := ways["response_format"]:
        body["response_format"] = {"type": form}
        if form == "json_schema":
          own = schema if ways["maxLength"] else without_lengths(schema)
          body["response_format"][form] = {"name": "review", "schema": own, "strict": True}
      if ways["seed"]:
        body["seed"] = seed
      if ways.get("reasoning_effort"):
        body["reasoning_effort"] = self._thinking
      async with session.post(self._url, json=body) as response:
        return read_reply(await response.text("utf-8", "replace"), self._model)

    try:
      return await self._dialect.call(send)
    except Exception as error:
      raise connection_failure(error) from None

  async def close(self) -> None:
    await close(self._session)


def read_reply(text: str, model: str) -> Reply:
  """The reply in a response's body; `model` is its name where the server does not say.

  Raises:
    CallFailed: there is none.
  """
  answer = object_with(text, "choices")
  choice, usage = part_of(answer, "choices", 0), answer.get("usage")
  said, finish = part_of(choice, "message"), part_of(choice, "finish_reason")
  reply = Reply(
    None,
    tokens(part_of(usage, "prompt_tokens")),
    tokens(part_of(usage, "prompt_tokens_details", "cached_tokens")) or 0,
    tokens(part_of(usage, "completion_tokens")),
    tokens(part_of(usage, "completion_tokens_details", "reasoning_tokens")) or 0,
    version_of(answer.get("model"), model),
  )
  used = stated(reply)
  if error := part_of(choice, "error"):
    raise http_failure(500, {"error": error}, {})
  content = _text(part_of(said, "content"))
  if finish == "length":
    raise ended_early("truncated", "the model ran out of tokens", used)
  if finish == "content_filter" or (part_of(said, "refusal") and not content):
    raise ended_early("blocked", "the model refused", used)
  if not isinstance(said, dict):
    raise malformed("the reply has no message", used)
  thought = _text(said.get("reasoning_content")) or _text(said.get("reasoning"))
  return reply._replace(text=content if content.strip() else thought)


def _text(content: Any) -> str:
  if isinstance(content, list):
    return "".join(_text(part_of(part, "text")) for part in content)
  return content if isinstance(content, str) else ""
