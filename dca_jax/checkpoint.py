"""Checkpoints: one atomic Orbax composite per saved step."""

import dataclasses
import json
import logging
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as preserve

from dca_jax.checks import at_least
from dca_jax.errors import UserError
from dca_jax.learner import TrainState
from dca_jax.processes import gather


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
  """A metric, such as `eval/sampled`: the checkpoint with its largest value is kept too. There is one whenever the
  metric was measured."""

  def check(self) -> dict[str, str]:
    bad = at_least(1, self, "every", "keep")
    if self.keep_every < 0 or (self.every > 0 and self.keep_every % self.every):
      bad["keep_every"] = f"must be a multiple of checkpoint.every ({self.every}), or 0"
    return bad


class Checkpoints:
  """The checkpoints of a run, saved in the background; a context manager that waits for the last one."""

  def __init__(self, config: CheckpointConfig, workdir: epath.Path, fixed: dict[str, Any]):
    """`fixed` are the settings, by their keys, that a run that goes on from a checkpoint must share."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax reports every file; its errors reach us as exceptions.
    self._folder, self._best = workdir / "checkpoints", config.best
    self._fixed = json.loads(json.dumps(fixed))  # As it comes back.
    policies: list[preserve.PreservationPolicy] = [preserve.LatestN(config.keep)]
    if config.keep_every:
      policies.append(preserve.EveryNSteps(config.keep_every))
    options = {}
    if config.best:
      options["best_fn"] = lambda metrics: metrics[config.best]
      policies.append(preserve.BestN(get_metric_fn=options["best_fn"], n=1, keep_checkpoints_without_metrics=False))
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        save_interval_steps=config.every, preservation_policy=preserve.AnyPreservationPolicy(policies), **options
      ),
    )

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    try:
      self._manager.close()
    except Exception as late:
      # A save in the background failed; where another error is already on its way, that one is told.
      if kind is None:
        raise self._failed("the last checkpoint", late) from late

  def due(self, step: int, metrics: dict[str, float], last: bool) -> bool:
    return last or self._best in metrics or self._manager.should_save(step)

  def save(self, step: int, state: TrainState, metrics: dict[str, float], last: bool) -> None:
    """Saves a step that is due; returns before the files are written, but for the last one.

    Raises:
      UserError: the disk is full or the folder cannot be written. Checkpoints that were complete stay so.
    """
    args = ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()), host=ocp.args.JsonSave(self._fixed))
    best = {self._best: metrics[self._best]} if self._best in metrics else None
    try:
      self._manager.save(step, args=args, metrics=best, force=self._manager.latest_step() != step)
      if last:
        self._manager.wait_until_finished()
    except Exception as error:  # Orbax and TensorStore report a full disk with types of their own.
      raise self._failed(f"a checkpoint at step {step}", error) from error

  def _failed(self, what: str, error: Exception) -> UserError:
    return UserError(f"could not save {what} ({_reason(error)}); {self.describe()}. Make room, then run again")

  def describe(self) -> str:
    """A clause for error messages: what is safe."""
    step = self._manager.latest_step()
    return (
      f"no checkpoint was saved yet in {self._folder}" if step is None else f"step {step} is safe in {self._folder}"
    )

  def restore(self, abstract: TrainState, resume: str) -> tuple[int, TrainState] | None:
    """The newest readable checkpoint as (step, state), or None where there is none.

    A damaged checkpoint is reported and put aside, and the one before it is taken.

    Args:
      abstract: shapes, dtypes and shardings wanted, which may belong to another mesh than the one that saved.
      resume: the number of a step to go back to, whereupon the checkpoints after it are put aside, or as in `train`.

    Raises:
      UserError: there are checkpoints, but not the wanted one, or none is readable, or they belong to another run.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    aside: dict[int, str] = {}
    if resume not in ("auto", "never"):
      if int(resume) not in steps:
        have = ", ".join(map(str, sorted(steps))) or "none"
        raise UserError(f"--resume={resume}: no such checkpoint in {self._folder}; there are {have}")
      aside = {step: f"is later than --resume={resume}" for step in steps if step > int(resume)}
    for step in steps:
      if step in aside:
        continue
      args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract._asdict()), host=ocp.args.JsonRestore())
      damage = ""
      try:
        restored = self._manager.restore(step, args=args)
      except Exception as error:  # Damage shows as any of a dozen types.
        damage = _reason(error)
      if damage := next(filter(None, gather(damage)), ""):
        aside[step] = f"is damaged ({damage})"
        continue
      for key in {**restored.host, **self._fixed}:
        was, now = restored.host.get(key), self._fixed.get(key)
        if was != now:
          raise UserError(
            f"{self._folder / str(step)} was saved by a run with other settings: {key} was {was!r} and is now {now!r};"
            " choose another --workdir"
          )
      self._put_aside(aside)
      return step, TrainState(**restored.state)
    if steps:
      raise UserError(
        f"no checkpoint in {self._folder} can be used: {max(aside)} {aside[max(aside)]}; choose another --workdir, or"
        " move that folder away to begin again"
      )
    return None

  def _put_aside(self, aside: dict[int, str]) -> None:
    """Moves checkpoints out of the way; while they stand there, Orbax refuses to save those steps again."""
    if jax.process_index() == 0:
      for step, reason in aside.items():
        names = (self._folder.parent / f"aside_checkpoint_{step}{end}" for end in ("", *map("_{}".format, range(99))))
        place = next(name for name in names if not name.exists())
        (self._folder / str(step)).rename(place)
        print(f"warning: checkpoint {step} {reason}; moved to {place}", file=sys.stderr)
    gather("moved")
    if aside:
      self._manager.reload()


def _reason(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
