"""What a way to reach a language model promises, and what the failures of servers mean.

Each transport sends one prompt and returns one reply, and tells every failure in our words.
"""

import contextlib
import dataclasses
import email.utils
import json
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from dca_jax.review.keys import struck_out

_MONTH = 31 * 86400.0
"""What is longer is no delay that a server means."""


class Reply(NamedTuple):
  text: str | None
  prompt_tokens: int | None = None
  cached_tokens: int = 0
  output_tokens: int | None = None
  """Thought included; None where the server did not say."""
  thought_tokens: int = 0
  model: str = ""


@dataclasses.dataclass(eq=False, repr=False)
class CallFailed(Exception):
  """A call without a usable reply."""

  status: str
  """`rate_limited`; `quota`, one that does not refill within minutes; `server_error`, `connection`,
  `timeout`; `malformed`; `truncated` and `blocked`, replies that ended early; `client_error`, what
  we sent was refused."""
  message: dataclasses.InitVar[str]
  """No key of the environment is in what is shown of it."""
  again: bool = False
  """Whether another try can help."""
  wait: float | None = None
  """The seconds that the server asked for, in full."""
  billed: bool = False
  """Whether it may have been billed all the same."""
  usage: Reply | None = None
  """The tokens that the server stated for it, if it did; then the text is None."""
  about: str = "server"
  """What has to change before it works: the `server`, whose faults pass; the `content`, this very
  text; or the `settings`: key, model, address, and what has been paid for."""
  until: float | None = None
  """When a quota refills, as seconds since 1970, where that is known."""

  def __post_init__(self, message: str) -> None:
    super().__init__()  # Without the message, which repr would show with its keys.
    self._message = message

  def __str__(self) -> str:
    return struck_out(self._message)[:400]


class Transport(Protocol):
  """Carries prompts to a model; its `remember(cache)`, if it has one, is given the file of replies
  before the first call."""

  async def __call__(
    self,
    system: str,
    user: str,
    schema: dict[str, Any],
    max_tokens: int,
    seed: int,
  ) -> Reply:
    """Raises CallFailed, and nothing else, where there is no reply."""
    ...

  async def close(self) -> None: ...


def http_failure(
  code: int,
  body: Any,
  headers: Mapping[str, str],
  sent: Iterable[str] = (),
) -> CallFailed:
  """What a status and its body mean; `body` is JSON if it could be read as such, else text.

  Whatever was `sent` as a key does not come back in the message.
  """
  error = _error_of(body)
  message = struck_out(f"{code}: {_summary(error, body)}", sent)
  reasons = {str(error.get(name)) for name in ("code", "type", "status", "reason")}
  reasons |= {str(entry.get("reason")) for entry in _details(error)}
  if code == 402 or (code == 429 and "insufficient_quota" in reasons):
    return CallFailed("quota", message, about="settings")
  if code == 429:
    return _over_a_limit(message, error, headers)
  if code in (408, 425) or code >= 500:
    return CallFailed("server_error", message, True, asked_wait(headers, body))
  if 200 <= code < 300:
    return CallFailed("malformed", message, again=True)
  if 300 <= code < 400:
    place = struck_out(headers.get("Location") or headers.get("location") or "", sent)
    message = f"{code}: the server sends us elsewhere ({place}), where neither key nor prompt go"
    return CallFailed("client_error", message, about="settings")
  if reasons & {"content_filter", "content_policy_violation"}:
    return CallFailed("blocked", message, about="content")
  ours = code in (401, 403, 404, 405, 407, 410) or reasons & {
    "FAILED_PRECONDITION",
    "API_KEY_INVALID",
    "invalid_api_key",
  }
  return CallFailed("client_error", message, about="settings" if ours else "content")


def asked_wait(headers: Mapping[str, str], body: Any) -> float | None:
  """The seconds that a server asks to wait for; None where it does not.

  In a RetryInfo, a Retry-After header, a sentence, or beside a limit that is used up.
  """
  error = _error_of(body)
  for entry in _details(error):
    if str(entry.get("@type", "")).endswith("google.rpc.RetryInfo"):
      return _seconds(str(entry.get("retryDelay", "")))
  lower = {str(name).lower(): str(value) for name, value in headers.items()}
  after = lower.get("retry-after", "")
  if (seconds := _seconds(after)) is not None:
    return seconds
  with contextlib.suppress(TypeError, ValueError, OverflowError):
    wait = email.utils.parsedate_to_datetime(after).timestamp() - time.time()
    return max(0.0, wait) if wait < _MONTH else None
  if said := re.search(r"try again in ([0-9.dhms]{1,20})", str(error.get("message"))):
    return _seconds(said[1].rstrip("."))
  limits = ("requests", "tokens")
  used_up = [limit for limit in limits if lower.get(f"x-ratelimit-remaining-{limit}") == "0"]
  waits = [_seconds(lower.get(f"x-ratelimit-reset-{limit}", "")) for limit in used_up]
  return max((wait for wait in waits if wait is not None), default=None)


