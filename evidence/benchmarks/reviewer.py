"""What the reviewer client costs the host: processor time of a review, and how much it slows the
training thread.

    python evidence/benchmarks/reviewer.py

The real SDK talks to a server on the loopback, in a process of its own, which answers after two
seconds. The training thread is a loop of compiled matrix products and some Python, timed in turns
with and without reviews at a concurrency of 48. On this machine it also competes with the server
for processors, which it would not elsewhere.
"""

import contextlib
import http.server
import json
import multiprocessing
import os
import re
import statistics
import time

CALLS, CONCURRENCY, STEPS = 480, 48, 12
LATENCY = 2.0  # seconds; what small Gemini models are said to take
TEXT = "So the train needs 3 hours for 240 km, and its speed is 240 / 3 = 80 km/h. "


def serve(port) -> None:
  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers["content-length"])))
      data = json.loads(re.search(r">\n(.*)\n</", body["contents"][0]["parts"][0]["text"])[1])
      time.sleep(LATENCY)
      steps = [
        {"step": s["step"], "why": "", "role": "necessary", "weight": 2}
        for s in data["answers"][0]["steps"]
      ]
      text = json.dumps(
        {"answers": [{"answer": 1, "steps": steps, "suspicious": False, "sure": True}]}
      )
      reply = {
        "candidates": [
          {"content": {"role": "model", "parts": [{"text": text}]}, "finishReason": "STOP"}
        ],
        "usageMetadata": {
          "promptTokenCount": 900,
          "candidatesTokenCount": 300,
          "totalTokenCount": 1200,
        },
      }
      out = json.dumps(reply).encode()
      self.send_response(200)
      self.send_header("content-type", "application/json")
      self.send_header("content-length", str(len(out)))
      self.end_headers()
      self.wfile.write(out)

    def log_message(self, *args):
      pass

  class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 1024

    def handle_error(self, request, address):
      pass  # Calls are cut off on purpose.

  server = Server(("127.0.0.1", 0), Handler)
  port.send(server.server_port)
  server.serve_forever()


def main() -> None:
  os.environ["GEMINI_API_KEY"] = "none"
  ours, theirs = multiprocessing.get_context("spawn").Pipe()
  process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
  process.start()
  url = f"http://127.0.0.1:{ours.recv()}"

  from dca_jax.review import REVIEWERS, Truth, open_reviewer
  from dca_jax.review.client_config import ClientConfig

  client = ClientConfig(
    base_url=url, concurrency=CONCURRENCY, max_dollars=1000.0, attempt_seconds=30.0
  )
  nobody = Truth(None, None)  # type: ignore[arg-type]
  opened = open_reviewer(REVIEWERS["gemini"](client=client), nobody, None)
  with contextlib.closing(opened) as reviewer:
    # The first calls build what the SDK builds lazily.
    reviewer.submit(requests(0, CONCURRENCY), 60.0).result()
    before = time.process_time()
    reviews = reviewer.submit(requests(1000, CALLS), 120.0).result()
    cost = (time.process_time() - before) / CALLS
    ok = sum(r.status == "ok" for r in reviews)
    print(f"{CALLS} reviews of {STEPS} steps, {ok} ok: {cost * 1000:.2f} ms each")
    quiet, busy = beside_training(reviewer)
    print(
      f"a step of the training thread: {statistics.median(quiet) * 1000:.1f} ms alone,"
      f" {statistics.median(busy) * 1000:.1f} ms beside {CONCURRENCY} calls at once"
      f" ({statistics.median(busy) / statistics.median(quiet) - 1:+.1%}); {len(busy)} each"
    )
  process.terminate()


def requests(start: int, count: int) -> list:
  from dca_jax.review import Request

  steps = tuple(f"Step {k}. {TEXT}" for k in range(STEPS))
  return [
    Request(f"{i}", f"Problem {i}. {TEXT * 3}", steps, True, False)
    for i in range(start, start + count)
  ]


def beside_training(reviewer) -> tuple[list[float], list[float]]:
  """Seconds of a step of the training thread, alone and while reviews are under way."""
  import jax
  import jax.numpy as jnp

  product = jax.jit(lambda x: jnp.tanh(x @ x))
  x = jnp.ones((1024, 1024))

  def training_step() -> float:
    began = time.perf_counter()
    for _ in range(4):
      sum(i * i for i in range(20_000))
      product(x).block_until_ready()
    return time.perf_counter() - began

  training_step()
  quiet: list[float] = []
  busy: list[float] = []
  for round_ in range(6):
    quiet += [training_step() for _ in range(20)]
    pending = reviewer.submit(requests(10_000 * (round_ + 1), 512), 3600.0)
    time.sleep(LATENCY / 2)  # By then all of them are under way.
    busy += [training_step() for _ in range(20)]
    pending.cancel()
    time.sleep(LATENCY)
    reviewer.stats()
  return quiet, busy


if __name__ == "__main__":
  main()
