"""Checkpoints: one atomic Orbax composite per saved step."""

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import math
import sys
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as preserve

from dca_jax.checks import at_least
from dca_jax.devices.processes import gather
from dca_jax.errors import Terminated, UserError, reason
from dca_jax.learner import TrainState
from dca_jax.store.workdir import place_aside

_VERSION = "dca-jax"  # Key of a checkpoint's host part: the version that saved it.


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """The `checkpoint` section."""

  every: int = 10
  """Steps between checkpoints; the last step is always saved."""
  keep: int = 2
  """How many are kept, the newest."""
  keep_every: int = 0
  """Checkpoints of steps that this divides are kept for good; 0: of none."""
  best: str = ""
  """A score of the evaluations, such as `eval/sampled`: the checkpoint with its largest value is
  kept too. There is one of every step that was evaluated."""

  def check(self) -> dict[str, str]:
    bad = at_least(1, self, "every", "keep")
    if self.keep_every < 0 or (self.every > 0 and self.keep_every % self.every):
      bad["keep_every"] = f"must be a multiple of checkpoint.every ({self.every}), or 0"
    return bad


class _Told(logging.Handler):
  """Hears which save in the background has failed, and keeps what else Orbax reports to itself.

  Orbax logs it at once, but raises it after it has met the other processes, who may wait elsewhere.
  """

  def __init__(self):
    super().__init__()
    self.error: BaseException | None = None
    self._logger = logging.getLogger("absl")
    self._logger.setLevel(logging.ERROR)
    self._logger.propagate = False
    self._logger.addHandler(self)

  def emit(self, record: logging.LogRecord) -> None:
    if record.threadName == "async_save" and record.exc_info:
      self.error = record.exc_info[1]

  def close(self) -> None:
    self._logger.removeHandler(self)
    super().close()


