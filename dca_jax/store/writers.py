"""Where metrics go beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio, or a class of your
own."""

import dataclasses
import functools
import json
import os
import pathlib
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import histogram, scalar

from dca_jax.doors import door, find, require
from dca_jax.errors import reason
from dca_jax.store.workdir import write_whole

_TOLD = "writers.json"  # In the workdir: of each writer the run's id there, and a step.
_EVERY = 5.0  # seconds between notes of the step up to which a writer has surely heard all
_FINISH = 30.0  # seconds that a run waits at its end for those who send over a network
_STOPPED = 5.0  # seconds, where it was stopped or has failed
_SAFE = "metrics.jsonl has everything"


class About(NamedTuple):
  """What a writer is told of a run."""

  name: str
  id: str
  """The same whenever the run goes on."""
  project: str
  settings: Mapping[str, Any]
  """The run's config.json."""
  folder: pathlib.Path
  """For its files; a local one."""
  done: int
  """The step that the run goes on from."""


class Writer(Protocol):
  """Opened with `About`. What it raises ends its own writing, with a warning, and nothing else."""

  package: ClassVar[str]
  """What has to be installed, which is an extra of that name; empty where nothing has."""
  waits: ClassVar[bool]
  """Whether it may wait for a network: it is then called in a thread of its own, and is told of
  every step, twice only of those just before a kill."""

  def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

  def close(self) -> None: ...


class TensorBoard:
  """Events in the folder `tensorboard`."""

  package: ClassVar[str] = ""
  waits: ClassVar[bool] = False

  def __init__(self, run: About):
    folder = run.folder / "tensorboard"
    folder.mkdir(exist_ok=True)
    # Not SummaryWriter: the queue to its thread can lose a wake-up to Ctrl-C, and closing it then
    # waits for ever.
    self._events = EventsWriter(str(folder / "events"))
    # TensorBoard hides what an interrupted run wrote from this step on.
    self._write(step=run.done + 1, session_log=SessionLog(status=SessionLog.START))

  def _write(self, **content) -> None:
    self._events.write_event(Event(wall_time=time.time(), **content))

  def log(self, step: int, metrics: Mapping[str, float]) -> None:
    for key, value in metrics.items():
      self._write(step=step, summary=scalar(key, value))
    self._events.flush()

  def histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None:
    """How many numbers are distributed; a writer need not have this."""
    for key, numbers in values.items():
      if numbers.size:
        self._write(step=step, summary=histogram(key, numbers, bins="auto"))

  def close(self) -> None:
    self._events.close()


class WeightsAndBiases:
  """A run at Weights & Biases; WANDB_MODE=offline keeps it in the folder `wandb` for `wandb
  sync`."""

  package: ClassVar[str] = "wandb"
  waits: ClassVar[bool] = True

  def __init__(self, run: About):
    import wandb

    self._run = wandb.init(
      project=run.project,
      name=run.name,
      id=run.id,
      resume="allow",
      reinit="create_new",  # The program that called us may have a run of its own.
      dir=os.environ.get("WANDB_DIR", str(run.folder)),
      config=dict(run.settings),
      allow_val_change=True,
      settings=wandb.Settings(console="off", login_timeout=60),
    )
    # A step of our own: theirs only grows, also where a later row adds to the same step.
    self._run.define_metric("*", step_metric="step")

  def log(self, step: int, metrics: Mapping[str, float]) -> None:
    self._run.log({"step": step, **metrics})

  def close(self) -> None:
    self._run.finish()


class Trackio:
  """A run in Trackio's folder on this machine, or where its environment variables say."""

  package: ClassVar[str] = "trackio"
  waits: ClassVar[bool] = True

  def __init__(self, run: About):
    import trackio

    # A run is found again by its name.
    name, settings = f"{run.name}-{run.id}", dict(run.settings)
    self._run = trackio.init(run.project, name, config=settings, resume="allow", embed=False)

  def log(self, step: int, metrics: Mapping[str, float]) -> None:
    self._run.log(dict(metrics), step)

  def close(self) -> None:
    self._run.finish()


WRITERS: dict[str, Any] = {
  "tensorboard": TensorBoard,
  "wandb": WeightsAndBiases,
  "trackio": Trackio,
}


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """The `log` section."""

  to: tuple[str, ...] = door(("tensorboard",))
  """Where metrics go beside metrics.jsonl: `tensorboard`, `wandb`, `trackio`, or your own,
  MODULE:CLASS (see `writers.Writer`)."""
  project: str = "dca-jax"
  """What the run belongs to at `wandb` and `trackio`."""

  def check(self) -> dict[str, str]:
    strange = [name for name in self.to if name not in WRITERS and ":" not in name]
    if strange or len({*self.to}) < len(self.to):
      return {"to": f"must be different ones of {', '.join(WRITERS)}, or MODULE:CLASS"}
    return {} if self.project else {"project": "must be given"}

  def unused(self) -> dict[str, str]:
    alone = not {*self.to} - {"tensorboard"}
    return {"project": "log.to names nothing that has projects"} if alone else {}

  def kinds(self) -> dict[str, Any]:
    """The class of each.

    Raises:
      UserError: one cannot be imported, or needs a package that is not there.
    """
    kinds = {name: WRITERS.get(name) or find(name, "log.to") for name in self.to}
    for kind in kinds.values():
      if kind.package:
        require(kind.package, kind.package, "log.to")
    return kinds


