"""An index of a run's trajectories, for whoever wants some of many: SQLite, outside of the run."""

import contextlib
import hashlib
import os
import pathlib
import sqlite3
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from dca_jax.episode import Episode
from dca_jax.store.trajectories import parsed, shards

# What is known of an episode without reading it; the order is that of the table's columns.
_COLUMNS = {
  "step": "INTEGER",
  "problem": "INTEGER",
  "sample": "INTEGER",
  "outcome": "TEXT",
  "reward": "REAL",
  "advantage": "REAL",
  "length": "INTEGER",
  "steps": "INTEGER",
  "review": "TEXT",
  "roles": "TEXT",
}
_OF_FILE = {"file": "TEXT", "start": "INTEGER", "size": "INTEGER"}
_VERSION = 1  # Of the tables; an index of another one is made anew.
_EQUAL = ("step", "sample", "outcome", "review")


def facts(episode: Episode) -> dict[str, Any]:
  """What the index keeps of an episode: `length` in tokens, `roles` between commas."""
  step, problem, sample = map(int, episode.id.split("/"))
  roles = dict.fromkeys(episode.review.roles)
  return {
    "step": step,
    "problem": problem,
    "sample": sample,
    "outcome": outcome_of(episode),
    "reward": episode.outcome.reward,
    "advantage": episode.advantage,
    "length": len(episode.credit),
    "steps": len(episode.steps),
    "review": episode.review.status,
    "roles": f",{','.join(roles)}," if roles else "",
  }


def outcome_of(episode: Episode) -> str:
  """`right`, `wrong`, `truncated` or `unjudged`."""
  outcome = episode.outcome
  if not outcome.judged:
    return "unjudged"
  return "right" if outcome.correct else "truncated" if outcome.truncated else "wrong"