class Checkpoints:
  """The checkpoints of a run, saved in the background; a context manager that waits for the last.

  A stop (Terminated) that comes through it first saves what `hold` was given last.
  """

  def __init__(self, config: CheckpointConfig, workdir: epath.Path, fixed: dict[str, Any]):
    """`fixed` are the settings, by their keys, that a run
    that goes on from a checkpoint must share."""
    self._told = _Told()
    self._folder, self._best = workdir / "checkpoints", config.best
    self._fixed = json.loads(json.dumps(fixed))  # As it comes back.
    self._held: tuple[int, TrainState] | None = None
    self._saving = 0
    policies: list[preserve.PreservationPolicy] = [preserve.LatestN(config.keep)]
    if config.keep_every:
      policies.append(preserve.EveryNSteps(config.keep_every))
    options = {}
    if config.best:
      options["best_fn"] = self._score
      scored = {"get_metric_fn": self._score, "keep_checkpoints_without_metrics": False}
      policies.append(preserve.BestN(n=1, **scored))
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        save_interval_steps=config.every,
        preservation_policy=preserve.AnyPreservationPolicy(policies),
        **options,
      ),
    )

  def _score(self, metrics: dict[str, float]) -> float:
    """What the best has most of, and one that was saved under another `checkpoint.best` nothing."""
    return metrics.get(self._best, -math.inf)

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    with contextlib.closing(self._told):
      if isinstance(error, Terminated):
        raise self._stop(error) from None
      if error and jax.process_count() > 1:
        return  # To close is to wait for the other processes, and they are not here.
      try:
        self._settle()
        self._manager.close()
      except Exception as late:
        # A save in the background failed; an error that is already on its way is told instead.
        if kind is None:
          raise self._failed(late) from late

  def _settle(self) -> None:
    """Waits for the save in the background; raises its error."""
    while self._manager.is_saving_in_progress() and not self._told.error:
      time.sleep(0.002)
    if self._told.error:
      raise self._told.error

  def _stop(self, asked: Terminated) -> Terminated:
    """Saves what is held, and says where the run goes on."""
    if self._held:
      step, state = self._held
      if step and step != self._manager.latest_step():
        self.save(step, state, {}, last=True)
    if jax.process_count() == 1:
      self._manager.close()
    where = f"; {self.describe()}, the same command again continues"
    if self._manager.latest_step() is None:
      where = " before the first checkpoint; the same command begins again"
    return Terminated(asked.by, asked.status, where)

  def hold(self, step: int, state: TrainState) -> None:
    """Keeps in mind what there is to save if the run is stopped before the next step is done."""
    self._held = step, state

  def release(self) -> None:
    """Forgets it, before its arrays are given away."""
    self._held = None

  def due(self, step: int, metrics: dict[str, float], last: bool) -> bool:
    return last or self._best in metrics or self._manager.should_save(step)

  def save(self, step: int, state: TrainState, metrics: dict[str, float], last: bool) -> None:
    """Saves a step that is due; returns before the files are written, except for the last step.

    Raises:
      UserError: the disk is full or the folder cannot be written. Checkpoints
        that were complete stay so.
    """
    host = {**self._fixed, _VERSION: importlib.metadata.version("dca-jax")}
    arrays = ocp.args.StandardSave(state._asdict())
    args = ocp.args.Composite(state=arrays, host=ocp.args.JsonSave(host))
    best = {self._best: metrics[self._best]} if self._best in metrics else None
    try:
      self._settle()
      self._saving = step
      self._manager.save(step, args=args, metrics=best, force=self._manager.latest_step() != step)
      if last:
        self._settle()
        self._manager.wait_until_finished()
    except Exception as error:  # Orbax and TensorStore report a full disk with types of their own.
      raise self._failed(error) from error

  def _failed(self, error: Exception) -> UserError:
    what = f"a checkpoint at step {self._saving} ({reason(error)})"
    return UserError(f"could not save {what}; {self.describe()}. Make room, then run again")

  def describe(self) -> str:
    """A clause for error messages: what is safe."""
    with contextlib.suppress(Exception):  # It is known already, or told by whoever asks.
      self._settle()
    steps = ocp.utils.checkpoint_steps(self._folder)  # The manager counts one that failed, too.
    what = f"step {max(steps)} is safe" if steps else "no checkpoint was saved yet"
    return f"{what} in {self._folder}"

  def restore(self, abstract: TrainState, resume: str) -> tuple[int, TrainState] | None:
    """The newest readable checkpoint as (step, state), or None where there is none.

    A damaged checkpoint is reported and put aside, and the one before it is taken.

    Args:
      abstract: shapes, dtypes and shardings wanted, which may belong to another mesh
        than the one that saved.
      resume: the number of a step to go back to, which puts the checkpoints after it aside; or as
        in `train`.

    Raises:
      UserError: there are checkpoints, but not the wanted one, or none is readable,
        or they belong to another run.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    aside: dict[int, str] = {}
    if resume not in ("auto", "never"):
      if int(resume) not in steps:
        have = ", ".join(map(str, sorted(steps))) or "none"
        raise UserError(
          f"--resume={resume}: no such checkpoint in {self._folder}; there are {have}"
        )
      aside = {step: f"is later than --resume={resume}" for step in steps if step > int(resume)}
    for step in steps:
      if step in aside:
        continue
      self._check_host(step)
      damage, state = "", {}
      try:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract._asdict()))
        state = self._manager.restore(step, args=args).state
      except Exception as error:  # Damage shows as any of a dozen types.
        damage = reason(error)
      if damage := next(filter(None, gather("restored checkpoint", damage)), ""):
        self._check_arrays(step, abstract)
        aside[step] = f"is damaged ({damage})"
        continue
      self._put_aside(aside)
      return step, TrainState(**state)
    if steps:
      raise UserError(
        f"no checkpoint in {self._folder} can be used: {max(aside)} {aside[max(aside)]}; choose"
        " another --workdir, or move that folder away to begin again"
      )
    return None

  def _check_host(self, step: int) -> None:
    """Compares a checkpoint's settings with this run's, where they can be read.

    Raises:
      UserError: they differ.
    """
    try:
      args = ocp.args.Composite(host=ocp.args.JsonRestore())
      host = dict(self._manager.restore(step, args=args).host)
    except Exception:  # Damaged; its arrays may not be.
      return
    version = host.pop(_VERSION, "")
    if host.keys() != self._fixed.keys():
      key = min(host.keys() ^ self._fixed.keys())
      raise self._other_version(step, version, f"setting {key} is known to only one of them")
    for key, now in self._fixed.items():
      if host[key] != now:
        raise UserError(
          f"{self._folder / str(step)} was saved by a run with other settings: {key} was"
          f" {host[key]!r} and is now {now!r}; choose another --workdir"
        )

  def _check_arrays(self, step: int, abstract: TrainState) -> None:
    """Raises UserError where a checkpoint that cannot be restored is sound,
    but holds other arrays."""
    try:
      saved = self._manager.item_metadata(step)["state"].tree
      saved = {name: tuple(x.shape) for name, x in ocp.tree.to_flat_dict(saved, sep="/").items()}
    except Exception:  # Damaged.
      return
    ours = {
      jax.tree_util.keystr(path, simple=True, separator="/"): x.shape
      for path, x in jax.tree.leaves_with_path(abstract._asdict())
    }
    for name in sorted(saved.keys() | ours.keys()):
      if saved.get(name) != ours.get(name):
        what = f"{name} has the shape {saved.get(name)} there and {ours.get(name)} here"
        raise self._other_version(step, "", what)

  def _other_version(self, step: int, version: str, what: str) -> UserError:
    return UserError(
      f"{self._folder / str(step)} was saved by another version of dca-jax ({version or 'unknown'};"
      f" this is {importlib.metadata.version('dca-jax')}): {what}. Go on with that version, or"
      " choose another --workdir"
    )

  def _put_aside(self, aside: dict[int, str]) -> None:
    """Moves checkpoints out of the way; while they stand there,
    Orbax refuses to save those steps again."""
    if jax.process_index() == 0:
      for step, why in aside.items():
        place = put_aside(self._folder / str(step), self._folder.parent, f"checkpoint_{step}")
        print(f"warning: checkpoint {step} {why}; moved to {place}", file=sys.stderr)
    gather("checkpoints moved", None)
    if aside:
      self._manager.reload()


def put_aside(path: epath.Path, workdir: epath.Path, name: str) -> epath.Path:
  """Moves what cannot be used to where it is in nobody's way; returns where that is."""
  place = place_aside(workdir, name)
  path.rename(place)
  return place