def ended_early(status: str, message: str, used: Reply | None) -> CallFailed:
  """A reply that was cut off or filtered, which has been paid for."""
  return CallFailed(status, message, billed=True, usage=used, about="content")


def malformed(what: str, used: Reply | None) -> CallFailed:
  """A reply with no answer in it."""
  return CallFailed("malformed", what, again=True, usage=used, billed=bool(used))


def version_of(said: Any, asked: str) -> str:
  """The model as the server names it, or as it was asked for where the server does not say."""
  return said if isinstance(said, str) else asked


def stated(reply: Reply) -> Reply | None:
  """The usage that goes with a failure; None where the server did not state it."""
  known = reply.prompt_tokens is not None and reply.output_tokens is not None
  return reply if known else None


def tokens(value: Any) -> int | None:
  """A number of tokens as a server states it; None for whatever is no such number."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return None
  return int(value) if 0 <= value < 1e12 and value == int(value) else None


def part_of(value: Any, *path: str | int) -> Any:
  """What stands at a path in JSON of any shape; None where there is no such place."""
  for name in path:
    if isinstance(name, int):
      value = value[name] if isinstance(value, list) and len(value) > name else None
    else:
      value = value.get(name) if isinstance(value, dict) else None
  return value


def json_of(text: str) -> Any:
  """JSON as a value; ValueError for whatever is none."""
  try:
    return json.loads(text.lstrip("\ufeff"))
  except RecursionError:
    raise ValueError("nested too deeply") from None


def object_with(text: str, *parts: str) -> dict[str, Any]:
  """The JSON object that a reply consists of; every real one has one of these parts.

  Raises:
    CallFailed: it is something else, or an error sent with the status of success.
  """
  try:
    answer = json_of(text)
  except ValueError:
    cut_off = any(f'"{part}"' in text for part in parts)
    message = f"the server's reply is no JSON: {_plain(text)}"
    raise CallFailed("malformed", message, again=True, billed=cut_off) from None
  if isinstance(answer, dict) and any(answer.get(part) for part in parts):
    return answer
  error = _error_of(answer)
  if error:
    code = str(error.get("code"))
    raise http_failure(int(code) if re.fullmatch("[345][0-9][0-9]", code) else 500, answer, {})
  raise CallFailed("malformed", f"the server's reply has no {parts[0]}: {_plain(text)}", again=True)


def _over_a_limit(message: str, error: dict[str, Any], headers: Mapping[str, str]) -> CallFailed:
  """A moment's overload, or a quota that takes longer than minutes to refill."""
  now, wait = time.time(), asked_wait(headers, {"error": error})
  violations = [each for entry in _details(error) for each in _list(entry.get("violations"))]
  if any("PerDay" in str(part_of(each, "quotaId")) for each in violations):
    # Google's days begin at midnight in California; in summer that is an hour sooner than this.
    until = ((now - 8 * 3600) // 86400 + 1) * 86400 + 8 * 3600
    return CallFailed("quota", message, True, until - now, until=until)
  if wait is not None and wait > 600:
    return CallFailed("quota", message, True, wait, until=now + wait)
  if wait is None and re.search(r"per.?day|daily", message, re.IGNORECASE):
    return CallFailed("quota", message, True)
  return CallFailed("rate_limited", message, True, wait)


def _error_of(body: Any) -> dict[str, Any]:
  """What a body says of an error, as an object: empty where it says nothing."""
  if isinstance(body, list) and len(body) == 1:
    body = body[0]
  if isinstance(body, str):
    return {"message": body} if body.strip() else {}
  error = part_of(body, "error")
  if isinstance(error, dict):
    return error
  if error:
    return {"message": error if isinstance(error, str) else json.dumps(error)}
  said = part_of(body, "message") or part_of(body, "detail")
  return {**body, "message": said if isinstance(said, str) else json.dumps(said)} if said else {}


def _summary(error: dict[str, Any], body: Any) -> str:
  message = error.get("message") or error.get("msg") or json.dumps(error or body)
  message = _plain(message if isinstance(message, str) else json.dumps(message))
  if names := [str(error[name]) for name in ("status", "code", "param") if error.get(name)]:
    message += f" ({', '.join(names)})"
  return message


def _plain(text: str) -> str:
  """The beginning of a text without the tags of HTML."""
  text = re.sub(r"<[^<>]*>", " ", text[:4000])
  return " ".join(text.split())[:300] or "nothing"


def _details(error: dict[str, Any]) -> list[dict[str, Any]]:
  return [entry for entry in _list(error.get("details")) if isinstance(entry, dict)]


def _list(value: Any) -> list[Any]:
  return value if isinstance(value, list) else []


def _seconds(text: str) -> float | None:
  """`7`, `3.5s`, `120ms` or `1h2m3s`; None for what is no delay."""
  text, units = text.strip(), {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
  found = re.findall(r"([\d.]+)(ms|[smhd]?)", text)
  if not found or "".join(number + unit for number, unit in found) != text.removeprefix("-"):
    return None
  with contextlib.suppress(ValueError):
    total = sum(float(number) * units[unit] for number, unit in found)
    return 0.0 if text.startswith("-") else total if total < _MONTH else None
  return None
