"""Replies that have been paid for, and what was spent: one SQLite file in the workdir.

The spending is a ledger that only grows. The most that a call can cost is booked before it is sent,
and corrected when the cost is known, so a killed process forgets no money: what it had under way
stays booked in full. A reply is committed as soon as it has arrived, so what can be paid for twice
is what was under way at a kill: sent, and its reply not yet committed.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import pathlib
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from dca_jax.errors import UserError

_TABLES = (
  "replies (key text primary key, model text, text text)",
  "spending (number integer primary key, reviewer text, dollars real)",
)
# A reply that replaces another gets a row number of its own: what is new is told by these numbers.
_KEEP = (
  "insert or replace into replies (rowid, key, model, text)"
  " values ((select coalesce(max(rowid), 0) + 1 from replies), ?, ?, ?)"
)
_BOOK = "insert into spending (reviewer, dollars) values (?, ?)"
_OPEN_PATIENCE, _PATIENCE = 5.0, 1.0  # seconds that a lock of another process is waited for
_PAUSE = 2.0  # seconds after a failure in which nothing is tried


@dataclasses.dataclass
class Booking:
  """What the ledger holds of one call; made before the call, so it outlives a cancelled wait."""

  reviewer: str
  dollars: float = 0.0


class Cache:
  """Replies by content, so that a question is paid for once, and the ledger.

  All work on the file is done by a thread of its own, in the order in which it was asked for. While
  the file cannot be used (locked, disk full), replies wait in memory, and calls that cost money are
  not made, because they could not be booked. A damaged file is put aside, and what can be read of
  it is taken over. Failed calls are not kept.
  """

  def __init__(self, path: pathlib.Path | None):
    """Opens the file at `path`; None keeps everything in memory.

    Raises:
      UserError: it cannot be read and written, so that what was spent is not known.
    """
    self._path, self._closed = path, False
    # What is not written yet: almost always nothing.
    self._replies: dict[str, tuple[str, str]] = {}
    self._ledger: list[tuple[str, float]] = []
    self._pauses: dict[str, float] = {}
    self._warned = False
    try:
      self._db = self._open()
    except (sqlite3.Error, OSError) as error:
      raise UserError(
        f"{path} cannot be used ({error}). What reviews cost is booked there: end the process that"
        " locks it, make it writable or make room, then run again"
      ) from None
    self._spent = self._sums()
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "reviews")

  # For the event loop: nothing here waits for the file in it.

  async def get(self, key: str) -> tuple[str, str] | None:
    """(model version, reply text), or None, also where the file does not answer."""
    return await self._soon(self._get, key)

  async def book(self, booking: Booking, dollars: float) -> bool:
    """Books the most that a call can cost; where False, it must not be made."""
    return not dollars or bool(await self._soon(self._book, booking, dollars))

  def settle(self, booking: Booking, dollars: float) -> None:
    """Corrects what is booked to what the call cost; returns at once."""
    if not self._closed:
      self._thread.submit(self._settle, booking, dollars)

  def put(self, key: str, model: str, text: str) -> None:
    """Keeps a reply; returns at once."""
    if not self._closed:
      clean = (str(part).encode("utf-8", "replace").decode() for part in (model, text))
      self._thread.submit(self._put, key, *clean)

  async def _soon(self, work: Callable, *args):
    if self._closed:
      return None
    # Shielded: work that is cancelled before it begins would be left out.
    return await asyncio.shield(asyncio.wrap_future(self._thread.submit(work, *args)))

  # For everybody else.

  def spent(self, reviewer: str) -> float:
    """Dollars that a reviewer has spent over the whole life of the file."""
    return self._spent[reviewer]

  def total(self) -> float:
    return sum(self._spent.values())

  def add(self, reviewer: str, dollars: float) -> None:
    """Books what is known from elsewhere to have been spent."""
    self._thread.submit(self._settle, Booking(reviewer), dollars).result()

  def take_over(self, paths: Sequence[pathlib.Path], same: bool) -> list[str]:
    """Takes over the rows of other files that nobody uses; returns the damage of each, or empty.

    `same` where they are earlier parts of this one, so that a row that both have counts once.
    """
    with self._db:
      damages = [_take_over(path, self._db, same) for path in paths]
    self._spent = self._sums()
    return damages

  def close(self) -> None:
    """Writes what waits, and closes the file."""
    if self._closed:
      return
    self._closed = True
    self._thread.shutdown()
    self._pauses = {}
    if not self._tried(self._flush):
      left = f"{len(self._replies)} replies and {len(self._ledger)} entries of the spending"
      print(f"warning: {left} could not be written to {self._path}", file=sys.stderr)
    self._db.close()

  # In the thread.

  def _open(self) -> sqlite3.Connection:
    try:
      db = self._connect()
    except sqlite3.DatabaseError as error:
      if not _is_damage(error):
        raise
      return self._begin_anew(str(error))
    if damage := _damage(db):
      db.close()
      return self._begin_anew(damage)
    return db

  def _connect(self) -> sqlite3.Connection:
    db = sqlite3.connect(self._path or ":memory:", _OPEN_PATIENCE, check_same_thread=False)
    try:
      # What is committed outlives a kill of the process; a power cut may undo the last commits.
      db.execute("pragma journal_mode = wal")
      db.execute("pragma synchronous = normal")
      for table in _TABLES:
        db.execute(f"create table if not exists {table}")
      db.execute("pragma user_version = 1")  # Shows here and now whether the file can be written.
      db.execute(f"pragma busy_timeout = {1000 * _PATIENCE:.0f}")
    except sqlite3.Error:
      db.close()
      raise
    return db

  def _begin_anew(self, damage: str) -> sqlite3.Connection:
    """Puts the damaged file aside and begins a new one with what can be read of it."""
    assert self._path is not None
    aside, n = self._path.with_name(f"aside_{self._path.name}"), 0
    while aside.exists():
      aside, n = aside.with_name(f"aside_{n}_{self._path.name}"), n + 1
    for suffix in ("", "-wal", "-shm"):
      with contextlib.suppress(FileNotFoundError):
        pathlib.Path(f"{self._path}{suffix}").rename(f"{aside}{suffix}")
    db = self._connect()
    with db:
      _take_over(aside, db, same=True)
    ((replies,),) = db.execute("select count(*) from replies")
    ((dollars,),) = db.execute("select coalesce(sum(dollars), 0) from spending")
    print(
      f"warning: {self._path} is damaged ({damage}); moved to {aside}; {replies:,} replies and"
      f" ${dollars:.4f} of spending could be read and are kept",
      file=sys.stderr,
    )
    return db

  def _tried(self, work: Callable, *args):
    """What `work` returns, or None where the file cannot be used now."""
    if time.monotonic() < self._pauses.get(work.__name__, 0.0):
      return None
    try:
      try:
        return work(*args)
      except sqlite3.DatabaseError as error:
        if not (_is_damage(error) and self._path):
          raise
        self._replace(str(error))
        return work(*args)
    except (sqlite3.Error, OSError) as error:
      self._pauses[work.__name__] = time.monotonic() + _PAUSE
      if not self._warned:
        self._warned = True
        print(
          f"warning: {self._path} cannot be used ({error}); replies wait in memory, and until"
          " costs can be booked again no call that costs money is made",
          file=sys.stderr,
        )
      return None

  def _replace(self, damage: str) -> None:
    """Goes on with a new file; what this process knows to have been spent stays booked."""
    self._db.close()
    self._db = self._begin_anew(damage)
    known, self._spent = self._spent, self._sums()
    with self._db:
      for reviewer, dollars in known.items():
        if (missing := dollars - self._spent[reviewer]) > 0:
          self._db.execute(_BOOK, (reviewer, missing))
          self._spent[reviewer] = dollars

  def _get(self, key: str) -> tuple[str, str] | None:
    return self._replies.get(key) or self._tried(self._read, key)

  def _read(self, key: str) -> tuple[str, str] | None:
    found = self._db.execute("select model, text from replies where key = ?", (key,))
    return found.fetchone()

  def _put(self, key: str, model: str, text: str) -> None:
    self._replies[key] = model, text
    self._tried(self._flush)

  def _book(self, booking: Booking, dollars: float) -> bool:
    if not self._tried(self._flush, (booking.reviewer, dollars)):
      return False
    booking.dollars += dollars
    self._spent[booking.reviewer] += dollars
    return True

  def _settle(self, booking: Booking, dollars: float) -> None:
    if correction := dollars - booking.dollars:
      booking.dollars = dollars
      self._spent[booking.reviewer] += correction
      self._ledger.append((booking.reviewer, correction))
      self._tried(self._flush)

  def _flush(self, *booked: tuple[str, float]) -> bool:
    """Writes what waits, and `booked`, in one transaction."""
    with self._db:
      self._db.executemany(_KEEP, [(key, *reply) for key, reply in self._replies.items()])
      self._db.executemany(_BOOK, [*self._ledger, *booked])
    self._replies, self._ledger = {}, []
    return True

  def _sums(self) -> "collections.defaultdict[str, float]":
    rows = self._db.execute("select reviewer, sum(dollars) from spending group by reviewer")
    return collections.defaultdict(
      float, {reviewer: max(0.0, dollars) for reviewer, dollars in rows}
    )


def _is_damage(error: sqlite3.DatabaseError) -> bool:
  code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # The rest tells kinds of one error apart.
  return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _damage(db: sqlite3.Connection) -> str:
  """What is wrong with a file, or empty; reads it whole."""
  try:
    ((found,),) = db.execute("pragma quick_check(1)")
  except sqlite3.DatabaseError as error:
    if not _is_damage(error):
      raise
    return str(error)
  return "" if found == "ok" else found.splitlines()[-1]


def _take_over(path: pathlib.Path, into: sqlite3.Connection, same: bool) -> str:
  """Copies what can be read of the file at `path`; returns its damage, if it has any."""
  damages: list[str] = []
  with contextlib.closing(sqlite3.connect(path)) as source:
    replies = _rows(source, "key, model, text", "replies", damages)
    kept = (row for row in replies if all(isinstance(part, str) for part in row))
    into.executemany("insert or replace into replies (key, model, text) values (?, ?, ?)", kept)
    spending = _rows(source, "number, reviewer, dollars", "spending", damages)
    booked = (
      (number if same else None, reviewer, dollars)
      for number, reviewer, dollars in spending
      if isinstance(reviewer, str) and isinstance(dollars, float) and math.isfinite(dollars)
    )
    into.executemany("insert or ignore into spending values (?, ?, ?)", booked)
  return next(iter(damages), "")


def _rows(
  source: sqlite3.Connection, columns: str, table: str, damages: list[str]
) -> Iterator[tuple]:
  """The rows of a table, where it is damaged from either end up to the damage."""
  last = -1
  try:
    for number, *row in source.execute(f"select rowid, {columns} from {table} order by rowid"):
      last = number
      yield tuple(row)
    return
  except sqlite3.DatabaseError as error:
    damages.append(str(error))
  with contextlib.suppress(sqlite3.DatabaseError):
    for number, *row in source.execute(f"select rowid, {columns} from {table} order by rowid desc"):
      if number <= last:
        return
      yield tuple(row)


class Mark(NamedTuple):
  """How far a file has been copied: the last row of each table."""

  reply: int = 0
  number: int = 0


def mark(path: pathlib.Path) -> Mark:
  with contextlib.closing(sqlite3.connect(path)) as db:
    return _mark(db)


def _mark(db: sqlite3.Connection) -> Mark:
  tables = ("replies", "spending")
  return Mark(
    *(db.execute(f"select coalesce(max(rowid), 0) from {t}").fetchone()[0] for t in tables)
  )


def copy_since(path: pathlib.Path, since: Mark, target: pathlib.Path) -> Mark:
  """Copies the rows after `since` of a file that may be in use to a new one;
  returns how far it came.

  Nothing is written where there are none.
  """
  with contextlib.closing(sqlite3.connect(path)) as db:
    # What is written meanwhile may be copied again the next time, which does no harm.
    if (now := _mark(db)) != since:
      db.execute("attach ? as target", (str(target),))
      for table in _TABLES:
        db.execute(f"create table target.{table}")
      with db:
        db.execute(
          "insert into target.replies select * from main.replies where rowid > ?", (since.reply,)
        )
        db.execute(
          "insert into target.spending select * from main.spending where number > ?",
          (since.number,),
        )
  return now
