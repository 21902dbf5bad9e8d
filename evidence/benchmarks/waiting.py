"""What slow environments cost: the engine's schedule with turns that wait for their environments.

    python -m evidence.benchmarks.waiting

64 episodes of four turns, whose lengths are geometric, at environments that take from 0.1 to 5 s
each time, against the same episodes at environments that take no time. The schedule is the shipped
one, and the clock is virtual: a token of R rows takes 0.7 + 0.16 R ms (a line through two earlier
measurements of the policy of `evidence/benchmarks/peers.py` on one core), and reading prompts
nothing. So a busy machine changes nothing.

E episodes, N turns.
"""

import heapq
from typing import NamedTuple

import numpy as np

from dca_jax.rollout.schedule import Returning

CHUNK = 32


def seconds_of(rows: int) -> float:
  """That a token of so many rows takes."""
  return (0.7 + 0.16 * rows) / 1000


class Played(NamedTuple):
  """What became of a batch of episodes."""

  use: float
  """Share of the row-steps that made a token of an episode."""
  work: float
  """Seconds of decoding."""
  wall: float
  """Seconds until the last episode has ended."""


def play(lengths_ExN: np.ndarray, waits_ExN: np.ndarray, rows: int) -> Played:
  """Plays episodes whose turns have these lengths, with these waits, in seconds, between them."""
  episodes, turns = lengths_ExN.shape
  most = int(lengths_ExN.max()) + 1
  places = [(e, 0) for e in range(episodes)]  # By sample, its episode and turn.
  plan = Returning(np.full(episodes, most), rows, 1, most)
  away: list[tuple[float, int, int]] = []
  wall = work = 0.0
  made = spent = 0
  while plan.live_R.any():
    lengths_R = np.array([lengths_ExN[places[sample]] for sample in plan.sample_R])
    n, live_R, last = 0, plan.live_R, min(plan.room, CHUNK)
    while n < last and live_R.sum() > plan.enough:
      n, made = n + 1, made + int(live_R.sum())
      live_R = live_R & (plan.lengths_R + n < lengths_R)
    spent += n * len(live_R)
    work, wall = (x + n * seconds_of(len(live_R)) for x in (work, wall))
    for e, turn in (places[plan.sample_R[r]] for r in np.flatnonzero(plan.live_R & ~live_R)):
      if turn + 1 < turns:
        heapq.heappush(away, (wall + waits_ExN[e, turn], e, turn + 1))
    plan.lengths_R = plan.lengths_R + n * plan.live_R
    plan.sample_R[~live_R] = -1
    if away and not live_R.any() and not plan.waiting:
      wall = max(wall, away[0][0])
    while away and away[0][0] <= wall:
      places.append(heapq.heappop(away)[1:])
      plan.add(np.array([most]))
    plan.expected = len(away)
    while problems := plan.entering():
      plan.place(problems)
    if plan.fewer() is not None or not plan.room:
      plan.ring = plan.ring_needed()
  return Played(made / spent, work, wall)


def drawn(seed: int, mean: int) -> tuple[np.ndarray, np.ndarray]:
  """Lengths of turns, and what environments take."""
  rng = np.random.default_rng(seed)
  return np.minimum(rng.geometric(1 / mean, (64, 4)), 8 * mean), rng.uniform(0.1, 5, (64, 4))


def main() -> None:
  print("tokens  rows  use: free  slow  ratio  work: free  slow  wall: slow  bound")
  for mean, rows in ((16, 64), (64, 64), (256, 64), (256, 16), (1024, 64), (1024, 16)):
    found = []
    for seed in range(3):
      lengths, waits = drawn(seed, mean)
      free, slow = (play(lengths, x, rows) for x in (0 * waits, waits))
      chain = (lengths.sum(1) * seconds_of(1) + waits[:, :-1].sum(1)).max()
      uses = free.use, slow.use, slow.use / free.use
      found.append((*uses, free.work, slow.work, slow.wall, max(chain, free.work)))
    *uses, free, slow, wall, bound = np.mean(found, 0)
    print(f"{mean:6} {rows:5} " + " ".join(f"{x:8.2f}" for x in (*uses, free, slow, wall, bound)))


if __name__ == "__main__":
  main()
