"""Replies that have been paid for, and what was spent: one SQLite file in the workdir."""

import pathlib
import sqlite3
import threading

_TABLES = """
create table if not exists replies (key text primary key, model text, text text);
create table if not exists spending (number integer primary key, reviewer text, dollars real);
"""


class Cache:
  """By content: the same question to the same model is paid for once. Failures are not kept.

  Safe against a kill at any moment.
  """

  def __init__(self, path: pathlib.Path | None):
    self._lock = threading.Lock()
    self._db = sqlite3.connect(path or ":memory:", check_same_thread=False, isolation_level=None)
    self._db.execute("pragma journal_mode = wal")
    self._db.execute("pragma synchronous = normal")
    self._db.executescript(_TABLES)

  def _rows(self, statement: str, *values) -> list[tuple]:
    with self._lock:
      return self._db.execute(statement, values).fetchall()

  def get(self, key: str) -> tuple[str, str] | None:
    """(model version, reply text), or None."""
    return next(iter(self._rows("select model, text from replies where key = ?", key)), None)

  def put(self, key: str, model: str, text: str) -> None:
    self._rows("insert or replace into replies values (?, ?, ?)", key, model, text)

  def spend(self, reviewer: str, dollars: float) -> None:
    self._rows("insert into spending (reviewer, dollars) values (?, ?)", reviewer, dollars)

  def spent(self, reviewer: str) -> float:
    """Dollars that a reviewer has spent over the whole life of the file."""
    return float(self._rows("select coalesce(sum(dollars), 0) from spending where reviewer = ?", reviewer)[0][0])

  def adopt(self, path: pathlib.Path) -> None:
    """Takes over the replies and the spending of a file that nobody else uses."""
    with self._lock:
      self._db.execute("attach ? as other", (str(path),))
      self._db.execute("insert or ignore into replies select * from other.replies")
      self._db.execute("insert into spending (reviewer, dollars) select reviewer, dollars from other.spending")
      self._db.execute("detach other")

  def close(self) -> None:
    with self._lock:
      self._db.close()
