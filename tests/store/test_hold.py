"""One run at a time holds a workdir."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import tiny
from etils import epath

from dca_jax.commands import cli
from dca_jax.errors import UserError
from dca_jax.store import hold

ROOT = str(pathlib.Path(hold.__file__).parents[2])


def test_a_second_run_in_a_workdir_is_refused_and_a_killed_one_does_not_hold_it(tmp_path, capfd):
  recipe, run = tiny.write_recipe(tmp_path, {"steps": 100_000}), tmp_path / "run"
  command = ["train", f"--config={recipe}", f"--workdir={run}"]
  first = tiny.start(*command)
  tiny.wait_until(lambda: len(tiny.read_lines(run)) > 3, first)
  before = (run / "config.json").stat().st_mtime_ns

  assert cli.main([*command, "--config.checkpoint.every=7"]) == 1
  (line,) = capfd.readouterr().err.splitlines()
  assert line.startswith(
    f"dca-jax: error: --workdir={run} is held by process {first.pid} on {socket.gethostname()}"
  )
  assert ", since 20" in line
  assert (run / "config.json").stat().st_mtime_ns == before
  assert cli.main(["status", f"--workdir={run}"]) == 0
  assert cli.main(["report", f"--workdir={run}"]) == 0

  steps = len(tiny.read_lines(run))
  tiny.wait_until(lambda: len(tiny.read_lines(run)) > steps, first)
  first.send_signal(signal.SIGKILL)
  first.communicate()
  third = tiny.start(*command)
  lines = tiny.read_lines(run)
  tiny.wait_until(lambda: tiny.read_lines(run)[-1]["step"] > lines[-1]["step"], third)
  third.send_signal(signal.SIGTERM)
  out, _ = third.communicate()
  assert third.returncode == 143
  assert "sign of life" not in out
  assert [line["step"] for line in tiny.read_lines(run)] == list(range(len(tiny.read_lines(run))))
  assert not (run / hold.NAME).exists()


def test_the_same_process_may_not_hold_it_twice_and_lets_go_in_every_case(tmp_path):
  folder = epath.Path(tmp_path / "new" / "run")
  for _ in range(2):
    with (
      hold.held(folder),
      pytest.raises(UserError, match=rf"held by process {os.getpid()} on"),
      hold.held(folder),
    ):
      pass
    with pytest.raises(ZeroDivisionError), hold.held(folder):
      raise ZeroDivisionError
    assert not folder.exists()  # It was made for nothing.


def test_children_of_a_killed_owner_do_not_hold_it(tmp_path):
  source = (
    "import os, subprocess, sys, time\nfrom etils import epath\nfrom dca_jax.store import hold\n"
    "with hold.held(epath.Path(sys.argv[1])):\n"
    "  child = os.fork()\n"
    "  if not child:\n    time.sleep(300)\n    os._exit(0)\n"
    "  other = subprocess.Popen(['sleep', '300'], close_fds=False)\n"
    "  print(child, other.pid, flush=True)\n  time.sleep(300)\n"
  )
  command = [sys.executable, "-c", source, str(tmp_path)]
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": ROOT}
  ) as owner:
    children = [int(pid) for pid in owner.stdout.readline().split()]
    try:
      with (
        pytest.raises(UserError, match=f"process {owner.pid} on"),
        hold.held(epath.Path(tmp_path)),
      ):
        pass
      owner.kill()
      owner.wait()
      assert (tmp_path / hold.NAME).exists()
      with hold.held(epath.Path(tmp_path)):
        assert json.loads((tmp_path / hold.NAME).read_text())["pid"] == os.getpid()
    finally:
      for child in children:
        os.kill(child, signal.SIGKILL)


# Owners elsewhere: a folder that other machines mount too, whose locks may not reach this one.


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(hold, "_BEAT", 0.05)
  monkeypatch.setattr(hold, "_SILENCE", 0.5)


def elsewhere(sign=0) -> bytes:
  return json.dumps(
    {
      "host": "far",
      "pid": 7,
      "since": "yesterday",
      "machine": "other",
      "started": "1",
      "sign": sign,
    }
  ).encode()


@contextlib.contextmanager
def living(write):
  """An owner on another machine that gives signs of life."""
  done = threading.Event()

  def live() -> None:
    sign = 0
    while not done.wait(0.02):
      write(elsewhere(sign := sign + 1).ljust(200))

  thread = threading.Thread(target=live)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def test_an_owner_on_another_machine_is_watched_for_a_while(quick, tmp_path, capsys):
  path = tmp_path / hold.NAME
  path.write_bytes(elsewhere().ljust(200))
  refused = pytest.raises(UserError, match="held by process 7 on far, since yesterday")
  # In place: a reader finds one sign or the next, never none.
  with (
    path.open("r+b", buffering=0) as file,
    living(lambda text: os.pwrite(file.fileno(), text, 0)),
    refused,
    hold.held(epath.Path(tmp_path)),
  ):
    pass
  assert path.exists()
  with hold.held(epath.Path(tmp_path)):
    assert json.loads(path.read_text())["pid"] == os.getpid()
  assert "was held by process 7 on far" in capsys.readouterr().out


def test_who_was_taken_for_dead_hears_of_it(quick, tmp_path):
  path = tmp_path / hold.NAME
  with hold.held(epath.Path(tmp_path)) as check:
    check()
    threads = threading.enumerate()
    path.write_bytes(elsewhere())
    while not any(thread.name == "hold" and not thread.is_alive() for thread in threads):
      time.sleep(0.01)
    with pytest.raises(UserError, match="taken over by another run"):
      check()
  assert path.read_bytes() == elsewhere()  # It is not ours to remove.


@pytest.mark.parametrize("left", [b"", b"{", b'{"host": 1}', b"[]"])
def test_what_a_kill_left_unfinished_holds_nothing(left, tmp_path):
  (tmp_path / hold.NAME).write_bytes(left)
  with hold.held(epath.Path(tmp_path)):
    pass


def test_a_process_of_the_same_number_is_not_the_owner():
  me = hold._me()
  assert me.lives
  assert hold.Owner(me.host, me.pid, me.since, me.machine, "1").lives is False
  with subprocess.Popen(["sleep", "0"]) as process:
    process.wait()
  assert hold.Owner(me.host, process.pid, me.since, me.machine, "1").lives is False
  assert hold.Owner(me.host, process.pid, me.since, "", "").lives is None
