"""The file of replies and spending: locked, full, damaged, read-only, and killed at any moment."""

import contextlib
import os
import pathlib
import resource
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
import tiny
from fake_server import FakeServer

from dca_jax.errors import UserError
from dca_jax.review import REVIEWERS, Request, Review, Share, Truth, open_reviewer
from dca_jax.review import cache as cache_module
from dca_jax.review.cache import Cache, Mark, copy_since, mark
from dca_jax.review.client_config import ClientConfig

COST = 0.000425  # of one call: 500 tokens at $0.30 and 110 at $2.50 a million


@pytest.fixture(autouse=True)
def key(monkeypatch):
  monkeypatch.setenv("GEMINI_API_KEY", "key")


def requests(count, start=0):
  return [
    Request(f"1/{i}/0", f"problem {i}", ("a1;", "#3$"), True, False)
    for i in range(start, start + count)
  ]


@contextlib.contextmanager
def opened(server, path, share=Share(), members=(), **client):  # noqa: B008
  name, panel = ("panel", {"panel": members}) if members else ("gemini", {})
  config = REVIEWERS[name](
    **panel, client=ClientConfig(base_url=server.url, attempt_seconds=20.0, **client)
  )
  with contextlib.closing(open_reviewer(config, Truth(None, None), path, share)) as reviewer:
    yield reviewer


def statuses(reviewer, asked, deadline=20.0) -> set[str]:
  return {review.status for review in reviewer.submit(asked, deadline).result(deadline + 2.0)}


def spent(reviewer) -> float:
  return reviewer.stats()["review/dollars_spent"]


def booked(path) -> float:
  with contextlib.closing(sqlite3.connect(path)) as db:
    return db.execute("select coalesce(sum(dollars), 0) from spending").fetchone()[0]


