"""A workdir in a bucket: Google Cloud Storage's real clients (gcsfs, TensorStore, Orbax),
a server on the loopback."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest
import tiny
from fake_server import FakeServer

DOWNLOAD = """
import sys, fsspec
fsspec.filesystem("gs").get(sys.argv[1] + "/", sys.argv[2] + "/", recursive=True)
"""


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
  """The environment in which `gs://runs` is that server's bucket."""
  port = str(tiny.free_port())
  log = (tmp_path_factory.mktemp("bucket") / "log").open("w")
  script = str(pathlib.Path(__file__).parents[1] / "fake_bucket.py")
  server = subprocess.Popen([sys.executable, script, port], stdout=log, stderr=log)
  address = f"http://localhost:{port}"
  yield {
    "STORAGE_EMULATOR_HOST": address,
    "TENSORSTORE_GCS_HTTP_URL": address,
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
  }
  server.kill()
  server.wait()


def run(environment, *arguments) -> subprocess.CompletedProcess:
  process = tiny.start(*arguments, environment=environment)
  out, errors = process.communicate(timeout=1200)
  return subprocess.CompletedProcess(arguments, process.returncode, out, errors)


def download(environment, address, folder):
  subprocess.run(
    [sys.executable, "-c", DOWNLOAD, address, str(folder)],
    env={**os.environ, **environment},
    check=True,
  )
  return folder


def test_a_run_in_a_bucket_is_killed_goes_on_and_ends_as_one_in_a_folder_does(bucket, tmp_path):
  changes = {
    "steps": 30,
    "credit.scheme": "weighted",
    "reviewer.name": "noisy",
    "checkpoint.every": 5,
  }
  recipe = tiny.write_recipe(tmp_path, changes)
  whole = run({}, "train", f"--config={recipe}", f"--workdir={tmp_path / 'whole'}")
  assert whole.returncode == 0, whole.stderr

  process = tiny.start("train", f"--config={recipe}", "--workdir=gs://runs/one", environment=bucket)
  for line in process.stdout:
    if line.startswith("step 13"):
      process.send_signal(signal.SIGSTOP)
      second = run(bucket, "train", f"--config={recipe}", "--workdir=gs://runs/one")
      assert second.returncode == 1
      assert f"gs://runs/one is held by process {process.pid} on" in second.stderr.splitlines()[-1]
      process.send_signal(signal.SIGKILL)
      break
  process.communicate()
  after = run(bucket, "train", f"--config={recipe}", "--workdir=gs://runs/one")
  assert after.returncode == 0, after.stderr
  assert "report: gs://runs/one/report.html" in after.stdout
  assert "sign of life" not in after.stdout  # That the first is dead is known at once.
  first = next(line for line in after.stdout.splitlines() if line.startswith("step"))
  assert 1 < int(first.split()[1].partition("/")[0]) <= 11

  copy = download(bucket, "gs://runs/one", tmp_path / "copy")
  tiny.assert_same_run(copy, tmp_path / "whole")
  assert {path.name for path in copy.iterdir()} == {
    path.name for path in (tmp_path / "whole").iterdir()
  }
  assert (copy / "tokenizer" / "tokenizer.json").exists()
  status = run(bucket, "status", "--workdir=gs://runs/one")
  assert "step 30 of 30" in status.stdout
  assert "checkpoints: 25, 30" in status.stdout


@pytest.mark.slow
def test_reviews_and_their_cost_are_found_again_in_a_bucket(bucket, tmp_path):
  with FakeServer() as server:
    for steps in (2, 4):
      changes = {
        "steps": steps,
        "checkpoint.every": 2,
        "credit.scheme": "weighted",
        "reviewer.name": "openai",
        "reviewer.client.base_url": server.url + "/v1",
        "reviewer.client.model": "gemini-3.5-flash-lite",
      }
      recipe = tiny.write_recipe(tmp_path, changes)
      done = run(bucket, "train", f"--config={recipe}", "--workdir=gs://runs/reviewed")
      assert done.returncode == 0, done.stderr
    # Each question once, but for the first one of each start.
    assert sorted(server.attempts.values())[-2:] == [1, 2]
    cost = (500 * 0.30 + 100 * 2.50) / 1e6
    copy = download(bucket, "gs://runs/reviewed", tmp_path / "copy")
    assert tiny.read_lines(copy)[-1]["review/dollars_spent"] == pytest.approx(
      cost * len(server.requests)
    )
  assert len(list((copy / "reviews").iterdir())) >= 2  # One a checkpoint, and one a minute.
  assert not (copy / "reviews.sqlite").exists()


@pytest.mark.parametrize("address", ["gs://no-such-bucket/one", "s3://runs/one"])
def test_a_bucket_that_cannot_be_used_is_one_sentence(address, bucket, tmp_path):
  done = run(bucket, "train", f"--config={tiny.write_recipe(tmp_path)}", f"--workdir={address}")
  assert done.returncode == 1
  last = done.stderr.strip().splitlines()[-1]
  assert last.startswith("dca-jax: error: ")
  assert address in last
