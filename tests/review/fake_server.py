"""A server on the loopback that speaks Gemini's and OpenAI's wire formats, and fails
as it is told to."""

import collections
import hashlib
import http.server
import json
import re
import threading
import time
from typing import Any


def asked_for(user: str) -> dict[str, Any]:
  """The data between the marks of a prompt."""
  found = re.search(r"<(doc-[0-9a-f]{16})>\n(.*)\n</\1>", user, re.DOTALL)
  assert found, user
  return json.loads(found[2])


def honest_reply(data, role="necessary", weight=2) -> dict[str, Any]:
  """A well-formed review of what was asked for."""
  if "begun" in data:
    return {"chance": 50}
  return {
    "answers": [
      {
        "answer": answer["answer"],
        "steps": [
          {"step": s["step"], "why": "", "role": role, "weight": weight} for s in answer["steps"]
        ],
        "suspicious": False,
        "sure": True,
      }
      for answer in data["answers"]
    ]
  }


# Usage that cannot be true: tokens of the prompt, those of it that were cached, and of the output.
LIES = (
  (-500, 0, -100),
  (10**18, 0, 10**18),
  (500, 10**9, 100),
  (500, -(10**9), 100),
  (0, 0, 0),
  (None, None, None),
  (500.5, 0.5, 100.5),
  ("many", "few", "some"),
)


