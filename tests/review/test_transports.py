"""Both transports, with the real SDK, against servers and gateways that answer in every way."""

import asyncio
import base64
import contextlib
import dataclasses
import gzip
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.parse
from typing import ClassVar

import pytest
from google.auth import exceptions as auth
from hypothesis import given, settings
from hypothesis import strategies as st

from dca_jax.errors import UserError
from dca_jax.review import LanguageModel, Request, Truth, gemini, open_reviewer, openai
from dca_jax.review.client_config import ClientConfig
from dca_jax.review.keys import struck_out
from dca_jax.review.transports import CallFailed, Reply, http_failure

KEY = "secret+key/1234567890=abc"
TRANSPORTS = {"gemini": gemini.Gemini, "openai": openai.OpenAI}
BOTH = pytest.mark.parametrize("name", TRANSPORTS)


@pytest.fixture(autouse=True)
def keys(monkeypatch):
  for name in ("GOOGLE_API_KEY", "GOOGLE_CLOUD_PROJECT"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("GEMINI_API_KEY", KEY)
  monkeypatch.setenv("OPENAI_API_KEY", KEY)


class Responds:
  """A server that answers request number i with `respond(i, body)`: a status, headers and bytes."""

  def __init__(self, respond):
    self.bodies, self.headers = [], []
    outer = self

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"
      disable_nagle_algorithm = True

      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        outer.bodies.append(body)
        outer.headers.append({k.lower(): v for k, v in self.headers.items()})
        status, headers, content = respond(len(outer.bodies) - 1, body)
        self.send_response(status)
        headers = {"content-length": str(len(content))} | headers
        for header, value in headers.items():
          self.send_header(header, value)
        self.end_headers()
        with contextlib.suppress(OSError):
          self.wfile.write(content)

      def log_message(self, *args):
        pass

    self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self._server.daemon_threads = True
    self.url = f"http://127.0.0.1:{self._server.server_port}"
    threading.Thread(target=self._server.serve_forever, daemon=True, args=(0.02,)).start()

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._server.shutdown()
    self._server.server_close()


def called(name, url, calls=1, schema={"type": "object"}, **config):  # noqa: B006
  """What each of so many calls of one transport ended with: a Reply, or a CallFailed."""

  async def all_of_them():
    base_url = url + ("/v1" if name == "openai" else "")
    transport = TRANSPORTS[name](ClientConfig(base_url=base_url, **config))
    ends = []
    for i in range(calls):
      try:
        ends.append(await transport("system", "user", schema, 100, i))
      except CallFailed as failed:
        ends.append(failed)
    await transport.close()
    return ends

  return asyncio.run(all_of_them())


def well(name, text="{}", **changes):
  """The body of a good reply."""
  if name == "openai":
    reply = {
      "model": "m-1",
      "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
      "usage": {"prompt_tokens": 7, "completion_tokens": 5},
    }
  else:
    reply = {
      "candidates": [{"finishReason": "STOP", "content": {"parts": [{"text": text}]}}],
      "usageMetadata": {"promptTokenCount": 7, "candidatesTokenCount": 2, "thoughtsTokenCount": 3},
      "modelVersion": "m-1",
    }
  return json.dumps(reply | changes).encode()


@BOTH
def test_a_good_reply(name):
  with Responds(lambda i, body: (200, {"content-type": "text/html"}, well(name, "hi"))) as server:
    (reply,) = called(name, server.url)
  assert (reply.text, reply.prompt_tokens, reply.output_tokens, reply.model) == ("hi", 7, 5, "m-1")


# Gateways.

BODIES = [
  b"",
  b" ",
  b"null",
  b"[]",
  b"{}",
  b"7",
  b'"busy"',
  b'{"error": "busy"}',
  b'{"error": null}',
  b'{"error": {}}',
  b'{"error": ["busy"]}',
  b'{"error": {"code": "429", "message": {"detail": ["x"]}, "details": {"a": 1}}}',
  b'[{"error": {"code": 429, "message": "m", "details": [null, {"violations": 3}]}}]',
  b'{"message": "busy", "status": 3}',
  b'{"detail": [{"loc": ["body"], "msg": "x"}]}',
  b"<html><head><title>502</title></head><body>Bad gateway</body></html>",
  b"too many requests",
  b"\xff\xfe\x00 not utf-8",
  b"[" * 50_000,
  b'{"choices": [], "candidates": []}',
  b'{"choices": null, "candidates": null}',
  b'{"choices": "x", "candidates": "x"}',
  b'{"choices": [null], "candidates": [null]}',
  b'{"choices": [{"message": null}], "candidates": [{"content": null}]}',
  b'{"choices": [{"error": {"code": 502, "message": "upstream"}}]}',
]


@BOTH
@pytest.mark.parametrize("content_type", ["application/json", "text/html; charset=nonsense"])
def test_no_body_of_a_gateway_is_fatal_or_billed(name, content_type):
  cases = [(status, body) for body in BODIES for status in (200, 204, 429, 503)]

  def respond(i, _):
    status, body = cases[i]
    return status, {"content-type": content_type}, b"" if status == 204 else body

  with Responds(respond) as server:
    ends = called(name, server.url, len(cases))
    assert len(server.bodies) == len(cases)
  for (status, body), end in zip(cases, ends, strict=True):
    assert isinstance(end, CallFailed), (status, body)
    expected = {429: {"rate_limited"}, 500: {"server_error"}, 503: {"server_error"}}
    assert end.status in expected.get(status, {"malformed", "rate_limited", "server_error"}), (
      status,
      body,
      end,
    )
    assert end.again
    assert not end.billed, (status, body)
    assert end.about == "server"
    assert end.usage is None


@BOTH
@pytest.mark.parametrize(
  ("headers", "body"),
  [
    ({"content-encoding": "gzip"}, b"not gzip at all"),
    ({"content-encoding": "gzip"}, gzip.compress(b"x" * 2**25)),
    ({"content-length": "100"}, b"short"),
    ({}, b"x" * (9 * 2**20)),
  ],
)
@pytest.mark.parametrize("status", [200, 503])
def test_bodies_that_cannot_be_read_are_failures_that_pass(name, headers, body, status):
  def respond(i, _):
    return status, {"connection": "close", **headers}, body

  with Responds(respond) as server:
    (end,) = called(name, server.url)
  assert (end.again, end.about) == (True, "server")
  if status == 503:
    assert (end.status, end.billed) == ("server_error", False)
  else:
    assert end.status in ("connection", "malformed")


@BOTH
def test_what_was_cut_off_or_filtered_is_billed_at_what_was_stated(name):
  cut = well(name)[:-20]
  if name == "openai":
    finishes = ("length", "content_filter")
    filtered = [{"message": {"content": None}, "finish_reason": each} for each in finishes]
    filtered.append({"message": {"content": None, "refusal": "no"}, "finish_reason": "stop"})
    bodies = [well(name, choices=[choice]) for choice in filtered]
  else:
    finishes = ("MAX_TOKENS", "SAFETY")
    bodies = [well(name, candidates=[{"finishReason": each}]) for each in finishes]
    bodies.append(well(name, candidates=[], promptFeedback={"blockReason": "SAFETY"}))
  with Responds(lambda i, _: (200, {}, [cut, *bodies][i])) as server:
    first, *ends = called(name, server.url, 1 + len(bodies))
  assert (first.status, first.billed, first.usage) == ("malformed", True, None)
  assert [end.status for end in ends] == ["truncated", "blocked", "blocked"]
  for end in ends:
    assert (end.about, end.usage.prompt_tokens, end.usage.text) == ("content", 7, None)
    assert end.usage.output_tokens == 5


@pytest.mark.parametrize(
  "message",
  [
    {"content": [{"type": "text", "text": "said"}]},
    {"content": None, "reasoning_content": "said"},
    {"content": " ", "reasoning": "said"},
    {"content": "said", "reasoning_content": "thought"},
  ],
)
def test_where_servers_put_the_text(message):
  body = well("openai", choices=[{"message": message}])
  assert openai.read_reply(body.decode(), "m").text == "said"


def test_thoughts_of_gemini_are_no_text():
  parts = [{"text": "hm", "thought": True}, {"text": "sa"}, {"text": "id"}]
  body = well("gemini", candidates=[{"content": {"parts": parts}}])
  assert gemini.read_reply(body.decode(), "m").text == "said"


# Who is to blame, and until when.


@pytest.mark.parametrize(
  ("code", "body", "status", "about"),
  [
    (
      400,
      {"error": {"message": "too long", "code": "context_length_exceeded"}},
      "client_error",
      "content",
    ),
    (400, {"error": {"message": "m", "code": "content_filter"}}, "blocked", "content"),
    (
      400,
      {"error": {"status": "FAILED_PRECONDITION", "message": "location"}},
      "client_error",
      "settings",
    ),
    (
      400,
      {"error": {"message": "key", "details": [{"reason": "API_KEY_INVALID"}]}},
      "client_error",
      "settings",
    ),
    (401, "no", "client_error", "settings"),
    (403, None, "client_error", "settings"),
    (404, [], "client_error", "settings"),
    (422, {"detail": [{"msg": "x"}]}, "client_error", "content"),
    (402, {"error": {"message": "Insufficient Balance"}}, "quota", "settings"),
    (429, {"error": {"message": "m", "code": "insufficient_quota"}}, "quota", "settings"),
    (429, {"error": {"message": "m", "type": "insufficient_quota"}}, "quota", "settings"),
    (429, {"error": {"message": "too fast"}}, "rate_limited", "server"),
    (
      529,
      {"type": "error", "error": {"type": "overloaded_error", "message": "m"}},
      "server_error",
      "server",
    ),
  ],
)
def test_what_a_status_is_about(code, body, status, about):
  failed = http_failure(code, body, {})
  assert (failed.status, failed.about) == (status, about)
  assert failed.again == (about == "server")


def quota(*names, delay=None):
  details = [
    {
      "@type": "type.googleapis.com/google.rpc.QuotaFailure",
      "violations": [{"quotaId": n} for n in names],
    }
  ]
  if delay:
    details.append({"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay})
  return {"error": {"code": 429, "message": "m", "details": details}}


def test_a_quota_per_day_is_told_from_a_minutes():
  minute = http_failure(429, quota("GenerateRequestsPerMinutePerProject", delay="33s"), {})
  assert (minute.status, minute.wait, minute.until) == ("rate_limited", 33.0, None)
  per_day = quota("GenerateRequestsPerDayPerProjectPerModel-FreeTier", delay="33s")
  day = http_failure(429, per_day, {})
  assert (day.status, day.again) == ("quota", True)
  assert 0 < day.wait <= 86400
  assert day.until == pytest.approx(time.time() + day.wait, abs=5)
  assert time.gmtime(day.until)[3:6] == (8, 0, 0)  # Midnight in California, in winter.
  message = "on requests per day (RPD). Please try again in 7m12s."
  openais = http_failure(429, {"error": {"message": message}}, {})
  assert (openais.status, openais.wait) == ("rate_limited", 432.0)
  limit = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "2h3m0.5s"}
  groqs = http_failure(429, "", limit)
  assert (groqs.status, groqs.wait) == ("quota", 7380.5)
  assert http_failure(429, {"error": {"message": "free-models-per-day"}}, {}).status == "quota"


# Keys and prompts go nowhere else.


@BOTH
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(name, status):
  with (
    Responds(lambda *_: (200, {}, well(name))) as elsewhere,
    Responds(lambda *_: (status, {"location": f"{elsewhere.url}/?k={KEY}"}, b"")) as server,
  ):
    (end,) = called(name, server.url)
    assert len(server.bodies) == 1
    assert not elsewhere.bodies
  assert (end.status, end.about, end.billed) == ("client_error", "settings", False)
  assert elsewhere.url in str(end)
  assert "secret" not in str(end)


@BOTH
def test_an_echoed_secret_is_struck_out(name, monkeypatch):
  other = "hf_AbCdEfGhIjKlMnOp"
  monkeypatch.setenv("HF_TOKEN", f' "{other}"\n')
  monkeypatch.setenv("DB_PASSWORD", "hunter2")
  monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
  said = [
    f"invalid key {KEY}",
    f"https://h/v1?key={urllib.parse.quote(KEY, safe='')}&x=1",
    f"https://user:passphrase@h/{urllib.parse.quote_plus(KEY).lower()}",
    f"Basic {base64.b64encode(f'user:{KEY}'.encode()).decode()}",
    f"a={base64.urlsafe_b64encode(KEY.encode()).decode()}; {other.upper()} and hunter2",
    f"Bearer {KEY[:14]}...",
  ]
  for text in said:
    for body in (text.encode(), json.dumps({"error": {"message": text, "code": 400}}).encode()):
      with Responds(lambda *_, body=body: (401, {}, body)) as server:
        (end,) = called(name, server.url)
      shown = str(end)
      assert "***" in shown
      for secret in ("secret+key", "1234567890", other[3:12].lower(), "hunter2", "passphrase"):
        assert secret not in shown.lower()
      for part in re.findall(r"[A-Za-z0-9_-]{8,}={0,2}", shown):
        with contextlib.suppress(ValueError):
          assert b"secret" not in base64.b64decode(part + "==", altchars=b"-_")
  assert struck_out("a false word\x1b[2J of it") == "a false word [2J of it"


@BOTH
def test_a_token_that_is_not_in_the_environment_is_struck_out_too(name, monkeypatch):
  """Such as the ambient one of Google Cloud."""
  with Responds(lambda *_: (403, {}, f"no rights: {KEY}".encode())) as server:
    base_url = server.url + ("/v1" if name == "openai" else "")
    transport = TRANSPORTS[name](ClientConfig(base_url=base_url))
    for variable in ("GEMINI_API_KEY", "OPENAI_API_KEY"):
      monkeypatch.delenv(variable)

    async def call():
      with pytest.raises(CallFailed) as failed:
        await transport("s", "u", {}, 9, 0)
      await transport.close()
      return str(failed.value)

    message = asyncio.run(call())
  assert "secret" not in message
  assert "no rights: ***" in message


@BOTH
@pytest.mark.parametrize("around", ["{}\n", ' "{}" ', "'{}'\r\n", "\ufeff{}"])
def test_a_key_is_trimmed_alike(name, around, monkeypatch):
  for variable in ("GEMINI_API_KEY", "OPENAI_API_KEY"):
    monkeypatch.setenv(variable, around.format(KEY))
  with Responds(lambda *_: (200, {}, well(name))) as server:
    called(name, server.url)
    headers = server.headers[0]
  sent = headers["x-goog-api-key" if name == "gemini" else "authorization"]
  assert sent.removeprefix("Bearer ") == KEY


@BOTH
@pytest.mark.parametrize("key", ["two words", "two\nlines", "a\x07b", "a\u200bb", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_refused(name, key, monkeypatch):
  for variable in ("GEMINI_API_KEY", "OPENAI_API_KEY"):
    monkeypatch.setenv(variable, key)
  with pytest.raises(UserError, match=r"_API_KEY in the environment") as error:
    TRANSPORTS[name](ClientConfig(base_url="http://localhost:1"))
  assert key not in str(error.value)


def test_gemini_is_asked_where_it_was_said_whatever_the_environment_says(monkeypatch):
  monkeypatch.setenv("GOOGLE_GENAI_USE_VERTEXAI", "true")
  with Responds(lambda *_: (200, {}, well("gemini"))) as server:
    (reply,) = called("gemini", server.url)
    assert server.headers[0]["x-goog-api-key"] == KEY
  assert reply.text == "{}"


# What a server takes.


def refuses(*parts, says="Unsupported parameter: '{}' is not supported with this model.", code=400):
  """Answers like a server that does not know some of the parts of a request."""

  def respond(i, body):
    sent = {**body, **body.get("generationConfig", {})}
    kind = (body.get("response_format") or {}).get("type")
    for part in parts:
      if part in sent or part == kind:
        message = says.format("response_format" if part == kind else part)
        return code, {}, json.dumps({"error": {"message": message}}).encode()
    return 200, {}, well("gemini" if "contents" in body else "openai")

  return respond


@pytest.mark.parametrize(
  ("parts", "first"),
  [
    (["max_tokens"], 2),
    (["seed"], 2),
    (["reasoning_effort"], 2),
    (["json_schema"], 2),
    (["json_schema", "json_object"], 3),
    (["max_tokens", "seed", "reasoning_effort", "json_schema", "json_object"], 6),
  ],
)
@pytest.mark.parametrize("code", [400, 422])
def test_a_part_that_is_refused_is_sent_otherwise_and_that_is_kept(parts, first, code, capsys):
  says = "Unsupported parameter: '{}' is not supported; use 'max_completion_tokens' for max_tokens"
  says = says if "max_tokens" in parts else says.partition(";")[0]
  with Responds(refuses(*parts, says=says, code=code)) as server:
    ends = called("openai", server.url, 3, thinking="low")
    assert [end.text for end in ends] == ["{}"] * 3
    assert len(server.bodies) == first + 2
    last = server.bodies[-1]
  assert not set(parts) & {*last, (last.get("response_format") or {}).get("type")}
  assert ("max_completion_tokens" in last) == ("max_tokens" in parts)
  kept = {"max_tokens", "seed", "reasoning_effort"} - set(parts)
  assert kept <= set(last)
  notes = re.findall("note: .* refuses", capsys.readouterr().err)
  assert len(notes) == len(set(parts) - {"json_object"})


@pytest.mark.parametrize("part", ["responseJsonSchema", "seed", "thinkingConfig"])
def test_gemini_can_refuse_parts_too(part):
  with Responds(refuses(part, says="Invalid value at {}: it has too many states")) as server:
    ends = called("gemini", server.url, 2, thinking="low")
    assert [end.text for end in ends] == ["{}"] * 2
    assert len(server.bodies) == 3
    config = server.bodies[-1]["generationConfig"]
  assert config["responseMimeType"] == "application/json"
  assert set(config) >= {"responseJsonSchema", "seed", "thinkingConfig"} - {part}


def test_a_server_that_does_not_say_what_it_refuses_is_asked_once_with_the_least():
  with Responds(refuses("json_schema", says="Bad request")) as server:
    (end, _) = called("openai", server.url, 2)
    assert end.text == "{}"
    assert [len(body) for body in server.bodies] == [5, 3, 3]


@BOTH
def test_a_schema_that_is_too_large_for_one_content_is_left_out_for_it(name, capsys):
  """Gemini says no more than this where a schema's values are too many."""
  bad = b'{"error": {"code": 400, "message": "Request contains an invalid argument."}}'
  with Responds(lambda i, _: (400, {}, bad) if i == 1 else (200, {}, well(name))) as server:
    ends = called(name, server.url, 3)
    assert [end.text for end in ends] == ["{}"] * 3
    sent = ["schema" in json.dumps(body).lower() for body in server.bodies]
  assert sent == [True, True, False, True]
  assert not capsys.readouterr().err


def test_a_server_that_knows_no_lengths_of_texts_still_gets_a_schema():
  bad = b'{"error": {"message": "Invalid schema for response_format: maxLength is not permitted"}}'

  def respond(i, body):
    return (400, {}, bad) if "maxLength" in json.dumps(body) else (200, {}, well("openai"))

  schema = {"type": "object", "properties": {"does": {"type": "string", "maxLength": 9}}}
  with Responds(respond) as server:
    for name, calls in (("openai", 3), ("gemini", 2)):
      server.bodies.clear()
      called(name, server.url, 2, schema=schema)
      assert len(server.bodies) == calls
      assert "does" in json.dumps(server.bodies[-1])


def test_what_has_worked_is_refused_for_one_content_only():
  def respond(i, body):
    bad = i in (1, 2) and "response_format" in body
    return (400, {}, b"schema too large") if bad else (200, {}, well("openai"))

  with Responds(respond) as server:
    ends = called("openai", server.url, 3)
    assert [end.text for end in ends] == ["{}"] * 3
    types = [(body.get("response_format") or {}).get("type") for body in server.bodies]
  assert types == ["json_schema", "json_schema", "json_object", None, "json_schema"]


@pytest.mark.parametrize(
  ("error", "status", "about"),
  [
    (auth.DefaultCredentialsError("none were found"), "client_error", "settings"),
    (auth.RefreshError("revoked"), "client_error", "settings"),
    (auth.TransportError("no route", retryable=True), "connection", "server"),
  ],
)
def test_credentials_that_cannot_be_had(error, status, about, monkeypatch):
  import google.auth

  def default(*args, **kwargs):
    raise error

  monkeypatch.setattr(google.auth, "default", default)
  monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "a-project")
  (end,) = called("gemini", "http://localhost:1", vertex=True)
  assert (end.status, end.about, end.billed) == (status, about, False)
  assert str(error.args[0]) in str(end)


def test_a_limit_that_is_too_large_is_no_refusal_of_its_name():
  body = b'{"error": {"message": "max_tokens is too large: 9000. This model allows at most 4096."}}'
  with Responds(lambda *_: (400, {}, body)) as server:
    (end,) = called("openai", server.url)
    assert all("max_tokens" in sent for sent in server.bodies)
  assert "too large" in str(end)


@pytest.mark.parametrize(("seconds", "header"), [(2.0, "10"), (240.5, "241")])
def test_the_time_that_gemini_is_given(seconds, header):
  with Responds(lambda *_: (200, {}, well("gemini"))) as server:
    called("gemini", server.url, attempt_seconds=seconds)
    assert server.headers[0]["x-server-timeout"] == header
  assert not ClientConfig(attempt_seconds=600.0).check()
  assert ClientConfig(attempt_seconds=601.0).check()


# Anything at all.

_NAMES = """
choices message content finish_reason usage prompt_tokens completion_tokens reasoning_content error
code candidates parts text finishReason usageMetadata promptTokenCount candidatesTokenCount details
promptFeedback violations quotaId retryDelay @type type status blockReason model modelVersion
"""
_JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_NAMES.split()), inner)
  ),
  max_leaves=25,
)
_BYTES = st.binary().map(lambda raw: raw.decode("utf-8", "replace"))
_ANY_TEXT = _JSON.map(json.dumps) | st.text() | _BYTES


