"""The record of one completion, and the JSONL shards that hold a run's records."""

import dataclasses
import json
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


def write_trajectories(folder: epath.Path, step: int, process: int, trajectories: Iterable[Trajectory]) -> None:
  """Writes the shard of one step and process; a shard that an interrupted run left behind is replaced whole."""
  folder.mkdir(parents=True, exist_ok=True)
  name = f"step_{step:06d}{f'_{process}' if process else ''}.jsonl"
  write_whole(folder / name, "".join(json.dumps(dataclasses.asdict(t)) + "\n" for t in trajectories))


def forget_trajectories(folder: epath.Path, done: int) -> None:
  """Removes the shards of steps after `done`, which will be written anew, perhaps by fewer processes."""
  for path in folder.glob("step_*.jsonl"):
    if int(path.stem.split("_")[1]) > done:
      path.unlink()


def read_trajectories(folder: epath.Path, step: int) -> Iterator[Trajectory]:
  others = folder.glob(f"step_{step:06d}_*.jsonl")
  for path in (folder / f"step_{step:06d}.jsonl", *sorted(others, key=lambda path: int(path.stem.split("_")[2]))):
    for line in path.read_text().splitlines():
      yield Trajectory(**json.loads(line))
