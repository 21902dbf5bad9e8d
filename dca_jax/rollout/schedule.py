"""What the engine does next: which row has which sample, how many rows and how much cache there
are.

It knows lengths and stops alone, nothing of time, so a run that goes on repeats it.
"""

import itertools
from collections.abc import Sequence

import numpy as np

RING = 64
"""Tokens in the smallest ring. A batch that it suffices for is decoded by one program."""
FEWEST = 4
"""Rows that a batch is not made smaller than: with fewer, a token hardly costs less."""
WORTH = 32
"""Tokens that must be to come before rows are laid anew."""


def ladder(rows: int, step: int) -> list[int]:
  """Numbers of rows that a batch may have, each two thirds or three quarters of the one before it,
  and twice as many of them at first, where most of the work is; all but the first are multiples of
  `step`."""
  fewest = max(FEWEST, rows // 32, step)
  out = [rows]
  while out[-1] > fewest:
    power = 2 ** (out[-1].bit_length() - 1)
    less = power if out[-1] > power else power * 3 // 4
    out.append(max(fewest, less // step * step))
  between = [(more + less) // 2 // step * step for more, less in itertools.pairwise(out[:3])]
  return sorted({*out, *between}, reverse=True)


def ring_sizes(most: int) -> list[int]:
  """Sizes that a ring may have, the last of `most` tokens; closer to each other where reading takes
  most of the time."""
  sizes = [RING]
  while (size := sizes[-1]) < most:
    power = 2 ** (size.bit_length() - 1)
    sizes.append(2 * power if size > power or size < 4 * RING else 3 * power // 2)
  return [size for size in sizes if size < most] + [most]


class Schedule:
  """Rows and what they work on.

  Problems enter together in batches of a quarter of the rows, so that one program serves them.
  """

  def __init__(
    self,
    limits_P: np.ndarray,
    group: int,
    rows: int,
    step: int,
    most: int,
    expected: int | None = None,
  ):
    """Rows for as many of the problems as fit in `rows`, a multiple of `step` of them.

    Args:
      most: tokens in the longest sample.
      expected: problems that may still come, one for each that ends; None where none does.
    """
    self._limits_P, self.group, self.expected = limits_P, group, expected or 0
    self._comes_back = expected is not None
    problems = len(limits_P) + self.expected
    self.at_once = -(-min(problems, max(1, rows // group)) // step) * step
    """Problems that begin together."""
    self.batch = max(step, self.at_once // 4 // step * step)
    """Problems that enter together later."""
    self.sample_R = np.arange(self.at_once * group)
    """The sample that each row works on; -1 where it is free."""
    self.sample_R[self.sample_R >= len(limits_P) * group] = -1
    self.lengths_R = np.zeros(len(self.sample_R), np.int32)
    self.waiting = list(range(self.at_once, len(limits_P)))
    self._rings = ring_sizes(most)
    self.ring = self._rings[0]
    several = len(self._rings) > 1
    self._ladder = ladder(len(self.sample_R), step) if several else [len(self.sample_R)]

  def add(self, limits_P: np.ndarray) -> None:
    """Problems that came later."""
    first = len(self._limits_P)
    self._limits_P = np.concatenate([self._limits_P, limits_P])
    self.waiting += range(first, len(self._limits_P))

  def take_up(self, lengths_PxG: np.ndarray, ended_PxG: np.ndarray) -> None:
    """How long samples are before decoding begins, and which of them are not wanted any more."""
    live_R, samples = self.live_R, np.maximum(self.sample_R, 0)
    self.lengths_R = np.where(live_R, lengths_PxG.reshape(-1)[samples], 0)
    self.sample_R[live_R & ended_PxG.reshape(-1)[samples]] = -1
    self.ring = self.ring_needed()

  @property
  def live_R(self) -> np.ndarray:
    return self.sample_R >= 0

  @property
  def room(self) -> int:
    """Tokens until the longest row needs a larger ring."""
    return self.ring - int(self.lengths_R[self.live_R].max(initial=0))

  @property
  def enough(self) -> int:
    """As soon as no more rows are live, there is something to do."""
    rows = len(self.sample_R)
    if self._comes_back:
      return max(0, int(self.live_R.sum()) - self.batch)
    if self.waiting:
      return rows - self.batch * self.group
    below = [n for n in self._ladder if n < self.live_R.sum()]
    return max(below, default=0) if self._worth else 0

  @property
  def _worth(self) -> bool:
    limits_R = np.where(self.live_R, self._limits_P[self.sample_R // self.group], 0)
    return int((limits_R - self.lengths_R).max(initial=0)) >= WORTH

  def entering(self) -> list[int]:
    """Problems that enter now; none where there is no room or none waits."""
    free = int((~self.live_R).sum()) // self.group
    if free < self.batch and not self._comes_back:
      return []
    count = min(free, self.batch)
    now, self.waiting = self.waiting[:count], self.waiting[count:]
    return now

  def place(self, problems: Sequence[int]) -> np.ndarray:
    """Gives free rows to the samples of `problems`; returns them, filled up to a batch with rows
    that there are not."""
    samples = (np.array(problems)[:, None] * self.group + np.arange(self.group)).reshape(-1)
    rows = np.flatnonzero(~self.live_R)[: len(samples)]
    self.sample_R[rows], self.lengths_R[rows] = samples, 0
    missing = self.batch * self.group - len(rows)
    return np.pad(rows, (0, missing), constant_values=len(self.sample_R))

  def fewer(self) -> np.ndarray | None:
    """The rows to go on with, where fewer suffice."""
    if self.waiting or not self._worth:
      return None
    needed = int(self.live_R.sum()) + self.expected
    n = min((n for n in self._ladder if n >= needed), default=len(self.sample_R))
    if n >= len(self.sample_R):
      return None
    rows = np.sort(np.argsort(~self.live_R, kind="stable")[:n])
    self.sample_R, self.lengths_R = self.sample_R[rows], self.lengths_R[rows]
    return rows

  def ring_needed(self) -> int:
    """The size of the smallest ring that has room for the next token of the longest row."""
    longest = int(self.lengths_R[self.live_R].max(initial=0))
    return min(size for size in self._rings if size > longest)