class Index:
  """The episodes of a folder of trajectories, kept in a file of its own in `cache`.

  The folder is only read, so it may be another user's, or belong to a run that goes on. Threads may
  share it.
  """

  def __init__(self, folder: epath.Path, cache: pathlib.Path):
    self._folder = folder
    cache.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(os.fspath(folder).encode()).hexdigest()[:16]
    self._path = cache / f"{name}_{_VERSION}.sqlite"
    try:
      self._make()
    except sqlite3.DatabaseError:  # It is damaged, and can be made again.
      self._path.unlink()
      self._make()

  def _make(self) -> None:
    """Makes the tables, where they are not there yet."""
    columns = ", ".join(f"{key} {kind}" for key, kind in {**_COLUMNS, **_OF_FILE}.items())
    with self._open() as db:
      db.execute("PRAGMA journal_mode = WAL")
      db.execute("CREATE TABLE IF NOT EXISTS files (name TEXT PRIMARY KEY, stamp TEXT)")
      db.execute(f"CREATE TABLE IF NOT EXISTS episodes ({columns})")
      db.execute("CREATE TABLE IF NOT EXISTS prompts (problem INTEGER PRIMARY KEY, prompt TEXT)")
      db.execute("CREATE INDEX IF NOT EXISTS by_id ON episodes (step, problem, sample)")
      db.execute("CREATE INDEX IF NOT EXISTS by_problem ON episodes (problem)")
      db.execute("CREATE INDEX IF NOT EXISTS by_file ON episodes (file)")
      db.execute("CREATE INDEX IF NOT EXISTS by_review ON episodes (review)")

  @contextlib.contextmanager
  def _open(self) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(self._path, timeout=60.0)) as db, db:
      db.execute("PRAGMA synchronous = OFF")  # It can be made again.
      yield db

  def update(self) -> None:
    """Takes in what has changed in the folder; what is damaged is left out."""
    files = {path.name: path for own in shards(self._folder).values() for path in own}
    with self._open() as db:
      known = dict(db.execute("SELECT name, stamp FROM files"))
    for name in known.keys() - files.keys():
      self._forget(name)
    for name, path in files.items():
      with contextlib.suppress(FileNotFoundError):  # The run has just taken it away.
        there = path.stat()
        if known.get(name) != (stamp := f"{there.length} {there.mtime}"):
          self._take_in(name, path.read_bytes(), stamp)

  def _forget(self, name: str) -> None:
    with self._open() as db:
      db.execute("DELETE FROM episodes WHERE file = ?", [name])
      db.execute("DELETE FROM files WHERE name = ?", [name])

  def _take_in(self, name: str, text: bytes, stamp: str) -> None:
    rows, prompts, start = [], {}, 0
    for line in text.split(b"\n"):
      with contextlib.suppress(ValueError, RecursionError, OverflowError):
        episode = parsed(line)
        own = facts(episode)
        rows.append((*own.values(), name, start, len(line)))
        prompts[own["problem"]] = episode.problem.prompt
      start += len(line) + 1
    with self._open() as db:
      db.execute("DELETE FROM episodes WHERE file = ?", [name])
      marks = ", ".join("?" * (len(_COLUMNS) + len(_OF_FILE)))
      db.executemany(f"INSERT INTO episodes VALUES ({marks})", rows)
      db.executemany("INSERT OR REPLACE INTO prompts VALUES (?, ?)", prompts.items())
      db.execute("INSERT OR REPLACE INTO files VALUES (?, ?)", [name, stamp])

  def find(
    self, wanted: Mapping[str, str], sort: str = "step", down: bool = False, page: int = 0
  ) -> dict[str, Any]:
    """A page of the episodes that fit, and how many fit.

    Args:
      wanted: what they must be: a value for `step`, `sample`, `outcome`, `review`; a `role` of one
        of their steps; `least`, a length in tokens; `problem`, its number or a part of its prompt.
      sort: the name of a column; `down` begins with the largest.

    Raises:
      KeyError, ValueError: there is no such column, or a number is none.
    """
    where, values = _condition(wanted)
    _COLUMNS[sort]
    order = f"{sort} {'DESC' if down else 'ASC'}, step, problem, sample"
    with self._open() as db:
      total = db.execute(f"SELECT count(*) FROM episodes {where}", values).fetchone()[0]
      db.row_factory = sqlite3.Row
      rows = db.execute(
        f"SELECT {', '.join(_COLUMNS)}, (SELECT substr(prompt, 1, 200) FROM prompts"
        f" WHERE problem = e.problem) AS prompt FROM episodes e {where}"
        f" ORDER BY {order} LIMIT {PAGE} OFFSET ?",
        [*values, page * PAGE],
      )
      return {"total": total, "rows": [{**row, "problem": str(row["problem"])} for row in rows]}

  def read(self, wanted: Mapping[str, str]) -> list[Episode]:
    """The episodes that fit, in order, at most a page."""
    where, values = _condition(wanted)
    order = f"ORDER BY step, problem, sample LIMIT {PAGE}"
    with self._open() as db:
      told = db.execute(
        f"SELECT file, start, size FROM episodes {where} {order}", values
      ).fetchall()
    return [episode for place in told for episode in self._read(*place)]

  def _read(self, name: str, start: int, size: int) -> list[Episode]:
    """None where the run has changed the file since."""
    with contextlib.suppress(OSError, ValueError), (self._folder / name).open("rb") as file:
      file.seek(start)
      return [parsed(file.read(size))]
    return []

  def statuses(self) -> dict[str, int]:
    """How many episodes have a review of which status."""
    with self._open() as db:
      return dict(db.execute("SELECT review, count(*) FROM episodes GROUP BY review"))


PAGE = 50
"""Episodes that are given at once."""


def _condition(wanted: Mapping[str, str]) -> tuple[str, list[Any]]:
  """The WHERE clause, and its values."""
  parts, values = [], []
  for key, value in wanted.items():
    if key in _EQUAL:
      parts.append(f"{key} = ?")
      values.append(int(value) if _COLUMNS[key] == "INTEGER" else value)
    elif key == "role":
      parts.append("instr(roles, ?)")
      values.append(f",{value},")
    elif key == "least":
      parts.append("length >= ?")
      values.append(int(value))
    elif key == "problem" and value.isascii() and value.isdigit():
      parts.append("problem = ?")
      values.append(int(value))
    elif key == "problem":
      parts.append("problem IN (SELECT problem FROM prompts WHERE instr(prompt, ?))")
      values.append(value)
    else:
      raise KeyError(key)
  return f"WHERE {' AND '.join(parts)}" if parts else "", values
