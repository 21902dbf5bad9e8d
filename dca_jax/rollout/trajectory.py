"""The record of one completion, and the JSONL shards that hold a run's records."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath


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


def write_trajectories(folder: epath.Path, step: int, trajectories: Iterable[Trajectory]) -> None:
  """Writes the shard of one step; a shard that an interrupted run left behind is replaced whole."""
  folder.mkdir(parents=True, exist_ok=True)
  partial = folder / f".step_{step:06d}.jsonl"
  partial.write_text("".join(json.dumps(dataclasses.asdict(t)) + "\n" for t in trajectories))
  partial.replace(folder / f"step_{step:06d}.jsonl")


def read_trajectories(folder: epath.Path, step: int) -> Iterator[Trajectory]:
  for line in (folder / f"step_{step:06d}.jsonl").read_text().splitlines():
    yield Trajectory(**json.loads(line))