class Log(NamedTuple):
  """Where the metrics of a run go, and what is said of it there."""

  config: LogConfig
  workdir: epath.Path
  settings: Mapping[str, Any]


class Writers:
  """All that a run's `log` section names. None of them can harm the run: its first failure is a
  warning, and its end."""

  def __init__(self, log: Log, folder: pathlib.Path, done: int, rows: Sequence[dict[str, Any]]):
    """`rows` are those of metrics.jsonl that earlier processes wrote, also of steps after `done`,
    which are repeated."""
    self._path, self._lock = log.workdir / _TOLD, threading.Lock()
    self._told = _read_told(self._path)
    name = f"{log.workdir.parent.name}/{log.workdir.name}"
    self._members = []
    for spec, kind in log.config.kinds().items():
      own, heard = self._told.get(spec, (secrets.token_hex(4), -1))
      about = About(name, own, log.config.project, log.settings, folder, done)
      note = functools.partial(self._note, spec, own) if kind.waits else None
      member = _Member(spec, functools.partial(kind, about), heard, note)
      heard = heard if kind.waits else done
      member.told = {row["step"]: row.keys() for row in rows if row["step"] <= heard}
      for row in rows:
        if heard < row["step"] <= done:  # It came later than the run, or was cut off.
          member.log(row["step"], {key: value for key, value in row.items() if key != "step"})
      self._members.append(member)

  def _note(self, spec: str, own: str, step: int) -> None:
    with self._lock:
      self._told[spec] = own, step
      write_whole(self._path, json.dumps(self._told) + "\n")

  def log(self, step: int, metrics: Mapping[str, float], values: Mapping[str, np.ndarray]) -> None:
    for member in self._members:
      member.log(step, metrics)
      member.histograms(step, values)

  def close(self, stopped: bool) -> None:
    """Waits for a while until all is written; not as long where the run was stopped."""
    end = time.monotonic() + (_STOPPED if stopped else _FINISH)
    for member in self._members:
      member.close()
    for member in self._members:
      member.wait(end)


class _Member:
  """A writer and, if it may wait, the thread in which it is called."""

  def __init__(
    self,
    name: str,
    make: Callable[[], Writer],
    heard: int,
    note: Callable[[int], None] | None,
  ):
    """`note` keeps the step up to which one that may wait has heard all, which is `heard` now."""
    self.told: Mapping[int, Collection[str]] = {}
    """What it has heard of the steps from an earlier process."""
    self._name, self._failed = name, False
    self._heard, self._sure, self._note, self._noted = heard, heard, note, 0.0
    self._writer: Any = None
    self._calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
    self._thread = threading.Thread(target=self._work, daemon=True) if note else None
    if self._thread:
      self._thread.start()
    self._do(functools.partial(self._open, make))

  def _open(self, make: Callable[[], Writer]) -> None:
    self._writer = make()
    self._keep(self._heard)

  def _keep(self, step: int) -> None:
    if self._note and not self._failed:
      self._note(step)
    self._noted = time.monotonic()

  def _log(self, step: int, metrics: Mapping[str, float]) -> None:
    self._writer.log(step, metrics)
    self._heard = max(self._heard, step)
    if time.monotonic() > self._noted + _EVERY:
      self._keep(self._sure)  # It may hold back for a moment what it has just heard.
      self._sure = self._heard

  def _close(self) -> None:
    self._writer.close()
    self._keep(self._heard)

  def log(self, step: int, metrics: Mapping[str, float]) -> None:
    told = self.told.get(step, ())
    if new := {key: value for key, value in metrics.items() if key not in told}:
      self._do(functools.partial(self._log, step, new))

  def histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None:
    """For a writer that has them."""
    self._do(lambda: getattr(self._writer, "histograms", lambda *_: None)(step, values))

  def close(self) -> None:
    self._do(self._close)

  def wait(self, end: float) -> None:
    """Returns when it is closed, or at the time `end`."""
    if self._thread:
      self._calls.put(None)
      self._thread.join(max(0.0, end - time.monotonic()))
      if self._thread.is_alive():
        self._failed = True
        print(f"warning: log.to: {self._name} did not finish in time; {_SAFE}", file=sys.stderr)

  def _do(self, call: Callable[[], Any]) -> None:
    if self._thread:
      self._calls.put(call)
    else:
      self._try(call)

  def _work(self) -> None:
    for call in iter(self._calls.get, None):
      self._try(call)

  def _try(self, call: Callable[[], Any]) -> None:
    if self._failed:
      return
    try:
      call()
    except Exception as error:
      if self._failed:  # It was given up.
        return
      self._failed = True
      said = f"{self._name} failed ({type(error).__name__}: {reason(error)}) and is told no more"
      print(f"warning: log.to: {said}; {_SAFE}", file=sys.stderr)


def _read_told(path: epath.Path) -> dict[str, tuple[str, int]]:
  """Empty where it is damaged too: the run is then a new one there."""
  try:
    return {
      spec: (str(own), int(step)) for spec, (own, step) in json.loads(path.read_text()).items()
    }
  except (OSError, ValueError, TypeError, AttributeError):
    return {}
