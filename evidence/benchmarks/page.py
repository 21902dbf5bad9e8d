"""How long the index of a run's page takes, on a made run of many episodes, in seconds of a core.

python evidence/benchmarks/page.py --episodes=200000
"""

import argparse
import pathlib
import random
import tempfile
import time

import numpy as np
from etils import epath

from dca_jax.episode import ROLES, Episode, Outcome, Problem, Review, Segment, Step
from dca_jax.store.index import Index
from dca_jax.store.trajectories import write_trajectories

WANTED: tuple[dict[str, str], ...] = (
  {},
  {"outcome": "right"},
  {"review": "skipped"},
  {"role": "error"},
  {"problem": "+3"},
  {"least": "39"},
)


def episode(step: int, problem: int, sample: int, rng: random.Random) -> Episode:
  """One of the quickstart's size: 13 steps of 3 tokens."""
  right, n = rng.random() < 0.5, 13
  roles = tuple(rng.choice(ROLES) for _ in range(n))
  tokens = np.array([rng.randrange(30) for _ in range(3 * n)], np.int32)
  prompt = f"+{rng.randrange(10)}a*2b-4c+1d+5e*6f-7g+8h-9i*0j+1k-2l?cm7n3; {problem}"
  return Episode(
    f"{step}/{problem}/{sample}",
    Problem(problem, prompt, "6"),
    (Segment(tokens, True, np.zeros(3 * n, np.float32)),),
    Outcome(float(right), right, False),
    tuple(Step(3 * k, 3 * k + 3, f"{rng.choice('abc')}{k % 10};") for k in range(n)),
    review=Review("ok", roles, (1.0,) * n) if rng.random() < 0.8 else Review("skipped"),
    values=[0.5] * n,
    advantage=rng.uniform(-1, 1),
    credit=[rng.uniform(-1, 1) for _ in range(3 * n)],
  )


def write(folder: epath.Path, episodes: int) -> None:
  """Batches of 16 problems with 8 answers each."""
  rng = random.Random(0)
  for step in range(1, episodes // 128 + 1):
    own = [episode(step, 16 * step + i // 8, i % 8, rng) for i in range(128)]
    write_trajectories(folder, step, 0, own)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--episodes", type=int, default=200_000)
  episodes = parser.parse_args().episodes

  with tempfile.TemporaryDirectory() as scratch:
    folder = epath.Path(scratch)
    write(folder, episodes)
    begun = time.process_time()
    index = Index(folder, pathlib.Path(scratch) / "cache")
    index.update()
    print(f"the index, once:    {time.process_time() - begun:7.2f} s")
    begun = time.process_time()
    index.update()
    print(f"a look for changes: {time.process_time() - begun:7.3f} s")
    for wanted in WANTED:
      for sort in ("step", "advantage"):
        begun = time.process_time()
        found = index.find(wanted, sort, down=True)["total"]
        seconds = time.process_time() - begun
        print(f"{seconds:7.3f} s  {found:7,} of {wanted or 'all'} by {sort}")


if __name__ == "__main__":
  main()
