"""Where a run lives: a folder, or a bucket, where nothing can be appended to
or moved without a copy."""

import concurrent.futures
import contextlib
import importlib.util
import itertools
import os
import pathlib
import sys
import tempfile
import threading

import jax
from etils import epath

from dca_jax.errors import UserError
from dca_jax.review.cache import Cache, Mark, copy_since, mark

_EVERY = 60.0  # seconds between copies of new reviews to a bucket, whatever the steps take
_MANY_PARTS = 100  # are made one at the next start


def locate(workdir: str) -> epath.Path:
  """The place that a user means: a bucket's address as it is, a local path made absolute."""
  if "://" not in workdir:
    return epath.Path(workdir).expanduser().absolute()
  if not workdir.startswith("gs://"):
    raise UserError(f"{workdir}: a run lives in a folder or in a bucket, gs://NAME/FOLDER")
  if not importlib.util.find_spec("gcsfs"):
    raise UserError(f"{workdir}: a bucket needs the package gcsfs: pip install gcsfs")
  return epath.Path(workdir)


def is_remote(path: epath.Path) -> bool:
  return "://" in os.fspath(path)


def write_whole(path: epath.Path, text: str) -> None:
  """Writes a file so that nobody ever sees a part of it; a bucket does so by itself."""
  if is_remote(path):
    path.write_text(text)
    return
  partial = path.with_name(f".{path.name}")
  partial.write_text(text)
  partial.replace(path)


def place_aside(folder, name: str):
  """A path in `folder` that is free, for what is damaged and goes by that name."""
  names = (folder / f"aside_{name}{end}" for end in ("", *map("_{}".format, range(99))))
  return next(path for path in names if not path.exists())


class Growing:
  """A local folder for files that are appended to.

  It is the workdir itself, or, where that is a bucket, a temporary folder that begins with the
  copies there; `publish` brings them up to date. The metrics are process 0's alone; every process
  has a file of reviews of its own.
  """

  def __init__(self, workdir: epath.Path):
    self.workdir, process = workdir, jax.process_index()
    self._published: dict[pathlib.Path, int] = {}
    self._remote = is_remote(workdir)
    reviews = f"reviews_{process}.sqlite" if process else "reviews.sqlite"
    self._scratch = (
      tempfile.TemporaryDirectory(prefix="dca-jax-") if self._remote or process else None
    )
    self.folder = pathlib.Path(self._scratch.name if self._scratch else workdir)
    """For metrics, TensorBoard's events and the tokenizer; what other processes
    than 0 write there is thrown away."""
    self.reviews = (self.folder if self._remote else pathlib.Path(workdir)) / reviews
    self._parts: Parts | None = None
    if self._remote:
      if (workdir / "metrics.jsonl").exists():
        (self.folder / "metrics.jsonl").write_bytes((workdir / "metrics.jsonl").read_bytes())
      self._parts = Parts(workdir, self.reviews)
    if process == 0:
      self._adopt_orphans()
    if self._parts:
      self._parts.keep_publishing()

  def _adopt_orphans(self) -> None:
    """Takes over what processes paid for that the run does not have any more."""
    for process in itertools.count(jax.process_count()):
      own = self.folder / f"reviews_{process}.sqlite"
      parts = Parts(self.workdir, own) if self._remote else None
      if not own.exists():
        break
      with contextlib.closing(Cache(self.reviews)) as cache:
        cache.take_over([own], same=False)
      if parts and self._parts:
        self._parts.publish()
        parts.remove()
      else:
        for path in self.folder.glob(f"{own.name}*"):  # Its journal too.
          path.unlink()

  def publish(self) -> None:
    """Copies to the bucket what has been written so far; nothing to do for a local workdir."""
    if not self._parts:
      return
    self._parts.publish()
    if jax.process_index() == 0:
      for path in (
        self.folder / "metrics.jsonl",
        *self.folder.glob("t*/*"),
      ):  # TensorBoard's events, the tokenizer.
        if (stamp := path.stat().st_mtime_ns) != self._published.get(path):
          place = self.workdir / path.relative_to(self.folder)
          place.parent.mkdir(parents=True, exist_ok=True)
          place.write_bytes(path.read_bytes())
          self._published[path] = stamp

  def close(self) -> None:
    if self._parts:
      self._parts.close()
    if self._scratch:
      self._scratch.cleanup()


class Parts:
  """A file of reviews in a bucket: whole as at some start of the run, and what came since in parts.

  Only what is new is sent. To take a part over twice, or again after the whole has it, changes
  nothing, so a kill between any two writes does no harm.
  """

  def __init__(self, workdir: epath.Path, local: pathlib.Path):
    """Puts the file together at `local`, if there is any."""
    self._whole, self._folder, self._local = workdir / local.name, workdir / local.stem, local
    self._mark, self._lock = Mark(), threading.Lock()
    self._done, self._thread = (
      threading.Event(),
      threading.Thread(target=self._publish_now_and_then),
    )
    there = [self._whole] if self._whole.exists() else []
    there += sorted(self._folder.glob("*.sqlite"))
    if there:
      damages = self._put_together(there)
      self._mark = mark(local)
      if damages or len(there) > _MANY_PARTS:
        self._join(there)

  def _put_together(self, there: list[epath.Path]) -> list[str]:
    with tempfile.TemporaryDirectory(dir=self._local.parent) as scratch:
      copies = [pathlib.Path(scratch) / str(i) for i in range(len(there))]
      with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda path, copy: copy.write_bytes(path.read_bytes()), there, copies))
      with contextlib.closing(Cache(self._local)) as cache:
        damages = cache.take_over(copies, same=True)
    for path, damage in zip(there, damages, strict=True):
      if damage:
        aside = place_aside(self._whole.parent, f"{self._folder.name}_{path.name}")
        aside.write_bytes(path.read_bytes())
        said = (
          f"warning: {path} is damaged ({damage}); copied to {aside}; what could be read is kept"
        )
        print(said, file=sys.stderr)
    return [damage for damage in damages if damage]

  def _join(self, there: list[epath.Path]) -> None:
    """Makes the parts one."""
    with tempfile.TemporaryDirectory(dir=self._local.parent) as scratch:
      copy = pathlib.Path(scratch) / "whole"
      copy_since(self._local, Mark(), copy)
      self._whole.write_bytes(copy.read_bytes())
    for path in there:
      if path != self._whole:
        path.unlink()

  def publish(self) -> None:
    """Sends what is new."""
    with self._lock, tempfile.TemporaryDirectory(dir=self._local.parent) as scratch:
      part = pathlib.Path(scratch) / "part"
      now = copy_since(self._local, self._mark, part) if self._local.exists() else self._mark
      if now != self._mark:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / f"{now.reply:09d}_{now.number:09d}.sqlite").write_bytes(part.read_bytes())
        self._mark = now

  def keep_publishing(self) -> None:
    """Sends what is new every minute too, so that a machine that vanishes forgets little money."""
    self._thread.daemon = True
    self._thread.start()

  def _publish_now_and_then(self) -> None:
    while not self._done.wait(_EVERY):
      with contextlib.suppress(Exception):  # The next checkpoint will say what is wrong.
        self.publish()

  def remove(self) -> None:
    for path in (*self._folder.glob("*.sqlite"), *([self._whole] if self._whole.exists() else [])):
      path.unlink()

  def close(self) -> None:
    """Sends what is left, if that is possible."""
    self._done.set()
    if self._thread.is_alive():
      self._thread.join()
    with contextlib.suppress(Exception):
      self.publish()