@contextlib.contextmanager
def locked(path):
  """Another process holds the file for itself."""
  source = (
    "import sqlite3, sys\n"
    "db = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
    "db.execute('begin exclusive')\nprint('locked', flush=True)\nsys.stdin.read()\n"
  )
  command = [sys.executable, "-c", source, str(path)]
  with subprocess.Popen(
    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout.readline() == "locked\n"
    yield
    process.stdin.close()


@contextlib.contextmanager
def full(path):
  """No file may grow any more, as on a full disk."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  size = max(os.path.getsize(p) for p in (path, pathlib.Path(f"{path}-wal")))
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("trouble", [locked, full])
def test_what_cannot_be_booked_is_not_called_and_the_run_goes_on(
  trouble, tmp_path, capfd, monkeypatch
):
  monkeypatch.setattr(cache_module, "_PAUSE", 0.1)
  path = tmp_path / "reviews.sqlite"
  with FakeServer() as server:
    with opened(server, path) as reviewer:
      assert statuses(reviewer, requests(5)) == {"ok"}
      with trouble(path):
        pending = reviewer.submit(requests(60, 100), 3.0)
        # The event loop is free meanwhile: it still answers at once, and keeps the deadline.
        assert reviewer.stats()["review/calls"] == 5
        assert {review.status for review in pending.result(5.0)} <= {"unbooked", "timeout"}
        assert len(server.requests) == 5
      time.sleep(0.2)
      assert statuses(reviewer, requests(60, 100)) == {"ok"}
      assert spent(reviewer) == pytest.approx(65 * COST)
    assert booked(path) == pytest.approx(65 * COST)
    errors = capfd.readouterr().err
    assert errors.count("reviews.sqlite cannot be used") == 1
    assert "Traceback" not in errors
    with opened(server, path) as reviewer:
      assert all(review.cached for review in reviewer.submit(requests(60, 100), 20.0).result(22.0))


@pytest.mark.parametrize("trouble", [locked, full])
def test_replies_of_a_server_that_costs_nothing_wait_in_memory(trouble, tmp_path, monkeypatch):
  monkeypatch.setattr(cache_module, "_PAUSE", 0.1)
  path = tmp_path / "reviews.sqlite"
  with FakeServer() as server:
    with opened(server, path, max_dollars=0.0) as reviewer:
      assert statuses(reviewer, requests(5)) == {"ok"}
      with trouble(path):
        assert statuses(reviewer, requests(20, 100)) == {"ok"}
        again = reviewer.submit(requests(20, 100), 20.0).result(22.0)
        assert all(review.cached for review in again)
    with opened(server, path, max_dollars=0.0) as reviewer:
      assert statuses(reviewer, requests(20, 100)) == {"ok"}
    assert len(server.requests) == 25


def read_only(path):
  """As SQLite's file format has it: a write version that no program knows."""
  with contextlib.closing(sqlite3.connect(path)) as db:
    db.execute("pragma journal_mode = delete")
  with path.open("r+b") as file:
    file.seek(18)
    file.write(b"\x03")
  return contextlib.nullcontext()


def a_folder(path):
  path.unlink()
  path.mkdir()
  return contextlib.nullcontext()


@pytest.mark.parametrize("trouble", [locked, read_only, a_folder])
def test_a_file_that_cannot_be_used_is_a_sentence_at_the_start(trouble, tmp_path, monkeypatch):
  monkeypatch.setattr(cache_module, "_OPEN_PATIENCE", 0.2)
  path = tmp_path / "reviews.sqlite"
  Cache(path).close()
  with (
    FakeServer() as server,
    trouble(path),
    pytest.raises(UserError, match=r"reviews.sqlite cannot be used \(.*run again"),
    opened(server, path),
  ):
    pass


# Damage.


def begun(server, path, count=40):
  """A file of several pages: replies of 2 kB each."""
  with opened(server, path) as reviewer:
    assert statuses(reviewer, requests(count)) == {"ok"}
  with contextlib.closing(sqlite3.connect(path)) as db:
    for i in range(3000):
      db.execute("insert into replies values (?, 'model', ?)", (f"{i:064d}", "x" * 2000))
    db.commit()
    db.execute("pragma wal_checkpoint(truncate)")


def destroy(path, first: float, last: float) -> None:
  """Overwrites the part of a file between two fractions of it."""
  size = os.path.getsize(path)
  with path.open("r+b") as file:
    file.seek(int(first * size))
    file.write(os.urandom(int(last * size) - int(first * size)))


@pytest.mark.parametrize(("first", "last"), [(0.3, 0.4), (0.0, 0.01), (0.0, 1.0)])
def test_a_damaged_file_is_put_aside_and_no_money_is_forgotten(first, last, tmp_path, capfd):
  path = tmp_path / "reviews.sqlite"
  with FakeServer() as server:
    begun(server, path)
    before = path.read_bytes()
    destroy(path, first, last)
    assert path.read_bytes() != before
    with opened(server, path, Share(spent=40 * COST)) as reviewer:
      assert statuses(reviewer, requests(40)) == {"ok"}
      if first:  # The head of the file is whole, and with it the first replies and the ledger.
        assert len(server.requests) == 40
      assert spent(reviewer) == pytest.approx(COST * len(server.requests))
    (warning,) = capfd.readouterr().err.splitlines()
    assert "is damaged" in warning
    assert str(tmp_path / "aside_reviews.sqlite") in warning
    assert (tmp_path / "aside_reviews.sqlite").stat().st_size == len(before)
    with opened(server, path) as reviewer:
      assert spent(reviewer) == pytest.approx(COST * len(server.requests))
    assert not capfd.readouterr().err


def test_damage_while_it_is_used_is_put_aside_once_by_several_members(tmp_path, capfd):
  path = tmp_path / "reviews.sqlite"
  members = ("gemini:gemini-3.5-flash-lite", "gemini:gemini-3.5-flash")
  with FakeServer() as server:
    begun(server, path)
    with opened(server, path, members=members) as reviewer:
      destroy(path, 0.001, 1.0)
      assert statuses(reviewer, requests(40, 1000)) == {"ok"}
      assert statuses(reviewer, requests(40, 2000)) == {"ok"}
      before = spent(reviewer)
    assert capfd.readouterr().err.count("warning:") == 1
    with opened(server, path, members=members) as reviewer:
      assert spent(reviewer) == pytest.approx(before)
      assert all(review.cached for review in reviewer.submit(requests(40, 2000), 20.0).result(22.0))


def test_a_deleted_file_forgets_no_money(tmp_path):
  with (
    FakeServer() as server,
    opened(server, tmp_path / "new.sqlite", Share(spent=9.9999)) as reviewer,
  ):
    assert statuses(reviewer, requests(3)) == {"budget"}
    assert spent(reviewer) == pytest.approx(9.9999)


def test_what_was_spent_is_shared_out_to_several_processes(tmp_path):
  with FakeServer() as server:
    shares = [Share(2, lambda own: 1.0, spent=5.0) for _ in range(2)]
    for i, share in enumerate(shares):
      with opened(server, tmp_path / f"{i}.sqlite", share) as reviewer:
        assert spent(reviewer) == pytest.approx(2.0)


# Kills.


def test_a_kill_forgets_no_money_and_no_reply_that_has_come(tmp_path):
  path = tmp_path / "reviews.sqlite"
  source = (
    "import sys\nsys.path[:0] = sys.argv[3:]\nimport test_cache as t\n"
    "class Server: url = sys.argv[1]\n"
    "with t.opened(Server, sys.argv[2]) as reviewer:\n"
    "  assert t.statuses(reviewer, t.requests(5)) == {'ok'}\n"
    "  print('reviewed', flush=True)\n  sys.stdin.readline()\n"
    "  reviewer.submit(t.requests(7, 100), 60.0).result()\n"
  )
  hang = threading.Event()
  with FakeServer(lambda *_: "hang" if hang.is_set() else "ok") as server:
    here = [str(pathlib.Path(__file__).parent), *map(str, filter(None, sys.path))]
    command = [sys.executable, "-c", source, server.url, str(path), *here]
    with subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
      assert process.stdout.readline() == "reviewed\n"
      hang.set()
      process.stdin.write("go on\n")
      process.stdin.flush()
      tiny.wait_until(lambda: len(server.requests) == 12, process)
      process.kill()
    hang.clear()
    with opened(server, path) as reviewer:
      # 2,128 tokens of output at most, and a token for each character of the prompt.
      assert 5 * COST + 7 * 0.00532 < spent(reviewer) < 5 * COST + 7 * 0.007
      reviews: list[Review] = reviewer.submit([*requests(5), *requests(7, 100)], 20.0).result(22.0)
    assert [review.cached for review in reviews] == [True] * 5 + [False] * 7
    assert len(server.requests) == 12 + 7


# Parts, as a bucket keeps them.


def rows(path):
  with contextlib.closing(sqlite3.connect(path)) as db:
    return {t: sorted(db.execute(f"select * from {t}").fetchall()) for t in ("replies", "spending")}


def test_a_file_in_parts_is_put_together_again_whatever_the_order_and_how_often(tmp_path):
  path, far, parts = tmp_path / "whole", Mark(), []
  for i in range(4):
    with contextlib.closing(Cache(path)) as cache:
      for k in range(3):
        cache.put(f"key {i} {k}", "model", "text")
        cache.add("reviewer", 0.25)
      cache.put("key 0 0", "model", f"text {i}")  # Asked anew, because what was kept was damaged.
    parts.append(tmp_path / f"part {i}")
    far = copy_since(path, far, parts[-1])
  assert copy_since(path, far, tmp_path / "nothing") == far == mark(path)
  assert not (tmp_path / "nothing").exists()
  assert rows(parts[1])["replies"][0] == ("key 0 0", "model", "text 1")
  with contextlib.closing(Cache(tmp_path / "again")) as cache:
    assert cache.take_over([*parts, parts[3]], same=True) == [""] * 5
    assert cache.spent("reviewer") == 3.0
  assert rows(tmp_path / "again") == rows(path)


def test_text_that_no_file_takes_does_no_harm(tmp_path):
  with contextlib.closing(Cache(tmp_path / "file")) as cache:
    cache.put("key", "model", "a \ud800 b")
    cache.add("reviewer", 1.0)
  with contextlib.closing(Cache(tmp_path / "file")) as cache:
    assert cache.spent("reviewer") == 1.0