@pytest.mark.parametrize("read", [openai.read_reply, gemini.read_reply])
@settings(max_examples=150, deadline=None)
@given(text=_ANY_TEXT)
def test_no_body_raises_anything_else(read, text):
  try:
    reply = read(text, "m")
  except CallFailed:
    return
  assert isinstance(reply.text, str)
  assert isinstance(reply.model, str)
  for count in (
    reply.prompt_tokens,
    reply.output_tokens,
    reply.cached_tokens,
    reply.thought_tokens,
  ):
    assert count is None or (type(count) is int and count >= 0)


@settings(max_examples=150, deadline=None)
@given(
  st.integers(100, 999),
  _JSON | st.text(),
  st.dictionaries(
    st.sampled_from(
      ["retry-after", "Location", "x-ratelimit-reset-tokens", "x-ratelimit-remaining-tokens"],
    ),
    st.text() | st.from_regex(r"[0-9.]{1,6}(ms|s|m|h)?", fullmatch=True) | st.just("0"),
  ),
)
def test_every_status_and_body_is_a_failure_of_some_kind(code, body, headers):
  failed = http_failure(code, body, headers)
  assert failed.about in ("server", "content", "settings")
  assert failed.wait is None or 0 <= failed.wait < 31 * 86400
  assert not failed.billed
  assert len(str(failed)) <= 400


