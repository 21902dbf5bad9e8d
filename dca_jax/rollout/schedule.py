"""What the engine does next: which row has which sample, how many rows and how much cache there
are.

It knows lengths and stops alone, nothing of time, so a run that goes on repeats it.
"""

from collections.abc import Sequence

import numpy as np

RING = 64
"""Tokens in the smallest ring. A batch that it suffices for is decoded by one program."""
FEWEST = 4
"""Rows that a batch is not made smaller than: with fewer, a token hardly costs less."""
WORTH = 32
"""Tokens that must be to come before rows are laid anew."""


def ladder(rows: int, step: int) -> list[int]:
  """Numbers of rows that a batch may have, each two thirds or three quarters of the one before it;
  all but the first are multiples of `step`."""
  fewest = max(FEWEST, step)
  out = [rows]
  while out[-1] > fewest:
    power = 2 ** (out[-1].bit_length() - 1)
    less = power if out[-1] > power else power * 3 // 4
    out.append(max(fewest, less // step * step))
  return out


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

  def __init__(self, limits_P: np.ndarray, group: int, rows: int, step: int):
    """Rows for as many of the problems as fit in `rows`, a multiple of `step` of them."""
    self._limits_P, self._group = limits_P, group
    problems = len(limits_P)
    self.at_once = -(-min(problems, max(1, rows // group)) // step) * step
    """Problems that begin together."""
    self.batch = max(step, self.at_once // 4 // step * step)
    """Problems that enter together later."""
    self.sample_R = np.arange(self.at_once * group)
    """The sample that each row works on; -1 where it is free."""
    self.sample_R[self.sample_R >= problems * group] = -1
    self.lengths_R = np.zeros(len(self.sample_R), np.int32)
    self._waiting = list(range(self.at_once, problems))
    self._rings = ring_sizes(int(limits_P.max()))
    self.ring = self._rings[0]
    several = len(self._rings) > 1
    self._ladder = ladder(len(self.sample_R), step) if several else [len(self.sample_R)]

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
    if self._waiting:
      return rows - self.batch * self._group
    below = [n for n in self._ladder if n < self.live_R.sum()]
    return max(below, default=0) if self._worth else 0

  @property
  def _worth(self) -> bool:
    limits_R = np.where(self.live_R, self._limits_P[self.sample_R // self._group], 0)
    return int((limits_R - self.lengths_R).max(initial=0)) >= WORTH

  def entering(self) -> list[int]:
    """Problems that enter now; none where there is no room or none waits."""
    if (~self.live_R).sum() < self.batch * self._group:
      return []
    now, self._waiting = self._waiting[: self.batch], self._waiting[self.batch :]
    return now

  def place(self, problems: Sequence[int]) -> np.ndarray:
    """Gives free rows to the samples of `problems`, filled up to a batch; returns the rows."""
    rows = np.flatnonzero(~self.live_R)[: self.batch * self._group]
    samples = (np.array(problems)[:, None] * self._group + np.arange(self._group)).reshape(-1)
    self.sample_R[rows] = np.pad(samples, (0, len(rows) - len(samples)), constant_values=-1)
    self.lengths_R[rows] = 0
    return rows

  def fewer(self) -> np.ndarray | None:
    """The rows to go on with, where fewer suffice."""
    if self._waiting or not self._worth:
      return None
    n = min(n for n in self._ladder if n >= self.live_R.sum())
    if n == len(self.sample_R):
      return None
    rows = np.sort(np.argsort(~self.live_R, kind="stable")[:n])
    self.sample_R, self.lengths_R = self.sample_R[rows], self.lengths_R[rows]
    return rows

  def ring_needed(self) -> int:
    """The size of the smallest ring that has room for the next token of the longest row."""
    longest = int(self.lengths_R[self.live_R].max(initial=0))
    return min(size for size in self._rings if size > longest)
