"""The JSONL shards that hold a run's episodes."""

import json
import re
import sys
from collections.abc import Iterable, Iterator

from etils import epath
from pydantic import BaseModel, ConfigDict, ValidationError

from dca_jax.episode import Episode
from dca_jax.review.replies import mistake
from dca_jax.store.workdir import write_whole


class _Step(BaseModel):
  start: int
  end: int
  text: str
  role: str | None = None
  weight: float | None = None
  reason: str | None = None
  value: float | None = None
  before: list[float] | None = None
  after: list[float] | None = None
  common: int | None = None


class _Rewrite(BaseModel):
  tokens: list[int]
  start: int
  forced: int
  text: str
  before: list[float]
  after: list[float]


class _Line(BaseModel):
  """What a line must hold; see `Episode.to_json`."""

  model_config = ConfigDict(strict=True, extra="forbid")

  id: str
  problem: int
  prompt: str
  answer: str
  tokens: list[int]
  given: list[tuple[int, int, str]]
  steps: list[_Step]
  reward: float
  correct: bool
  truncated: bool
  judged: bool
  parts: dict[str, float]
  progress: list[float | None]
  review: str
  model: str
  trained: bool
  age: int = 0  # What was written before there was such a thing has none.
  advantage: float
  credit: list[float]
  seed: int | None = None
  rewrite: _Rewrite | None = None


def write_trajectories(
  folder: epath.Path, step: int, process: int, episodes: Iterable[Episode]
) -> None:
  """Writes the shard of one step and process; a shard that an interrupted run left behind is
  replaced whole."""
  folder.mkdir(parents=True, exist_ok=True)
  name = f"step_{step:06d}{f'_{process}' if process else ''}.jsonl"
  write_whole(folder / name, "".join(json.dumps(e.to_json()) + "\n" for e in episodes))


def shards(folder: epath.Path) -> dict[int, list[epath.Path]]:
  """The files of each step, in order."""
  found: dict[int, dict[int, epath.Path]] = {}
  for path in folder.glob("step_*.jsonl") if folder.is_dir() else ():
    if match := _SHARD.fullmatch(path.name):
      found.setdefault(int(match[1]), {})[int(match[2] or 0)] = path
  return {step: [own[process] for process in sorted(own)] for step, own in sorted(found.items())}


_SHARD = re.compile(r"step_(\d+)(?:_(\d+))?\.jsonl", re.ASCII)


def forget_trajectories(folder: epath.Path, done: int) -> None:
  """Removes the shards of steps after `done`, which will be written again, perhaps by fewer
  processes."""
  for step, paths in shards(folder).items():
    for path in paths if step > done else ():
      path.unlink()


def read_trajectories(folder: epath.Path, step: int) -> Iterator[Episode]:
  """What is kept of a step; a line that cannot be read is left out with a warning, one for each
  file."""
  for path in shards(folder).get(step, []):
    damaged: list[str] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
      try:
        yield parsed(line)
      except (ValueError, RecursionError) as error:
        damaged.append(f"line {number} is damaged ({error}) and left out")
    if damaged:
      more = f"; so are {len(damaged) - 1} more" if damaged[1:] else ""
      print(f"warning: {path}, {damaged[0]}{more}", file=sys.stderr)


def parsed(line: bytes) -> Episode:
  """The episode of a line; ValueError where it holds none, or one of another version."""
  try:
    kept = _Line.model_validate_json(line)
  except ValidationError as error:
    raise ValueError(mistake(error)) from None
  if wrong := [s for s in kept.steps if not 0 <= s.start <= s.end <= len(kept.credit)]:
    raise ValueError(f"a step is from {wrong[0].start} to {wrong[0].end}")
  if any((s.role is None) != (s.weight is None) for s in kept.steps):
    raise ValueError("a step has a role without a weight, or a weight without a role")
  return Episode.from_json(kept.model_dump(exclude_none=True))
