"""Arms against each other: the same problems, the same start, several seeds."""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import re
import statistics
import sys
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from etils import epath

from dca_jax import config as config_lib
from dca_jax.commands.pages import markup, render
from dca_jax.commands.report import chart, moving_average, running_total, text_table
from dca_jax.commands.view import write_report
from dca_jax.config import Arm, Config, ConfigError
from dca_jax.credit import SCHEMES
from dca_jax.errors import UserError
from dca_jax.intervals import paired_ratio
from dca_jax.loop import train
from dca_jax.store.metrics import missing_steps, read_metrics
from dca_jax.store.workdir import locate


def arm_config(
  recipe, arm: str, seed: int, overrides: Sequence[str], needed: Collection[str] = ()
) -> Arm:
  """One arm, as it is configured.

  An arm is the name of a credit scheme, or a name from the recipe's `ARMS` (a dict from names to
  settings), followed by any number of `:section.key=value`. It wins over `overrides`, those of the
  command line, which win over the recipe: what an arm cannot use of theirs, such as a reviewer
  where credit is uniform, is left out, except for `needed` keys.
  """
  # A value may hold colons: MODULE:CLASS, or an address.
  first, *settings = re.split(r":(?=\w+(?:\.\w+)*=)", arm)
  name, *strays = first.split(":")
  arms = getattr(recipe, "ARMS", {})
  if name not in (known := {**arms, **SCHEMES}):
    raise ConfigError(f"--arms: no arm {name!r}; known are {', '.join(known)}")
  scheme = {"credit.scheme": name} if name in SCHEMES else {}
  named = [f"--config.{key}={value}" for key, value in {**scheme, **arms.get(name, {})}.items()]
  typed = [f"--config.{setting}" for setting in [*strays, *settings]]
  own = named, [*typed, f"--config.seed={seed}"]
  return config_lib.build_arm(recipe.get_config(), overrides, own, needed)


def arm_configs(
  recipe, arms: Sequence[str], seed: int, overrides: Sequence[str]
) -> dict[str, Config]:
  """The configs of all arms; says which `overrides` an arm leaves out.

  Raises:
    ConfigError: an arm is wrong, or none of them has a use for one of `overrides`.
  """
  made = {arm: arm_config(recipe, arm, seed, overrides) for arm in arms}
  for key in sorted(set.intersection(*(set(own.left_out) for own in made.values()))):
    arm_config(recipe, arms[0], seed, overrides, {key})  # Which says why.
    raise ConfigError(f"{key}: no arm of --arms has a use for it")
  for arm, own in made.items():
    if own.left_out:
      print(f"note: left out for the arm {arm}: {', '.join(own.left_out)}", file=sys.stderr)
  return {arm: own.config for arm, own in made.items()}


def arms_of(text: str) -> list[str]:
  """The arms between the commas of `text`; `key=[a,b]` in one stands for an arm with each value."""
  arms = []
  for arm in re.findall(r"(?:\[[^\]]*\]|[^,\[])+", text):
    # Every second part is what stands in brackets.
    parts = re.split(r"\[([^\]]*)\]", arm)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    arms += ["".join(chosen) for chosen in itertools.product(*choices)]
  return arms


class Grid(NamedTuple):
  """What is compared: every arm with every seed."""

  arms: Sequence[str]
  seeds: Sequence[int]


def compare(
  recipe,
  grid: Grid,
  threshold: float,
  workdir: str,
  overrides: Sequence[str],
  quiet: bool = False,
  parallel: int = 1,
) -> str:
  """Trains all of a grid and writes compare.png, compare.html and compare.json, and each run's
  report; run again, it resumes.

  Args:
    parallel: so many runs go on at a time, each in a process and on an accelerator of its own.

  Returns:
    The table, as text.
  """
  arms, seeds = grid
  if not arms:
    raise ConfigError("--arms: name at least one")
  configs = arm_configs(recipe, arms, seeds[0], overrides)
  folder = locate(workdir)
  places = {
    (arm, seed): folder / arm.replace(":", "_").replace("/", "_") / f"seed_{seed}"
    for seed, arm in itertools.product(seeds, arms)
  }
  steps = {arm: config.steps for arm, config in configs.items()}
  _say_what_is_replaced(folder, {"arms": steps, "seeds": [*seeds], "threshold": threshold})
  if parallel > 1:
    _train_side_by_side(recipe.__file__, places, overrides, quiet, parallel)
  runs: Runs = {}
  for (arm, seed), run in places.items():
    if parallel == 1:
      if not quiet:
        print(f"\n{arm}, seed {seed}", flush=True)
      train(dataclasses.replace(configs[arm], seed=seed), str(run), quiet=quiet)
    runs[arm, seed] = read_metrics(run)
    if lost := missing_steps(runs[arm, seed]):
      raise UserError(
        f"{run}: its metrics.jsonl does not tell of steps {lost}, so nothing can be counted;"
        " remove it"
      )
    write_report(run)

  spent = {what: _spent(runs, arms, seeds, what, threshold) for what in _COUNTED}
  rates = {arm: config.learner.lr for arm, config in configs.items()}
  header = _header(arms[0], threshold)
  rows = [[arm, f"{rates[arm]:g}", *_row(arm, runs, seeds, spent)] for arm in arms]
  _write(folder, seeds, threshold, spent, header, rows)
  return text_table(header, rows)


