"""One run at a time holds a workdir: who holds it stands there in a file, with a sign of life.

On one machine the kernel's lock on that file says whether its owner lives, so after a kill the next
start does not wait. Where there is no such lock (a bucket) or it may not reach (a folder that other
machines mount), an owner on another machine is dead when its sign has not changed for a minute.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import pathlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from etils import epath

from dca_jax.errors import UserError
from dca_jax.store.workdir import is_remote

NAME = ".held.json"
_BEAT = 10.0  # seconds between signs of life
_SILENCE = 60.0  # seconds without one, after which an owner on another machine counts as dead
_REACH = 120.0  # seconds in which a bucket must answer; its client alone would try for many minutes


@dataclasses.dataclass
class Owner:
  """Who holds a workdir."""

  host: str
  pid: int
  since: str
  machine: str
  """Where process numbers mean the same, a boot or a container; empty where that is not known."""
  started: str
  """Tells a process from a later one of the same number."""
  sign: int = 0
  """Counts as long as the owner lives."""

  def __str__(self) -> str:
    return f"process {self.pid} on {self.host}, since {self.since}"

  @property
  def lives(self) -> bool | None:
    """None where that cannot be known from here."""
    here = bool(self.machine) and self.machine == _machine()
    return self.started == _started(self.pid) if here else None


def _me() -> Owner:
  since = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
  return Owner(socket.gethostname(), os.getpid(), since, _machine(), _started(os.getpid()))


def _machine() -> str:
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:  # Not Linux.
    return ""


def _started(pid: int) -> str:
  try:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  except OSError:
    return ""
  return "" if fields[0] == "Z" else fields[19]  # A zombie is dead; the start time is field 22.


class _Place(Protocol):
  """Where the owner is written down."""

  locked: bool
  """Whether a lock says that the owner on this machine, if there was one, is dead."""

  def read(self) -> bytes: ...

  def write(self, text: bytes) -> bool:
    """Whether what stands there was still what this object has read or written last."""
    ...

  def close(self) -> None:
    """Removes what this object wrote, if it still stands there, and lets go."""
    ...


class _File:
  """In a folder, under the kernel's lock, which ends with the process."""

  def __init__(self, path: pathlib.Path):
    """Raises BlockingIOError where another process has the lock."""
    self._path, self._last, self._mine = path, b"", False
    while True:
      self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
      try:
        self.locked = _lock(self._fd)
        if os.path.samestat(os.fstat(self._fd), os.stat(path)):
          break
      except FileNotFoundError:  # Whoever had it removed it, and let go.
        pass
      except BlockingIOError:
        os.close(self._fd)
        raise
      os.close(self._fd)
    _descriptors.add(self._fd)

  def read(self) -> bytes:
    self._last = self._path.read_bytes()
    return self._last

  def write(self, text: bytes) -> bool:
    if self._path.read_bytes() != self._last:
      return False
    os.pwrite(self._fd, text, 0)
    os.ftruncate(self._fd, len(text))
    self._last, self._mine = text, True
    return True

  def close(self) -> None:
    with contextlib.suppress(OSError):
      if self._mine and self._path.read_bytes() == self._last:
        self._path.unlink()
    _descriptors.discard(self._fd)
    os.close(self._fd)


def _lock(fd: int) -> bool:
  try:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise
  except OSError:  # A file system without locks.
    return False
  return True


_descriptors: set[int] = set()


def _let_go() -> None:
  """In a child that was forked: it would keep the lock after the death of its parent."""
  for fd in _descriptors:
    os.close(fd)


os.register_at_fork(after_in_child=_let_go)


