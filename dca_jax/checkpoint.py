"""Checkpoints: one atomic Orbax composite per saved step."""

import dataclasses
import logging
import sys

import orbax.checkpoint as ocp
from etils import epath

from dca_jax.errors import UserError
from dca_jax.learner import TrainState


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """The `checkpoint` section."""

  every: int = 10
  """Steps between checkpoints; the last step is always saved."""
  keep: int = 2
  """How many are kept."""

  def check(self) -> dict[str, str]:
    return {key: "must be at least 1" for key in ("every", "keep") if getattr(self, key) < 1}


class Checkpoints:
  """The checkpoints of a run, saved in the background; a context manager that waits for the last one."""

  def __init__(self, config: CheckpointConfig, workdir: epath.Path):
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax reports every file; its errors reach us as exceptions.
    self._folder = workdir / "checkpoints"
    options = ocp.CheckpointManagerOptions(max_to_keep=config.keep, save_interval_steps=config.every)
    self._manager = ocp.CheckpointManager(self._folder, options=options)

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    try:
      self._manager.close()
    except Exception as late:
      # A save in the background failed; where another error is already on its way, that one is told.
      if kind is None:
        raise self._failed("the last checkpoint", late) from late

  def save(self, step: int, state: TrainState, config_hash: str, last: bool) -> None:
    """Saves if `step` is due or the last one; returns before the files are written.

    Raises:
      UserError: the disk is full or the folder cannot be written. Checkpoints that were complete stay so.
    """
    host = {"config": config_hash}
    args = ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()), host=ocp.args.JsonSave(host))
    try:
      self._manager.save(step, args=args, force=last and self._manager.latest_step() != step)
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

  def restore(self, abstract: TrainState, config_hash: str) -> tuple[int, TrainState] | None:
    """The newest readable checkpoint as (step, state), or None where there is none.

    A damaged checkpoint is reported and put aside, and the one before it is taken.

    Args:
      abstract: shapes, dtypes and shardings wanted, which may belong to another mesh than the one that saved.

    Raises:
      UserError: there are checkpoints, but none is readable, or they belong to another run.
    """
    damaged: dict[int, str] = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract._asdict()), host=ocp.args.JsonRestore())
      try:
        restored = self._manager.restore(step, args=args)
        state, saved_by = TrainState(**restored.state), restored.host["config"]
      except Exception as error:  # Damage shows as any of a dozen types.
        damaged[step] = _reason(error)
        continue
      if saved_by != config_hash:
        raise UserError(f"{self._folder / str(step)} was saved by a run with other settings; choose another --workdir")
      self._put_aside(damaged)
      return step, state
    if damaged:
      raise UserError(
        f"no checkpoint in {self._folder} is readable ({damaged[max(damaged)]}); choose another --workdir, or move that"
        " folder away to begin again"
      )
    return None

  def _put_aside(self, damaged: dict[int, str]) -> None:
    """Moves damaged checkpoints out of the way; while they stand there, Orbax refuses to save those steps again."""
    for step, reason in damaged.items():
      names = (
        self._folder.parent / f"damaged_checkpoint_{step}{suffix}" for suffix in ("", *map("_{}".format, range(99)))
      )
      place = next(name for name in names if not name.exists())
      (self._folder / str(step)).rename(place)
      print(f"warning: checkpoint {step} is damaged ({reason}); moved to {place}", file=sys.stderr)
    if damaged:
      self._manager.reload()


def _reason(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
