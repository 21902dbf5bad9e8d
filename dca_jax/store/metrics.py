"""What a run reports while it goes: metrics.jsonl, TensorBoard and the like, a progress bar
and one line per step."""

import contextlib
import itertools
import json
import math
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from dca_jax.store.symptoms import Watch
from dca_jax.store.workdir import place_aside, write_whole
from dca_jax.store.writers import Log, LogConfig, Writers


class Reporter(contextlib.AbstractContextManager):
  """Writes metrics; a context manager.

  On resume, what an interrupted run had written beyond `start` is discarded, so that every
  step appears once.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    start: int,
    steps: int,
    quiet: bool = False,
    log: Log | None = None,
  ):
    self._path = workdir / "metrics.jsonl"
    rows, damage = _read(self._path)
    if damage:
      kept = place_aside(workdir, self._path.name)
      kept.write_bytes(self._path.read_bytes())
      print(f"warning: {damage}; as it was, it is kept in {kept}", file=sys.stderr)
    self._kept = [row for row in rows if row["step"] <= start]
    if start and (lost := missing_steps([*self._kept, {"step": start + 1}])):
      said = f"{self._path} does not tell of steps {lost}; the run goes on without them"
      print(f"warning: {said}", file=sys.stderr)
    self._file = self._begin()
    self.evaluated = {
      line["step"] for line in self._kept if any(key.startswith("eval/") for key in line)
    }
    """Steps after which an earlier process evaluated."""
    self._watch = Watch()
    self._asked: set[int] = set()
    self._heard = False
    for row in self._kept:
      self._watch.read(row)
      self._hear(row)
    self._writers = Writers(log or Log(LogConfig(), epath.Path(workdir), {}), workdir, start, rows)
    self._quiet = quiet
    self._bar = tqdm(
      total=steps, initial=start, unit="step", disable=quiet or not sys.stderr.isatty(), leave=False
    )

  def __exit__(self, *error):
    self._bar.close()
    self._file.close()
    self._writers.close(stopped=error[0] is not None)

  def _begin(self):
    """The file with the kept lines, open for more."""
    write_whole(epath.Path(self._path), "".join(json.dumps(line) + "\n" for line in self._kept))
    return self._path.open("a")

  def _hear(self, row: Mapping[str, Any]) -> None:
    if row.get("review/asked"):
      self._asked.add(row["step"])
    self._heard |= bool(row.get("review/ok"))

  @property
  def unheard(self) -> int:
    """The steps of the whole run in which reviews were asked for, where none of all was usable;
    else 0."""
    return 0 if self._heard else len(self._asked)

  def amend(self, step: int, metrics: dict[str, float]) -> None:
    """Adds what an earlier process had no time to measure to the line of the step
    that it ended with."""
    if self._kept and self._kept[-1]["step"] == step:
      line = self._kept.pop()
      metrics = {key: value for key, value in line.items() if key != "step"} | metrics
      self._file.close()
      self._file = self._begin()
    self.log(step, metrics)

  def log(
    self, step: int, metrics: dict[str, float], values: Mapping[str, np.ndarray] | None = None
  ) -> None:
    """Records the metrics of one step, flat keys `group/name`; `values` are for writers that show
    how many numbers are distributed."""
    self._file.write(json.dumps({"step": step, **metrics}) + "\n")
    self._file.flush()
    self._hear({"step": step, **metrics})
    self._writers.log(step, metrics, values or {})
    self._bar.update(step - self._bar.n)
    for said in self._watch.read({"step": step, **metrics}) if not self._quiet else ():
      print(f"warning: {said}", file=sys.stderr)
    if not self._quiet and "train/reward" in metrics:
      tqdm.write(
        f"step {step:{len(str(self._bar.total))}d}/{self._bar.total}  {_line(metrics)}",
        file=sys.stdout,
      )
      sys.stdout.flush()


def read_metrics(workdir: epath.Path | pathlib.Path) -> list[dict[str, Any]]:
  """The rows of metrics.jsonl by their steps; of a step that stands there twice, the last one.

  What cannot be read is left out with a warning; a last line that a killed run left unfinished,
  without one.
  """
  rows, damage = _read(workdir / "metrics.jsonl")
  if damage:
    print(f"warning: {damage}", file=sys.stderr)
  return rows


def _read(path: epath.Path | pathlib.Path) -> tuple[list[dict[str, Any]], str]:
  """The rows of a file, and a sentence about its damage, if there is any."""
  *lines, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
  rows, damaged = {}, []
  for number, line in enumerate(lines, 1):
    try:
      row = _row(line)
      rows[row["step"]] = row
    except (ValueError, RecursionError, OverflowError) as error:
      damaged.append(f"line {number} is damaged ({str(error)[:80]}) and left out")
  others = f"; so are {len(damaged) - 1} more" if damaged[1:] else ""
  return [rows[step] for step in sorted(rows)], f"{path}, {damaged[0]}{others}" if damaged else ""


def _row(line: bytes) -> dict[str, Any]:
  row = json.loads(line.decode())
  if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 0:
    raise ValueError("has no step")
  if wrong := [key for key, value in row.items() if type(value) not in (int, float)]:
    raise ValueError(f"{wrong[0]} is no number")
  if infinite := not_finite(row):
    raise ValueError(f"{infinite} is not finite")
  return row


def missing_steps(rows: list[dict[str, Any]]) -> str:
  """The steps up to the last that no row tells of, such as `2, 5 to 7`; empty if there are none."""
  there = [-1, *(row["step"] for row in rows)]
  gaps = [(a + 1, b - 1) for a, b in itertools.pairwise(there) if b - a > 1]
  return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in gaps)


def dollars_spent(workdir: epath.Path | pathlib.Path) -> float:
  """What the metrics say that reviews have cost, over the whole run and all reviewers."""
  return max(
    (
      value
      for line in _read(workdir / "metrics.jsonl")[0]
      for key, value in line.items()
      if key.startswith("review/dollars_spent")  # Every reviewer says what all have spent.
    ),
    default=0.0,
  )


def not_finite(metrics: dict[str, float]) -> str | None:
  """The first metric that is not a finite number, or None."""
  return next((key for key, value in metrics.items() if not math.isfinite(value)), None)


def _line(m: dict[str, float]) -> str:
  kl = f"  kl {m['learner/kl']:.3f}" if "learner/kl" in m else ""
  return (
    f"reward {m['train/reward']:.3f}  acc {m['train/accuracy']:.3f}"
    f"  mixed {m['train/mixed_groups']:.0%}  cut {m['train/truncated']:.0%}"
    f"  len {m['train/length']:.1f}  entropy {m['learner/entropy']:.3f}"
    f"{kl}  sample {m['seconds/sample']:.2f}s"
    f"  review {m['seconds/review']:.2f}s{_reviews(m)}"
    f"  update {m['seconds/update']:.2f}s  {m['train/tokens_per_second']:,.0f} tok/s"
  )


def _reviews(m: dict[str, float]) -> str:
  """Nothing where every review was usable or none was asked for; else what went wrong most often,
  and the spending."""
  failed = {
    k.removeprefix("review/status_"): v
    for k, v in m.items()
    if k.startswith("review/status_") and v
  }
  failed.pop("ok", None)
  worst = max(failed, key=lambda k: failed[k], default="")
  said = f" {m['review/ok']:.0%} ok, {worst} {failed[worst]:.0%}" if worst else ""
  return said + (f" ${m['review/dollars_spent']:.2f}" if m.get("review/dollars_spent") else "")