def _say_what_is_replaced(folder: epath.Path, ours: dict[str, Any]) -> None:
  """Prints a line where the page in the folder is that of another comparison."""
  with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
    old = json.loads((folder / "compare.json").read_text())
    steps = {arm: len(own[0][0]) for arm, own in old["curves"].items()}
    theirs = {"arms": steps, "seeds": old["seeds"], "threshold": old["threshold"]}
    if theirs != ours or [*steps] != [*ours["arms"]]:
      arms = ", ".join(f"{arm} ({n} steps)" for arm, n in steps.items())
      said = f"{arms}; seeds {', '.join(map(str, old['seeds']))}; threshold {old['threshold']}"
      print(f"note: replaces compare.html, .png and .json in {folder}: {said}", file=sys.stderr)


def _train_side_by_side(
  recipe: str,
  places: dict[tuple[str, int], epath.Path],
  overrides: Sequence[str],
  quiet: bool,
  parallel: int,
) -> None:
  """Trains every arm and seed in its place; where one cannot, those that have not begun do not."""
  fresh = multiprocessing.get_context("spawn")
  numbers = fresh.Queue()
  for number in range(parallel):
    numbers.put(number)
  with concurrent.futures.ProcessPoolExecutor(parallel, fresh, _take_device, (numbers,)) as pool:
    under_way = {
      pool.submit(_train_one, recipe, *run, overrides, str(place)): run
      for run, place in places.items()
    }
    try:
      for done in concurrent.futures.as_completed(under_way):
        done.result()
        if not quiet:
          print("{}, seed {}: done".format(*under_way[done]), flush=True)
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


def _train_one(recipe: str, arm: str, seed: int, overrides: Sequence[str], place: str) -> None:
  own = arm_config(config_lib.read_recipe(recipe), arm, seed, overrides)
  train(own.config, place, quiet=True)


def _take_device(numbers: multiprocessing.Queue) -> None:
  """Leaves this process, before it looks for devices, one accelerator; a CPU is shared by all."""
  number = numbers.get()
  for key in ("CUDA_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS"):
    given = os.environ.get(key, "").split(",")
    os.environ[key] = given[number % len(given)] or str(number)
  os.environ |= {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}


# What the columns of the table are called in compare.json.
_JSON = (
  "arm",
  "lr",
  "completions",
  "completions_ratio",
  "completions_ratio_by_seeds",
  "tokens",
  "tokens_ratio",
  "tokens_ratio_by_seeds",
  "sampled",
  "greedy",
  "length",
)

# By arm and seed, the rows of a run's metrics.
Runs = dict[tuple[str, int], list[dict[str, Any]]]
Curve = tuple[list[float], list[float]]
# What is counted, in which unit, and what says so behind a number.
_COUNTED = {"completions": (1, ""), "generated_tokens": (1000, "k")}


class Spent(NamedTuple):
  """What one kind of spending bought, by arm and for each seed."""

  curves: dict[str, list[Curve]]
  """What had been spent after each step, and the accuracy by then."""
  to_threshold: dict[str, list[float | None]]


def _spent(
  runs: Runs, arms: Sequence[str], seeds: Sequence[int], what: str, threshold: float
) -> Spent:
  curves = {arm: [_curve(runs[arm, seed], f"train/{what}") for seed in seeds] for arm in arms}
  reached = {arm: [samples_to(x, y, threshold) for x, y in own] for arm, own in curves.items()}
  return Spent(curves, reached)


