"""What a run reports while it goes: metrics.jsonl, TensorBoard events, a progress bar and one line per step."""

import contextlib
import json
import math
import pathlib
import sys
import time
from typing import Any

from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm import tqdm

from dca_jax.errors import UserError
from dca_jax.workdir import write_whole


class Reporter(contextlib.AbstractContextManager):
  """Writes metrics; a context manager.

  On resume, what an interrupted run had written beyond `start` is taken back, so that every step appears once.
  """

  def __init__(self, workdir: pathlib.Path, start: int, steps: int, quiet: bool = False):
    self._path = workdir / "metrics.jsonl"
    self._kept: list[dict[str, Any]] = [line for line in read_metrics(workdir) if line["step"] <= start]
    self._file = self._begin()
    self.evaluated = {line["step"] for line in self._kept if any(key.startswith("eval/") for key in line)}
    """Steps after which an earlier process evaluated."""
    # Not SummaryWriter: the queue to its thread can lose a wake-up to Ctrl-C, and closing it then waits for ever.
    (workdir / "tensorboard").mkdir(exist_ok=True)
    self._events = EventsWriter(str(workdir / "tensorboard" / "events"))
    # TensorBoard hides what an interrupted run wrote from this step on.
    self._write_event(step=start + 1, session_log=SessionLog(status=SessionLog.START))
    self._quiet = quiet
    self._bar = tqdm(total=steps, initial=start, unit="step", disable=quiet or not sys.stderr.isatty(), leave=False)

  def __exit__(self, *error):
    self._bar.close()
    self._file.close()
    self._events.close()

  def _begin(self):
    """The file with the kept lines, open for more."""
    write_whole(epath.Path(self._path), "".join(json.dumps(line) + "\n" for line in self._kept))
    return self._path.open("a")

  def amend(self, step: int, metrics: dict[str, float]) -> None:
    """Adds what an earlier process had no time to measure to the line of the step that it ended with."""
    if self._kept and self._kept[-1]["step"] == step:
      line = self._kept.pop()
      metrics = {key: value for key, value in line.items() if key != "step"} | metrics
      self._file.close()
      self._file = self._begin()
    self.log(step, metrics)

  def _write_event(self, **content) -> None:
    self._events.write_event(Event(wall_time=time.time(), **content))

  def log(self, step: int, metrics: dict[str, float]) -> None:
    """Records the metrics of one step, flat keys `group/name`."""
    self._file.write(json.dumps({"step": step, **metrics}) + "\n")
    self._file.flush()
    for key, value in metrics.items():
      self._write_event(step=step, summary=scalar(key, value))
    self._events.flush()
    self._bar.update(step - self._bar.n)
    if not self._quiet and "train/reward" in metrics:
      tqdm.write(f"step {step:{len(str(self._bar.total))}d}/{self._bar.total}  {_line(metrics)}", file=sys.stdout)
      sys.stdout.flush()


def read_metrics(workdir: epath.Path | pathlib.Path) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl; a last line that a killed run left unfinished is dropped."""
  path = workdir / "metrics.jsonl"
  lines, parsed = path.read_text().splitlines() if path.exists() else [], []
  for i, line in enumerate(lines):
    try:
      parsed.append(json.loads(line))
    except json.JSONDecodeError as error:
      if i < len(lines) - 1:
        raise UserError(f"{path}, line {i + 1} is not JSON; mend or remove that line") from error
  return parsed


def dollars_spent(workdir: epath.Path | pathlib.Path) -> float:
  """What the metrics say that reviews have cost, over the whole run and all reviewers."""
  return max(
    (
      value
      for line in read_metrics(workdir)
      for key, value in line.items()
      if key.startswith("review/dollars_spent")  # Every reviewer says what all have spent.
    ),
    default=0.0,
  )


def not_finite(metrics: dict[str, float]) -> str | None:
  """The first metric that is not a finite number, or None."""
  return next((key for key, value in metrics.items() if not math.isfinite(value)), None)


def _line(m: dict[str, float]) -> str:
  return (
    f"reward {m['train/reward']:.3f}  acc {m['train/accuracy']:.3f}  entropy {m['learner/entropy']:.3f}"
    f"  len {m['train/length']:.1f}  kl {m['learner/kl']:.3f}  sample {m['seconds/sample']:.2f}s"
    f"  review {m['seconds/review']:.2f}s{_reviews(m)}  update {m['seconds/update']:.2f}s"
    f"  {m['train/tokens_per_second']:,.0f} tok/s"
  )


def _reviews(m: dict[str, float]) -> str:
  """Nothing where every review was usable or none was asked for; else what went wrong most often, and the spending."""
  failed = {k.removeprefix("review/status_"): v for k, v in m.items() if k.startswith("review/status_") and v}
  failed.pop("ok", None)
  worst = max(failed, key=lambda k: failed[k], default="")
  said = f" {m['review/ok']:.0%} ok, {worst} {failed[worst]:.0%}" if worst else ""
  return said + (f" ${m['review/dollars_spent']:.2f}" if m.get("review/dollars_spent") else "")