class _Object:
  """In a bucket, whose writes can depend on the generation that stands there."""

  locked = False

  def __init__(self, folder: epath.Path):
    import tensorstore

    bucket, _, path = re.sub("^gs://", "", os.fspath(folder)).partition("/")
    spec = {"driver": "gcs", "bucket": bucket, "path": f"{path.rstrip('/')}/"}
    self._store = tensorstore.KvStore.open(spec).result()
    self._generation, self._mine = b"", False

  def read(self) -> bytes:
    found = self._store.read(NAME).result(timeout=_REACH)
    self._generation = found.stamp.generation
    return found.value

  def write(self, text: bytes | None) -> bool:
    written = self._store.write(NAME, text, if_equal=self._generation).result(timeout=_REACH)
    generation = written.generation
    if not generation:  # Or it was written, and the reply lost.
      return self.read() == text
    self._generation, self._mine = generation, True
    return True

  def close(self) -> None:
    with contextlib.suppress(Exception):  # It will be found dead.
      if self._mine:
        self.write(None)


@contextlib.contextmanager
def held(folder: epath.Path) -> Iterator[Callable[[], None]]:
  """Holds a workdir, which it makes; gives a function that raises UserError where it was lost.

  Raises:
    UserError: another run holds it, or it cannot be reached.
  """
  made = not is_remote(folder) and not folder.exists()
  try:
    place = _place(folder)
    lost, done = threading.Event(), threading.Event()

    def check() -> None:
      if lost.is_set():
        raise UserError(
          f"--workdir={folder} was taken over by another run, which took this one for dead"
        )

    thread = threading.Thread(target=_live, args=(place, lost, done), name="hold", daemon=True)
    thread.start()
    try:
      yield check
    finally:
      done.set()
      thread.join()
      place.close()
  finally:
    if made:
      with contextlib.suppress(OSError):  # By now it may be the home of a run.
        pathlib.Path(folder).rmdir()


def _place(folder: epath.Path) -> _Place:
  """A place where this process stands as the owner."""
  if not is_remote(folder):
    folder.mkdir(parents=True, exist_ok=True)
    path = pathlib.Path(folder) / NAME
    try:
      place: _Place = _File(path)
    except BlockingIOError:
      text = path.read_bytes() if path.exists() else b""
      raise _taken(folder, text) from None
    return _take(place, folder)
  try:
    return _take(_Object(folder), folder)
  except UserError:
    raise
  except Exception as error:  # A bucket's client reports with types of its own.
    reason = f"{type(error).__name__}: {str(error)[:200]}"
    hint = "is there such a bucket, and are you signed in?"
    raise UserError(f"--workdir={folder} cannot be written ({reason}); {hint}") from error


def _take(place: _Place, folder: epath.Path) -> _Place:
  """Writes this process down as the owner, if nobody else is."""
  try:
    found = place.read()
    owner = _owner(found)
    if owner and owner.lives and not place.locked and owner.pid != os.getpid():
      raise _taken(folder, found)
    if (
      owner
      and owner.lives is not False
      and not (place.locked and owner.host == socket.gethostname())
    ):
      print(
        f"{folder} was held by {owner}; waiting up to {_SILENCE:.0f} s for a sign of life",
        flush=True,
      )
      end = time.monotonic() + _SILENCE
      while (now := place.read()) == found and time.monotonic() < end:
        time.sleep(_BEAT / 10)
      if now not in (b"", found):
        raise _taken(folder, now)
    if not place.write(_text(_me())):
      raise _taken(folder, place.read())
  except BaseException:
    place.close()
    raise
  return place


def _live(place: _Place, lost: threading.Event, done: threading.Event) -> None:
  me = _me()
  while not done.wait(_BEAT):
    me.sign += 1
    with contextlib.suppress(Exception):  # The network or the disk: there will be another time.
      if not place.write(_text(me)):
        lost.set()
        return


def _text(owner: Owner) -> bytes:
  return json.dumps(dataclasses.asdict(owner)).encode() + b"\n"


def _owner(text: bytes) -> Owner | None:
  try:
    return Owner(**json.loads(text))
  except (ValueError, TypeError):  # Nothing, or unfinished.
    return None


def _taken(folder: epath.Path, text: bytes) -> UserError:
  return UserError(
    f"--workdir={folder} is held by {_owner(text) or 'another process'}; one run at a time writes"
    " there. Stop that one, or choose another --workdir"
  )
