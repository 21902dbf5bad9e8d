"""The settings of a run in its workdir: written, read again, and compared with those of today."""

import json
import sys
from typing import Any

from etils import epath

from dca_jax.config.levels import build
from dca_jax.config.tree import Config, ConfigError, flatten, is_free
from dca_jax.doors import located
from dca_jax.store import hold
from dca_jax.store.workdir import is_remote, locate, write_whole


def claim_workdir(config: Config, workdir: str, resume: str = "auto") -> epath.Path:
  """Makes `workdir` the home of this run, or checks that it already is.

  A config.json that is damaged or gone is written again where there are checkpoints, which know
  their settings too.

  Raises:
    ConfigError: it holds a run, and `resume` is `never`; or a run with other settings or more
      steps, or files that are no run; or it cannot be reached.
  """
  folder = locate(workdir)
  try:
    wrong = _other_run(config, folder, resume)
    if not wrong:
      folder.mkdir(parents=True, exist_ok=True)
      write_whole(folder / "config.json", config.to_json())
  except ConfigError:
    raise
  except Exception as error:  # A bucket's client reports with types of its own.
    if not is_remote(folder):
      raise
    reason = f"{type(error).__name__}: {str(error)[:200]}"
    hint = "is there such a bucket, and are you signed in?"
    raise ConfigError(f"--workdir={workdir} cannot be written ({reason}); {hint}") from error
  if wrong:
    raise ConfigError(f"--workdir={workdir} {wrong}")
  return folder


def _other_run(config: Config, folder: epath.Path, resume: str) -> str:
  """Why the run of `config` cannot go on in `folder`, or begin there; empty if it can."""
  saved = folder / "config.json"
  steps = [int(name) for name in _names(folder / "checkpoints") if name.isdigit()]
  done = max(steps, default=0)
  elsewhere = "; choose another --workdir"
  if not saved.exists():
    if not done:
      strange = _names(folder) - {".config.json", hold.NAME}
      return f"holds files but no config.json, so no run{elsewhere}" if strange else ""
    print(f"warning: {saved} is gone; it is written anew", file=sys.stderr)
  elif resume == "never":
    return f"already holds a run, and --resume is never{elsewhere}"
  else:
    try:
      changes = difference(config, json.dumps(_read_json(saved)))
      if not any((folder / name).exists() for name in ("start", "checkpoints", "metrics.jsonl")):
        # A reviewer that could not be reached ended it before it began.
        changes = [change for change in changes if not change.startswith("reviewer.")]
      if changes:
        return f"holds a different run: {changes[0]}{elsewhere}"
    except ConfigError as error:
      if not done:
        raise ConfigError(f"{str(error).split(';')[0]}, and no step is saved{elsewhere}") from None
      print(f"warning: {str(error).split(';')[0]}; it is written anew", file=sys.stderr)
  if (last := int(resume) if resume.isdigit() else done) > config.steps:
    asked = f"more than steps={config.steps}; give as many, or another --workdir"
    return f"holds {last} steps already, {asked}"
  return ""


def _names(folder: epath.Path) -> set[str]:
  return {path.name for path in folder.iterdir()} if folder.exists() else set()


def difference(ours: Config, saved: str) -> list[str]:
  """The keys in which `ours` differs from a saved config.json though a resumed run may not change
  them."""
  mine, theirs = flatten(json.loads(ours.to_json())), flatten(json.loads(saved))
  changes = []
  for key in {**theirs, **mine}:
    if key not in mine or key not in theirs:
      what = f"new ({mine[key]!r} here)" if key in mine else "not known"
      changes.append(f"{key} is {what} in this version of dca-jax")
    elif mine[key] not in (theirs[key], located(theirs[key])):
      changes.append(f"{key} was {theirs[key]!r} and is now {mine[key]!r}")
  return [change for change in changes if not is_free(change.split()[0], ours)]


def saved_config(workdir: str) -> Config:
  """The Config of a run.

  Raises:
    ConfigError: there is no run, or its config.json is damaged or of another version.
  """
  saved = read_saved(workdir)
  try:
    return build(saved)
  except ConfigError as error:
    path = locate(workdir) / "config.json"
    # What has a cause is in a module of the user's.
    wrong = ": " if error.__cause__ else " is not of this version of dca-jax: "
    raise ConfigError(f"{path}{wrong}{error}") from error.__cause__


def read_saved(workdir: str) -> dict[str, Any]:
  """What the config.json of a run says, section by section; another version may have written it.

  Raises:
    ConfigError: there is no run, or the file is damaged.
  """
  path = locate(workdir) / "config.json"
  if not path.exists():
    raise ConfigError(f"--workdir={workdir} holds no run{_but_below(path.parent)}")
  return _read_json(path)


_FEW = 4
"""Runs that are named where one is meant."""


def _but_below(folder: epath.Path) -> str:
  """Which runs there are in subfolders, as `dca-jax compare` makes them; empty where none is. A
  bucket is not searched."""
  if is_remote(folder):
    return ""
  saved = (path for depth in ("*", "*/*") for path in folder.glob(f"{depth}/config.json"))
  # A model's folder has a config.json too.
  runs = sorted(
    path.parent.relative_to(folder).as_posix()
    for path in saved
    if any((path.parent / name).exists() for name in ("start", "checkpoints", "metrics.jsonl"))
  )
  if not runs:
    return ""
  more = f" and {len(runs) - _FEW} more" if len(runs) > _FEW else ""
  do = "does; name it" if len(runs) == 1 else "do; name one of them"
  return f" itself, but {', '.join(runs[:_FEW])}{more} {do}"


def _read_json(path: epath.Path) -> dict[str, Any]:
  try:
    saved = json.loads(path.read_bytes().decode())
    if not isinstance(saved, dict):
      raise ValueError("no settings in it")
  except (ValueError, RecursionError) as error:
    line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
    hint = "the command that began the run writes it anew"
    raise ConfigError(f"{path}{line} is damaged ({getattr(error, 'msg', error)}); {hint}") from None
  return saved