def _header(base: str, threshold: float) -> list[str]:
  versus = f"{base} / arm"
  reached = versus, "by seeds, 95 %"
  counted = f"completions to {threshold:g}", *reached, f"tokens to {threshold:g}", *reached
  return ["arm", "lr", *counted, "sampled at the end", "greedy", "length"]


def _row(arm: str, runs: Runs, seeds: Sequence[int], spent: dict[str, Spent]) -> list[str]:
  """What the table says of an arm, behind its learning rate."""
  row = []
  for what, (unit, sign) in _COUNTED.items():
    curves, reached = spent[what]
    base = next(iter(curves))
    row.append(" ".join("never" if n is None else f"{n / unit:,.0f}{sign}" for n in reached[arm]))
    row.append(ratio(reached[base], reached[arm], curves[base]))
    row.append(by_seeds(reached[base], reached[arm]) if arm != base else "-")
  for score, digits in (("sampled", 3), ("greedy", 3), ("length", 1)):
    row.append(" ".join(f"{runs[arm, seed][-1][f'eval/{score}']:.{digits}f}" for seed in seeds))
  return row


def _write(
  folder: epath.Path,
  seeds: Sequence[int],
  threshold: float,
  spent: dict[str, Spent],
  header: list[str],
  rows: list[list[str]],
) -> None:
  """Writes the figure, the page and the numbers."""
  curves = spent["completions"].curves
  panels, size = [("accuracy", curves)], (6.4 if len(curves) < 5 else 8.0, 3.6)
  (folder / "compare.png").write_bytes(chart(panels, "completions sampled", size, "png"))
  page = render(
    "compare.html",
    title=f"dca-jax: {', '.join(curves)}",
    chart=markup(chart(panels, "completions sampled", size)),
    about=(
      "Sampled accuracy on fresh training problems, mean of 5 steps; one curve a seed "
      f"({', '.join(map(str, seeds))}). Completions, and tokens generated, until that mean reaches "
      f"{threshold:g}, a number a seed; ratios of medians, and geometric means of the seeds' own"
      " ratios with their 95 % t intervals, which know nothing of what all seeds share. The tokens"
      " include continuations sampled for prefix values, and no reviewer's. At the end: held-out"
      " problems."
    ),
    header=header,
    rows=rows,
  )
  (folder / "compare.html").write_text(page)
  result = {
    "threshold": threshold,
    "seeds": list(seeds),
    "curves": curves,
    "rows": [dict(zip(_JSON, row, strict=True)) for row in rows],
    "completions_to_threshold": spent["completions"].to_threshold,
    "tokens_to_threshold": spent["generated_tokens"].to_threshold,
  }
  (folder / "compare.json").write_text(json.dumps(result) + "\n")


def _curve(metrics: list[dict[str, Any]], spent: str) -> Curve:
  """What of the metric `spent` had been spent after each step, and the accuracy by then, mean of
  five steps."""
  trained = [m for m in metrics if "train/accuracy" in m]
  return running_total(trained, spent), moving_average([m["train/accuracy"] for m in trained])


def samples_to(x: list[float], y: list[float], threshold: float) -> float | None:
  """What was spent when the mean of five steps first reached `threshold`; None
  where it never does."""
  return next(
    (n for i, (n, a) in enumerate(zip(x, y, strict=True)) if a >= threshold and i >= 4), None
  )


def by_seeds(base: list[float | None], arm: list[float | None]) -> str:
  """The geometric mean over seeds of the first arm's spending over this one's, and its interval;
  nothing where a run never arrived."""
  if None in base or None in arm or len(arm) < 2:
    return "-"
  e = paired_ratio([n for n in base if n], [n for n in arm if n])
  return f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]"


def ratio(base: list[float | None], arm: list[float | None], base_curves) -> str:
  """Median of the first arm over the median of this one, and whether the seeds overlap.

  A run that never arrived counts as its whole length, so the ratio is then a lower bound,
  marked by a sign.
  """
  arrived = [n for n in arm if n is not None]
  if len(arrived) < len(arm):
    return "-"
  known = [n or x[-1] for n, (x, _) in zip(base, base_curves, strict=True)]
  endless = statistics.median(n or math.inf for n in base)
  bound = "≥ " if endless != statistics.median(known) else ""
  apart = " (seeds apart)" if min(known) > max(arrived) and len(arm) > 1 else ""
  return f"{bound}{statistics.median(known) / statistics.median(arrived):.2f}{apart}"
