"""Where free-text tasks come from: JSONL files, TensorFlow Datasets, and whatever the package
`datasets` loads."""

import codecs
import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from dca_jax.doors import local, require
from dca_jax.errors import UserError
from dca_jax.tasks.text import Rows, TextConfig


@dataclasses.dataclass(frozen=True)
class JsonlConfig(TextConfig):
  """The `task` section for `jsonl`: files with one JSON object a line."""

  name: str = "jsonl"
  path: str = local()
  """The file that is trained on."""
  heldout_path: str = local()
  """The file of held-out problems; empty takes them from `path`, by `heldout_fraction`."""
  heldout_fraction: float = 0.0
  """Without `heldout_path`: about this share of the questions of `path` is held out. A hash of each
  question decides, so its copies stay on one side, and neither another order nor further lines move
  any."""

  def check(self) -> dict[str, str]:
    not_one = bool(self.heldout_path) == bool(self.heldout_fraction)
    rules = {
      "path": (not self.path, f"must be given, because task.name is '{self.name}'"),
      "heldout_path": (not_one, "either this or task.heldout_fraction must be given, and not both"),
      "heldout_fraction": (not 0 <= self.heldout_fraction < 1, "must be above 0 and below 1"),
    }
    return {key: why for key, (wrong, why) in rules.items() if wrong} | super().check()

  def parts(self) -> dict[str, Rows]:
    train = _read_jsonl("path", self.path)
    if self.heldout_path:
      return {"train": train, "heldout": _read_jsonl("heldout_path", self.heldout_path)}
    numbers: dict[str, list[int]] = {"train": [], "heldout": []}
    for i, row in enumerate(train.rows):
      digest = hashlib.sha256(self.field(row, "question", train.where(i)).encode()).digest()
      held_out = int.from_bytes(digest[:8]) / 2**64 < self.heldout_fraction
      numbers["heldout" if held_out else "train"].append(i)
    if not all(numbers.values()):
      missing = "hold out" if numbers["train"] else "train on"
      said = f"{self.heldout_fraction} leaves nothing to {missing}"
      raise UserError(
        f"task.heldout_fraction: {said} of {self.path}; set another, or give task.heldout_path"
      )
    return {part: train._replace(numbers=own) for part, own in numbers.items()}


@dataclasses.dataclass(frozen=True)
class SplitConfig(TextConfig):
  """A data set by its name, with named splits."""

  dataset: str = ""
  """The data set's name; for `hub` that may be a folder."""
  split: str = "train"
  """The split that is trained on; `train[:90%]` is one too."""
  heldout_split: str = "test"
  """The split that held-out problems come from, not the same as `split`; `train[90%:]` is one
  too."""

  def check(self) -> dict[str, str]:
    rules = {
      "dataset": (not self.dataset, f"must be given, because task.name is '{self.name}'"),
      "heldout_split": (self.heldout_split == self.split, "must differ from task.split"),
    }
    return {key: why for key, (wrong, why) in rules.items() if wrong} | super().check()

  def read(self, split: str) -> Sequence[Any]:
    """The rows of a split; it may raise anything."""
    raise NotImplementedError

  def parts(self) -> dict[str, Rows]:
    return {"train": self._part("split"), "heldout": self._part("heldout_split")}

  def _part(self, key: str) -> Rows:
    split = getattr(self, key)
    try:
      rows = self.read(split)
      if not len(rows):
        raise ValueError("it is empty")
    except UserError:
      raise
    except Exception as error:
      # Of many types: no such data set, no such split, no network, another file format.
      why = " ".join(str(error).split())[:300]
      said = f"cannot open {split!r} of task.dataset {self.dataset!r} ({why})"
      raise UserError(f"task.{key}: {said}") from None
    where = f"{self.dataset}, split {split!r}"
    return Rows(rows, lambda row: f"{where}, example {row + 1}", range(len(rows)))


@dataclasses.dataclass(frozen=True)
class TfdsConfig(SplitConfig):
  """The `task` section for `tfds`: a data set of TensorFlow Datasets, such as `gsm8k`, that is
  prepared as ArrayRecord or is downloaded; TensorFlow is not needed."""

  name: str = "tfds"
  data_dir: str = local()
  """Where it is or is downloaded to, if that is not TFDS's own folder."""

  def read(self, split: str) -> Sequence[Any]:
    import tensorflow_datasets as tfds

    # TFDS knows its text data sets only once they are imported.
    with contextlib.suppress(ImportError):
      importlib.import_module(f"tensorflow_datasets.text.{re.split('[/:]', self.dataset)[0]}")
    return tfds.data_source(self.dataset, split=split, data_dir=self.data_dir or None)


@dataclasses.dataclass(frozen=True)
class HubConfig(SplitConfig):
  """The `task` section for `hub`: a data set of the Hugging Face hub, such as `openai/gsm8k`, or a
  folder with its files, that the package `datasets` loads."""

  name: str = "hub"
  subset: str = ""
  """Which of several in it, such as `main`."""
  revision: str = ""
  """Commit or tag; empty is the newest, which may be another one when a run goes on."""

  def read(self, split: str) -> Sequence[Any]:
    require("datasets", "hub", "task.name")
    import datasets

    place = os.path.expanduser(self.dataset)
    subset, revision = self.subset or None, self.revision or None
    return datasets.load_dataset(place, subset, split=split, revision=revision)


def _read_jsonl(key: str, path: str) -> Rows:
  """Lines end with a line feed alone: a text may hold other ends of lines."""
  rows, numbers = [], []
  try:
    lines = epath.Path(path).expanduser().read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
  except OSError as error:
    raise UserError(f"task.{key}: cannot read {path} ({error})") from None
  for number, line in enumerate(lines, 1):
    try:
      if line.strip():
        row = json.loads(line.decode(), object_pairs_hook=_unique, parse_constant=_no_number)
        if not isinstance(row, dict):
          raise TypeError(f"it is a {type(row).__name__}")
        rows.append(row)
        numbers.append(number)
    except UnicodeDecodeError as error:
      raise UserError(
        f"task.{key}: cannot read {path}, line {number}, which is not UTF-8 ({error})"
      ) from None
    except (RecursionError, TypeError, ValueError) as error:
      raise UserError(f"task.{key}: {path}, line {number} is not a JSON object ({error})") from None
  if not rows:
    raise UserError(f"task.{key}: {path}, line 1 is not a JSON object (the file is empty)")
  return Rows(rows, lambda row: f"{path}, line {numbers[row]}", range(len(rows)))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """An object whose keys differ; which of two was meant, nobody can know."""
  made = dict(pairs)
  if len(made) < len(pairs):
    twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
    raise ValueError(f"it has {twice!r} twice")
  return made


def _no_number(name: str):
  raise ValueError(f"{name} is no number in JSON")
