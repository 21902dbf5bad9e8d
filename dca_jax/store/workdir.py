"""Where a run lives: a folder, or a bucket, whose files can neither grow nor be moved for nothing."""

import contextlib
import importlib.util
import itertools
import os
import pathlib
import sqlite3
import tempfile

import jax
from etils import epath

from dca_jax.errors import UserError
from dca_jax.review.cache import Cache


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

  It is the workdir itself, or, where that is a bucket, a temporary folder that begins with the copies there; `publish`
  brings them up to date. The metrics are process 0's alone; every process has a file of reviews of its own.
  """

  def __init__(self, workdir: epath.Path):
    self.workdir, process = workdir, jax.process_index()
    self._published: dict[pathlib.Path, int] = {}
    self._remote = is_remote(workdir)
    reviews = f"reviews_{process}.sqlite" if process else "reviews.sqlite"
    self._scratch = tempfile.TemporaryDirectory(prefix="dca-jax-") if self._remote or process else None
    self.folder = pathlib.Path(self._scratch.name if self._scratch else workdir)
    """For metrics, TensorBoard's events and the tokenizer; what other processes than 0 write there is thrown away."""
    self.reviews = (self.folder if self._remote else pathlib.Path(workdir)) / reviews
    if self._remote:
      for name in (reviews, "metrics.jsonl"):
        if (workdir / name).exists():
          (self.folder / name).write_bytes((workdir / name).read_bytes())
    if process == 0:
      self._adopt_orphans()

  def _adopt_orphans(self) -> None:
    """Takes over what processes paid for that the run does not have any more."""
    for process in itertools.count(jax.process_count()):
      name = f"reviews_{process}.sqlite"
      if not (self.workdir / name).exists():
        break
      if self._remote:
        (self.folder / name).write_bytes((self.workdir / name).read_bytes())
      with contextlib.closing(Cache(self.reviews)) as cache:
        cache.take_over(self.folder / name, same=False)
      for path in self.workdir.glob(f"{name}*"):  # Its journal too.
        path.unlink()

  def publish(self) -> None:
    """Copies to the bucket what has been written so far; nothing to do for a local workdir."""
    if not self._remote:
      return
    if self.reviews.exists():
      _snapshot(self.reviews, self.folder / "snapshot")
      (self.workdir / self.reviews.name).write_bytes((self.folder / "snapshot").read_bytes())
    if jax.process_index() == 0:
      for path in (self.folder / "metrics.jsonl", *self.folder.glob("t*/*")):  # TensorBoard's events, the tokenizer.
        if (stamp := path.stat().st_mtime_ns) != self._published.get(path):
          place = self.workdir / path.relative_to(self.folder)
          place.parent.mkdir(parents=True, exist_ok=True)
          place.write_bytes(path.read_bytes())
          self._published[path] = stamp

  def close(self) -> None:
    if self._scratch:
      self._scratch.cleanup()


def _snapshot(path: pathlib.Path, copy: pathlib.Path) -> None:
  """A consistent copy of a database that is in use."""
  with contextlib.closing(sqlite3.connect(path)) as source, contextlib.closing(sqlite3.connect(copy)) as target:
    source.backup(target)