REMAKES = "the command that began the run makes it anew"


def read_params(workdir: epath.Path, step: int | None):
  """The number of a checkpoint, the newest where `step` is None, and its parameters alone,
  on the host."""
  logging.getLogger("absl").setLevel(
    logging.CRITICAL
  )  # Orbax warns of the parts that are not wanted here.
  with ocp.CheckpointManager(
    workdir / "checkpoints", item_handlers={"state": ocp.PyTreeCheckpointHandler()}
  ) as manager:
    steps = sorted(manager.all_steps())
    if not steps or step not in (None, *steps):
      raise UserError(
        f"{workdir} has no checkpoint"
        + (f" of step {step}; there are {steps}" if steps else " yet")
      )
    step = steps[-1] if step is None else step
    try:
      item = {"params": manager.item_metadata(step)["state"].tree["params"]}
      on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
      wanted = ocp.args.PyTreeRestore(item=item, restore_args=on_host, partial_restore=True)
      restored = manager.restore(step, args=ocp.args.Composite(state=wanted))
    except Exception as error:  # Damage shows as any of a dozen types.
      raise UserError(
        f"checkpoint {step} of {workdir} is unreadable ({error}); choose another --step"
      ) from error
  return step, restored.state["params"]


def read_start(workdir: epath.Path):
  """The parameters that a run started from, on the host.

  Raises:
    UserError: they cannot be read.
  """
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      return checkpointer.restore(workdir / "start")
  except Exception as error:  # Damage shows as any of a dozen types.
    raise UserError(
      f"{workdir / 'start'} is gone or damaged ({reason(error)}); {REMAKES}"
    ) from error