# The end.

_ABANDONED = """
import os, sys
from dca_jax.review import REVIEWERS, Request, Truth, open_reviewer
from dca_jax.review.client_config import ClientConfig
name, url, how = sys.argv[1:]
config = REVIEWERS[name](client=ClientConfig(base_url=url, max_dollars=0.0))
reviewer = open_reviewer(config, Truth(None, None), None)
request = Request("1", "p", ("a", "b"), True, False)
assert reviewer.submit([request], 20.0).result()[0].status == "ok"
under_way = reviewer.submit([Request("2", "q", ("a", "b"), True, False)] * 3, 20.0)
if how == "closed":
  reviewer.close()
if how == "raised":
  raise SystemExit("the disk is full")
"""


@BOTH
@pytest.mark.parametrize("how", ["closed", "left", "raised"])
def test_nothing_is_printed_at_the_end(name, how):
  hang = threading.Event()

  def respond(i, body):
    if i:
      hang.wait(20)
    step = '{"role": "error", "weight": 1}'
    return 200, {}, well(name, f'{{"answer_1": {{"step_1": {step}, "step_2": {step}}}}}')

  with Responds(respond) as server:
    url = server.url + ("/v1" if name == "openai" else "")
    run = [sys.executable, "-W", "default::ResourceWarning", "-c", _ABANDONED]
    done = subprocess.run(
      [*run, name, url, how],
      capture_output=True,
      text=True,
      timeout=600,
      env=os.environ,
      check=False,
    )
    hang.set()
  assert done.stderr.strip() == ("the disk is full" if how == "raised" else "")


def test_another_transport_is_a_class_and_a_line():
  class Mine:
    def __init__(self, config):
      self._config = config

    async def __call__(self, system, user, schema, max_tokens, seed):
      step = {"role": "error", "weight": 1}
      text = json.dumps({"answer_1": {"step_1": step, "step_2": step}})
      return Reply(text, model=self._config.model)

    async def close(self):
      pass

  @dataclasses.dataclass(frozen=True)
  class MineModel(LanguageModel):
    name: str = "mine"
    unread: ClassVar[tuple[str, ...]] = ("vertex",)

    def connect(self, client):
      return Mine(client)

  client = ClientConfig(model="m", concurrency=3, max_dollars=0.0)
  config = MineModel(client=client)
  assert not config.check()
  assert [key for key in config.unused() if key.startswith("client.")] == ["client.vertex"]
  with contextlib.closing(open_reviewer(config, Truth(None, None), None)) as opened:
    (review,) = opened.submit([Request("1", "p", ("a", "b"), True, False)], 5.0).result()
  assert (review.status, review.model, review.roles) == ("ok", "m", ("error", "error"))
