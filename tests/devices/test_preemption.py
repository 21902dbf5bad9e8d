"""Notices that a machine will be taken away."""

import http.server
import os
import signal
import threading
import time

import pytest
import tiny

from dca_jax.devices import preemption as notices
from dca_jax.errors import Terminated
from dca_jax.loop import train


class Metadata:
  """A metadata server that says what `said` holds, as Google Cloud's does."""

  def __init__(self):
    self.said = {"preempted": "FALSE", "maintenance-event": "NONE"}
    outer = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_GET(self):
        key = self.path.removeprefix("/computeMetadata/v1/instance/")
        if self.headers["Metadata-Flavor"] != "Google" or key not in outer.said:
          self.send_error(403)
          return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(outer.said[key].encode())

      def log_message(self, *args):
        pass

    self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def metadata(monkeypatch):
  server = Metadata()
  monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server.server_port}")
  monkeypatch.setattr(notices, "_EVERY", 0.05)
  yield server
  server.server.shutdown()
  server.server.server_close()


def wait_for(stops) -> str:
  end = time.monotonic() + 300
  while not stops.reason and time.monotonic() < end:
    time.sleep(0.01)
  return stops.reason


@pytest.mark.parametrize(
  ("key", "said"), [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")]
)
def test_what_google_cloud_announces_is_noticed(key, said, metadata):
  with notices.notices() as stops:
    stops.phase("the update", at_once=False)
    time.sleep(0.3)
    assert stops.reason == ""
    metadata.said[key] = said
    assert wait_for(stops) == f"a notice of Google Cloud ({key}: {said})"


def test_a_server_that_is_not_there_says_nothing(monkeypatch):
  monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
  monkeypatch.setattr(notices, "_EVERY", 0.05)
  with notices.notices() as stops:
    time.sleep(0.3)
    assert stops.reason == ""


@pytest.mark.parametrize(
  ("number", "said", "status"), [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "Ctrl-C", 130)]
)
def test_a_signal_stops_a_phase_at_once_or_after_it(number, said, status):
  before = signal.signal(number, signal.default_int_handler)
  with notices.notices() as stops:
    stops.phase("the update", at_once=False)
    os.kill(os.getpid(), number)
    assert wait_for(stops) == said
    with pytest.raises(Terminated, match=f"^stopped by {said} ") as asked:
      stops.phase("the next")
    assert asked.value.status == status
  with pytest.raises(Terminated), notices.notices():  # noqa: PT012
    os.kill(os.getpid(), number)
    time.sleep(1)
  assert signal.getsignal(number) == signal.default_int_handler
  signal.signal(number, before)


def test_a_second_ctrl_c_is_what_it_was_before():
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  with pytest.raises(KeyboardInterrupt) as asked, notices.notices() as stops:  # noqa: PT012
    stops.phase("the update", at_once=False)
    for _ in range(2):
      os.kill(os.getpid(), signal.SIGINT)
      wait_for(stops)
  assert not isinstance(asked.value, Terminated)
  signal.signal(signal.SIGINT, before)


def test_a_notice_cuts_a_wait_short():
  with pytest.raises(Terminated), notices.notices() as stops:  # noqa: PT012
    stops.phase("reviews")
    threading.Timer(0.05, stops.notice, ["the weather"]).start()
    stops.wait(lambda: [time.sleep(0.05) for _ in range(6000)], then="the next")


def test_a_notice_ends_a_run_with_its_step_saved(metadata, tmp_path):
  def announce():
    while len(tiny.read_lines(tmp_path)) < 3:
      time.sleep(0.01)
    metadata.said["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"

  threading.Thread(target=announce, daemon=True).start()
  config = tiny.make_config({"steps": 2000, "checkpoint.every": 1000})
  with pytest.raises(
    Terminated,
    match=r"stopped by a notice of Google Cloud \(maintenance-event: .* step \d+ is safe",
  ):
    train(config, str(tmp_path), quiet=True)
  last = tiny.read_lines(tmp_path)[-1]["step"]
  assert last < 2000
  assert (tmp_path / "checkpoints" / str(last)).is_dir()


def test_what_came_in_time_is_waited_for_once():
  with notices.notices() as stops:
    came = iter(range(3))
    assert stops.wait(lambda: next(came), then="the next") == 0
    assert next(came) == 1
