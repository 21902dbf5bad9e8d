"""Notices that a machine will be taken away."""

import http.server
import os
import signal
import threading
import time

import pytest
import tiny

from dca_jax import notices
from dca_jax.errors import Terminated
from dca_jax.train import train


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


def wait_for(noticed) -> str:
  end = time.monotonic() + 10
  while not noticed() and time.monotonic() < end:
    time.sleep(0.01)
  return noticed()


@pytest.mark.parametrize(
  ("key", "said"), [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")]
)
def test_what_google_cloud_announces_is_noticed(key, said, metadata):
  with notices.notices() as noticed:
    time.sleep(0.3)
    assert noticed() == ""
    metadata.said[key] = said
    assert wait_for(noticed) == f"a notice of Google Cloud ({key}: {said})"


def test_a_server_that_is_not_there_says_nothing(monkeypatch):
  monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
  monkeypatch.setattr(notices, "_EVERY", 0.05)
  with notices.notices() as noticed:
    time.sleep(0.3)
    assert noticed() == ""


def test_sigterm_is_noticed_and_handed_back_afterwards():
  before = signal.getsignal(signal.SIGTERM)
  with notices.notices() as noticed:
    os.kill(os.getpid(), signal.SIGTERM)
    assert wait_for(noticed) == "SIGTERM"
  assert signal.getsignal(signal.SIGTERM) == before


def test_a_notice_ends_a_run_with_its_step_saved(metadata, tmp_path):
  metadata.said["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
  config = tiny.make_config({"steps": 2000, "checkpoint.every": 1000})
  with pytest.raises(Terminated, match=r"stopped by a notice of Google Cloud \(maintenance-event: .* step \d+ is safe"):
    train(config, str(tmp_path), quiet=True)
  last = tiny.read_lines(tmp_path)[-1]["step"]
  assert last < 2000
  assert (tmp_path / "checkpoints" / str(last)).is_dir()
