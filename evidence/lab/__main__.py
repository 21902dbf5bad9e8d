"""Every credit scheme on a policy small enough to be exact, in a few minutes."""

import argparse
from collections.abc import Sequence

from dca_jax.store.workdir import locate
from evidence import lab


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(prog="python -m evidence.lab", description=__doc__)
  parser.add_argument("--workdir", required=True, help="where the figures and the numbers go")
  folder = locate(parser.parse_args(argv).workdir)
  folder.mkdir(parents=True, exist_ok=True)
  print(lab.run(folder))
  print(f"\nfigures: {folder / 'lab.png'}, checks.png, drift.png and room.png; numbers: lab.json")


if __name__ == "__main__":
  main()