class FakeServer:
  """`behave(name, attempt)` says what happens to a request: `ok`, a status code, or the name
  of a fault below.

  `name` is the content of the request without its marks; `attempt` counts the requests of
  that name before.

  Faults:
    a number: that status; with 429 it asks for a delay of 0.1 s.
    (number, seconds): that status, asking for that delay in the body and in a header.
    hang, drop, drip: no answer, a closed connection, a byte now and then.
    quota: 429 for a quota per day.
    html, empty: bodies that are no completion; malformed, fenced, wrong: texts that are no review.
    max_tokens, safety, blocked, continuation: replies that ended early.
    no usage, lies: a review without usage, or with one of LIES.
  """

  def __init__(
    self, behave=lambda name, attempt: "ok", latency=0.0, reply=honest_reply, tokens=(500, 100)
  ):
    self.behave, self.latency, self.reply, self.tokens = behave, latency, reply, tokens
    self.requests: list[dict[str, Any]] = []
    self.in_flight = self.most_in_flight = 0
    self.attempts: collections.Counter[str] = collections.Counter()
    self.jobs: list[dict[str, Any]] = []
    """Batch jobs; each is told to be running once, and while jobs are `held`, before it has ended.
    One of which nothing is left is unknown to the server."""
    self.held = False
    self.contexts: dict[str, dict[str, Any]] = {}
    """Instructions that are kept, by name; `behave("context", 0)` says what happens to one that
    comes."""
    self._lock = threading.Lock()
    self._hanging = threading.Event()
    outer = self

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"
      disable_nagle_algorithm = True

      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with outer._lock:
          outer.in_flight += 1
          outer.most_in_flight = max(outer.most_in_flight, outer.in_flight)
          outer.requests.append({"path": self.path, "headers": dict(self.headers), "body": body})
        try:
          outer._answer(self, body)
        except OSError:
          pass  # The client has gone.
        finally:
          with outer._lock:
            outer.in_flight -= 1

      def do_GET(self):
        job = outer.jobs[int(self.path.rpartition("/")[2].partition("?")[0])]
        if not job:
          outer._send_error(self, 404, [], {})
          return
        told = outer._job(job)
        outer._send(self, 200, json.dumps({"name": job["name"], "metadata": told}).encode())

      def do_DELETE(self):
        del outer.contexts["/".join(self.path.split("/")[-2:])]
        outer._send(self, 200, b"{}")

      def log_message(self, *args):
        pass

    class Server(http.server.ThreadingHTTPServer):
      request_queue_size = 1024
      daemon_threads = True

      def handle_error(self, request, address):
        pass  # A client that has gone is what several tests are about.

    self._server = Server(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self._server.server_port}"
    threading.Thread(
      target=self._server.serve_forever, daemon=True, kwargs={"poll_interval": 0.02}
    ).start()

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._hanging.set()
    self._server.shutdown()
    self._server.server_close()

  def _job(self, job) -> dict[str, Any]:
    """What a batch job says of itself: the replies to its questions, last one first."""
    job["asked"] += 1
    if job["asked"] == 1 or self.held:
      return {"state": "BATCH_STATE_RUNNING"}
    responses = []
    for one in reversed(job["requests"]):
      data = asked_for(one["request"]["contents"][0]["parts"][0]["text"])
      name = hashlib.sha256(json.dumps(data).encode()).hexdigest()
      attempt, self.attempts[name] = self.attempts[name], self.attempts[name] + 1
      action = self.behave(name, attempt)
      text = json.dumps(self.reply(data))
      said = (
        {"error": {"code": action, "message": "told to"}}
        if isinstance(action, int)
        else {"response": gemini_reply(action, text, self.tokens[0], 0, self.tokens[1])}
      )
      responses.append(said | {"metadata": one["metadata"]})
    return {
      "state": "BATCH_STATE_SUCCEEDED",
      "output": {"inlinedResponses": {"inlinedResponses": responses}},
    }

  def _answer(self, handler, body) -> None:
    if handler.path.endswith(":batchGenerateContent"):
      asked = body["batch"]["inputConfig"]["requests"]["requests"]
      job = {"name": f"batches/{len(self.jobs)}", "requests": asked, "asked": 0}
      self.jobs.append(job)
      told = {"name": job["name"], "metadata": {"state": "BATCH_STATE_PENDING"}}
      self._send(handler, 200, json.dumps(told).encode())
      return
    if handler.path.endswith("/cachedContents"):
      if not self._no_reply(handler, self.behave("context", 0), False):
        name = f"cachedContents/{len(self.requests)}"
        self.contexts[name] = body
        told = {"name": name, "usageMetadata": {"totalTokenCount": 4200}}
        self._send(handler, 200, json.dumps(told).encode())
      return
    if body.get("cachedContent", "") not in ("", *self.contexts):
      self._send_error(handler, 403, [], {})
      return
    openai = handler.path.endswith("chat/completions")
    user = body["messages"][1]["content"] if openai else body["contents"][0]["parts"][0]["text"]
    data = asked_for(user)
    name = hashlib.sha256(json.dumps(data).encode()).hexdigest()
    with self._lock:
      attempt, self.attempts[name] = self.attempts[name], self.attempts[name] + 1
    action = self.behave(name, attempt)
    time.sleep(self.latency)
    if self._no_reply(handler, action, openai):
      return
    text = json.dumps(self.reply(data))
    if action == "malformed":
      text = text[: len(text) // 2]
    elif action == "fenced":
      text = f"```json\n{text}\n```"
    elif action == "wrong":
      text = text.replace('"step": 1,', '"step": 7,', 1)
    (prompt, output), cached = self.tokens, 400 * ("cachedContent" in body)
    if action == "lies":
      prompt, cached, output = LIES[int(name[:8], 16) % len(LIES)]
    make = openai_reply if openai else gemini_reply
    self._send(handler, 200, json.dumps(make(action, text, prompt, cached, output)).encode())

  def _no_reply(self, handler, action, openai: bool) -> bool:
    """Does what an action says instead of a reply; False where it wants one."""
    if action == "hang":
      self._hanging.wait(60)
      return True
    if action == "drop":
      handler.close_connection = True
      handler.connection.close()
      return True
    if action == "drip":  # A byte now and then, so that no read ever times out.
      handler.send_response(200)
      handler.send_header("content-length", "1000")
      handler.end_headers()
      for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        if self._hanging.wait(0.2):
          return True
    if action == 429:
      action = (429, None) if openai else (429, 0.1)
    if isinstance(action, int):
      action = (action, None)
    if action == "quota":
      violation = {"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}
      kind = "type.googleapis.com/google.rpc.QuotaFailure"
      self._send_error(handler, 429, [{"@type": kind, "violations": [violation]}], {})
      return True
    if isinstance(action, tuple):
      code, seconds = action
      details, headers = [], {}
      if seconds is not None:
        kind = "type.googleapis.com/google.rpc.RetryInfo"
        details = [{"@type": kind, "retryDelay": f"{seconds}s"}]
        headers = {"retry-after": str(seconds)}
      self._send_error(handler, code, details, headers)
      return True
    if action in ("html", "empty"):
      self._send(handler, 200, b"<html>gateway</html>" if action == "html" else b"{}")
      return True
    return False

  def _send_error(self, handler, code: int, details, headers) -> None:
    error = {"error": {"code": code, "message": "told to", "status": "TOLD", "details": details}}
    self._send(handler, code, json.dumps(error).encode(), headers)

  def _send(self, handler, code: int, body: bytes, headers=()) -> None:
    handler.send_response(code)
    handler.send_header("content-type", "application/json")
    for header, value in dict(headers).items():
      handler.send_header(header, value)
    handler.send_header("content-length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def openai_reply(action, text: str, prompt: int, cached: int, output: int) -> dict:
  finish = {"max_tokens": "length", "safety": "content_filter"}.get(action, "stop")
  reply = {
    "model": "fake-001",
    "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}],
    "usage": {
      "prompt_tokens": prompt,
      "prompt_tokens_details": {"cached_tokens": cached},
      "completion_tokens": output,
    },
  }
  if action == "no usage":
    del reply["usage"]
  return reply


def gemini_reply(action, text: str, prompt: int, cached: int, output: int) -> dict:
  ends = {"max_tokens": "MAX_TOKENS", "safety": "SAFETY", "continuation": "CONTINUATION"}
  candidate = {
    "finishReason": ends.get(action, "STOP"),
    "index": 0,
    "content": {"role": "model", "parts": [{"text": text}]},
  }
  if action in ("safety", "max_tokens"):
    del candidate["content"]
  if action == "continuation":
    candidate["continuationToken"] = "more"
  reply = {
    "candidates": [candidate],
    "usageMetadata": {
      "promptTokenCount": prompt,
      "cachedContentTokenCount": cached,
      "candidatesTokenCount": output,
      "thoughtsTokenCount": 10,
    },
    "modelVersion": "gemini-fake-001",
    "responseId": "abc",
  }
  if action == "blocked":
    del reply["candidates"]
    reply["promptFeedback"] = {"blockReason": "SAFETY"}
  if action == "no usage":
    del reply["usageMetadata"]
  return reply
