"""How fast `weighted` credit learns from a reviewer with random and with correlated errors.

    python -m evidence.surface --workdir=runs/surface --seeds=41

Runs the quickstart's task once for each cell: labels flipped at random, times applause for one kind
of step that does nothing (repeats). A run ends when 80 % of its samples are right (mean of five
steps), when the policy is ruined, or after `STEPS`; what is finished is kept in runs.jsonl, so the
command can be killed and started again. `--arms=reviewers` runs reviewers that are not in the grid
instead, to hold what `dca-jax audit` predicts against what happens.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import random
import shutil
import statistics
from collections.abc import Sequence

import dca_jax
from dca_jax import config as config_lib
from dca_jax.checks import between
from dca_jax.commands.report import moving_average
from dca_jax.review.builtin import Noisy

RECIPE = str(pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py")
STEPS, THRESHOLD, RATE = 90, 0.8, 1e-3
FLIPS, APPLAUSE = (0.0, 0.1, 0.2, 0.3, 0.4), (0.0, 0.1, 0.3, 1.0)
UNIFORM = ("credit.scheme=uniform", "learner.lr=5e-4")
UNGUARDED = "credit.guard=False"
"""What such a reviewer does, and not what the guard makes of it."""


@dataclasses.dataclass(frozen=True)
class Flawed(Noisy):
  """The oracle with labels flipped at random, and one kind of step
  that it applauds now and then."""

  flip: float = 0.0
  applause: float = 0.0
  """Chance that a step which repeats an earlier one is necessary, with weight 3."""

  def check(self) -> dict[str, str]:
    return super().check() | between(0, 1, self, "applause")

  def distort(self, request, review):
    noisy, dice = super().distort(request, review), random.Random(f"{self.seed}/{request.id}")
    fooled = [
      s in request.steps[:k] and dice.random() < self.applause for k, s in enumerate(request.steps)
    ]
    return dataclasses.replace(
      noisy,
      roles=tuple("necessary" if f else r for f, r in zip(fooled, noisy.roles, strict=True)),
      weights=tuple(3.0 if f else 1.0 for f in fooled),
    )


def arms(which: str) -> dict[str, tuple[str, ...]]:
  """The overrides of every arm by its name."""
  made: dict[str, tuple[str, ...]] = {"uniform": UNIFORM}
  if which == "grid":
    flawed = f"reviewer.name={__spec__.name}:Flawed"
    for applause in APPLAUSE:
      for flip in FLIPS:
        cell = (UNGUARDED, flawed, f"reviewer.flip={flip}", f"reviewer.applause={applause}")
        made[f"flip {flip} applause {applause}"] = cell
    return made
  made["oracle"] = ("reviewer.name=oracle",)
  for name in ("fooled", "lexical", "random", "thief", "suffix", "stale"):
    made[name] = (f"reviewer.name={name}", UNGUARDED)
  for flip in (0.05, 0.15, 0.25, 0.35):
    made[f"noisy {flip}"] = ("reviewer.name=noisy", f"reviewer.flip={flip}", UNGUARDED)
  # Who says little is RLOO, which wants a lower rate.
  for name in ("thief", "stale", "random"):
    made[f"{name}, slower"] = (f"reviewer.name={name}", UNIFORM[1], UNGUARDED)
  return made


class _Enough(Exception):
  """The run has shown what it had to."""


def completions(overrides: Sequence[str], seed: int, workdir: pathlib.Path) -> float | None:
  """How many completions a run takes to the threshold; None where it does not get there."""
  given = [f"learner.lr={RATE}", *overrides, f"seed={seed}", f"steps={STEPS}"]
  given += ["evaluate.problems=16", "evaluate.samples=7", f"checkpoint.every={STEPS}"]
  config = config_lib.load(RECIPE, [f"--config.{said}" for said in given])
  batch, seen = config.rollout.problems * config.rollout.group, []

  def watch(run, step, metrics):
    seen.append(metrics["train/accuracy"])
    ruined = step >= 30 and statistics.fmean(seen[-10:]) < 0.05
    if moving_average(seen)[-1] >= THRESHOLD or ruined:
      raise _Enough

  with contextlib.suppress(_Enough):
    dca_jax.train(config, workdir, quiet=True, callbacks=[watch])
  shutil.rmtree(workdir)
  return len(seen) * batch if moving_average(seen)[-1] >= THRESHOLD else None


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(prog="python -m evidence.surface", description=__doc__)
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--seeds", default="41")
  parser.add_argument("--arms", default="grid", choices=("grid", "reviewers"))
  args = parser.parse_args(argv)
  folder = pathlib.Path(args.workdir)
  folder.mkdir(parents=True, exist_ok=True)
  kept = folder / "runs.jsonl"
  lines = kept.read_text().splitlines() if kept.exists() else []
  done = {(line["arm"], line["seed"]) for line in map(json.loads, lines)}
  for seed in map(int, args.seeds.split(",")):
    for arm, overrides in arms(args.arms).items():
      if (arm, seed) in done:
        continue
      took = completions(overrides, seed, folder / "run")
      line = {"arm": arm, "seed": seed, "completions": took}
      with kept.open("a") as out:
        out.write(json.dumps(line) + "\n")
      print(line, flush=True)


if __name__ == "__main__":
  main()
