"""The record of one completion, and the JSONL shards that hold a run's records."""

import dataclasses
import json
import re
import sys
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from dca_jax.workdir import write_whole


@dataclasses.dataclass(frozen=True)
class Trajectory:
  """Everything that happened to one completion in one training step."""

  id: str
  """`step/problem/sample`."""
  problem: int
  prompt: str
  answer: str
  tokens: list[int]
  steps: list[dict[str, Any]]
  """For each step `start` and `end` (token span), `text`, and, where it was given, `role`, `weight`, and the `value` of
  the prefix before it."""
  reward: float
  correct: bool
  truncated: bool
  review: str
  """The review's status."""
  model: str
  """The version of the model that reviewed, if one did."""
  trained: bool
  advantage: float
  """The completion's own, before credit moved it."""
  credit: list[float]
  """Token advantages."""
  judged: bool = True
  parts: dict[str, float] = dataclasses.field(default_factory=dict)
  """See `Outcome`."""


def write_trajectories(folder: epath.Path, step: int, process: int, trajectories: Iterable[Trajectory]) -> None:
  """Writes the shard of one step and process; a shard that an interrupted run left behind is replaced whole."""
  folder.mkdir(parents=True, exist_ok=True)
  name = f"step_{step:06d}{f'_{process}' if process else ''}.jsonl"
  write_whole(folder / name, "".join(json.dumps(dataclasses.asdict(t)) + "\n" for t in trajectories))


def shards(folder: epath.Path) -> dict[int, list[epath.Path]]:
  """The files of each step, in order."""
  found: dict[int, dict[int, epath.Path]] = {}
  for path in folder.glob("step_*.jsonl") if folder.is_dir() else ():
    if match := _SHARD.fullmatch(path.name):
      found.setdefault(int(match[1]), {})[int(match[2] or 0)] = path
  return {step: [own[process] for process in sorted(own)] for step, own in sorted(found.items())}


def forget_trajectories(folder: epath.Path, done: int) -> None:
  """Removes the shards of steps after `done`, which will be written anew, perhaps by fewer processes."""
  for step, paths in shards(folder).items():
    for path in paths if step > done else ():
      path.unlink()


def read_trajectories(folder: epath.Path, step: int) -> Iterator[Trajectory]:
  """What is kept of a step; lines that cannot be read are left out, with one warning for each file."""
  for path in shards(folder).get(step, []):
    damaged: list[str] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
      try:
        yield _parsed(json.loads(line.decode()))
      except (ValueError, RecursionError) as error:
        damaged.append(f"line {number} is damaged ({error}) and left out")
    if damaged:
      more = f"; so are {len(damaged) - 1} more" if damaged[1:] else ""
      print(f"warning: {path}, {damaged[0]}{more}", file=sys.stderr)


def _parsed(given: Any) -> Trajectory:
  """The record that a line holds.

  Raises:
    ValueError: it is none, or that of another version.
  """
  if not isinstance(given, dict):
    raise ValueError("no record")
  fields = {field.name: field.type for field in dataclasses.fields(Trajectory)}
  if lacking := [key for key in fields if key not in given]:
    raise ValueError(f"{lacking[0]} is not in it")
  if unknown := [key for key in given if key not in fields]:
    raise ValueError(f"{unknown[0]} is not known to this version")
  if wrong := [key for key, value in given.items() if not isinstance(value, _kind(fields[key]))]:
    raise ValueError(f"{wrong[0]} is {given[wrong[0]]!r:.40}")
  if not all(isinstance(x, int | float) for x in given["credit"]):
    raise ValueError("credit is no list of numbers")
  if wrong := [step for step in given["steps"] if not _is_step(step, len(given["credit"]))]:
    raise ValueError(f"a step is {wrong[0]!r:.40}")
  return Trajectory(**given)


def _is_step(step: Any, length: int) -> bool:
  if not isinstance(step, dict) or {type(step.get(key)) for key in ("start", "end")} != {int}:
    return False
  said = isinstance(step.get("text"), str) and isinstance(step.get("role", ""), str)
  return said and 0 <= step["start"] <= step["end"] <= length


def _kind(annotation):
  """What `isinstance` can ask of a field."""
  return int | float if annotation is float else typing.get_origin(annotation) or annotation


_SHARD = re.compile(r"step_(\d+)(?:_(\d+))?\.jsonl", re.ASCII)
