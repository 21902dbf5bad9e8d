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
  ):
    """Rows for as many of the problems as fit in `rows`, a multiple of `step` of them.

    Args:
      most: tokens in the longest sample.
    """
    self._limits_P, self.group = limits_P, group
    self.at_once = -(-min(len(limits_P), max(1, rows // group)) // step) * step
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
    if self.waiting:
      return len(self.sample_R) - self.batch * self.group
    below = [n for n in self._ladder if n < self.live_R.sum()]
    return max(below, default=0) if self._worth else 0

  @property
  def _worth(self) -> bool:
    limits_R = np.where(self.live_R, self._limits_P[self.sample_R // self.group], 0)
    return int((limits_R - self.lengths_R).max(initial=0)) >= WORTH

  def entering(self) -> list[int]:
    """Problems that enter now; none where there is no room or none waits."""
    free = int((~self.live_R).sum()) // self.group
    return self._next(self.batch) if free >= self.batch else []

  def _next(self, count: int) -> list[int]:
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
    needed = int(self.live_R.sum())
    n = min((n for n in self._ladder if n >= needed), default=len(self.sample_R))
    return self._kept(n) if n < len(self.sample_R) else None

  def _kept(self, n: int) -> np.ndarray:
    """So many rows, the live ones among them."""
    rows = np.sort(np.argsort(~self.live_R, kind="stable")[:n])
    self.sample_R, self.lengths_R = self.sample_R[rows], self.lengths_R[rows]
    return rows

  def ring_needed(self) -> int:
    """The size of the smallest ring that has room for the next token of the longest row."""
    longest = int(self.lengths_R[self.live_R].max(initial=0))
    return min(size for size in self._rings if size > longest)


class Returning(Schedule):
  """Rows for episodes that come back: what has ended waits for its environment, without a row, and
  then takes any that is free.

  There are rows for what is ready, and hardly any others.
  """

  def __init__(self, limits_P: np.ndarray, rows: int, step: int, most: int):
    """As for a `Schedule`, in groups of one."""
    super().__init__(limits_P, 1, rows, step, most)
    whole = -(-rows // step) * step
    # Now and then there are one or two for long.
    self._ladder = [*ladder(whole, step), *(n for n in (2, 1) if n % step == 0)]
    self._batches = sorted(max(step, n // step * step) for n in (FEWEST, whole // 4))
    self.expected = 0
    """Problems that are at their environments."""
    self._more(self._ladder[::4])  # So that further answers take few programs.
    self.at_once = len(self.sample_R)

  def add(self, limits_P: np.ndarray) -> None:
    """Problems that have come."""
    first = len(self._limits_P)
    self._limits_P = np.concatenate([self._limits_P, limits_P])
    self.waiting += range(first, len(self._limits_P))

  @property
  def enough(self) -> int:
    live = int(self.live_R.sum())
    return live - max(1, live // 4)  # The environments of the others can begin.

  def entering(self) -> list[int]:
    self._more(self._ladder)
    free = int((~self.live_R).sum())
    count = min(free, len(self.waiting))
    self.batch = next((n for n in self._batches if n >= count), self._batches[-1])
    return self._next(min(count, self.batch))

  def _more(self, sizes: Sequence[int]) -> None:
    """Adds rows where those that are free do not suffice."""
    needed = int(self.live_R.sum()) + len(self.waiting)
    n = min((n for n in sizes if n >= needed), default=sizes[0])
    added = max(0, n - len(self.sample_R))
    self.sample_R = np.pad(self.sample_R, (0, added), constant_values=-1)
    self.lengths_R = np.pad(self.lengths_R, (0, added))

  def fewer(self) -> np.ndarray | None:
    live, short = int(self.live_R.sum()), len(self._rings) == 1 and not self.expected
    n = min(n for n in self._ladder if n >= live)
    stays = self.waiting or short or not live or n >= len(self.sample_R)
    return None if stays else self._kept(n)
