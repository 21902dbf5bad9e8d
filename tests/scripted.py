"""An engine that writes what it is told to, for tests of what is made of samples."""

from collections.abc import Callable, Iterator

import numpy as np

from dca_jax.rollout import Sample, Wanted


class Scripted:
  """Stands where the engine does. `write` says the tokens of a sample, from its prompt's row in
  what is wanted and from its number; `order` in which order its rows end."""

  def __init__(self, write: Callable[[Wanted, int, int], list[int]], ends=()):
    self.write, self.ends, self.order = write, ends, reversed
    self.wanted: list[Wanted] = []

  def stream(self, params, wanted, noise, further=None) -> Iterator[Sample]:
    first = 0
    while wanted:
      for sample in self.samples(wanted):
        yield sample._replace(row=first + sample.row)
      first += wanted.numbers_PxG.size
      wanted = further.take(wait=True) if further else None

  def samples(self, wanted) -> Iterator[Sample]:
    self.wanted.append(wanted)
    group = wanted.numbers_PxG.shape[1]
    # The last first: nobody may count on an order.
    for row in self.order(range(wanted.numbers_PxG.size)):
      p, g = divmod(row, group)
      tokens = np.array(self.write(wanted, p, int(wanted.numbers_PxG[p, g])), np.int32)
      room = int(wanted.limits_P[p])
      truncated = len(tokens) > room or not (not self.ends or int(tokens[-1]) in self.ends)
      tokens = tokens[:room]
      yield Sample(row, tokens, np.zeros(len(tokens), np.float32), truncated)
