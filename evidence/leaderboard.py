"""docs/leaderboard.md, made from rows that `dca-jax audit` has written.

    python -m evidence.leaderboard runs/audit/audit.json ...

Each row is kept in evidence/leaderboard.jsonl, where it replaces an earlier one of the same
reviewer, model, settings and source; the page is made anew from all of them. `--built-in=DIR` makes
the rows of the built-in reviewers first, on the trajectories in DIR; `--realised=FILE` adds what
runs of `python -m evidence.surface --arms=reviewers` took, from its runs.jsonl.
"""

import argparse
import collections
import contextlib
import io
import json
import pathlib
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

from dca_jax.commands import cli

ROOT = pathlib.Path(__file__).parents[1]
ROWS, PAGE = ROOT / "evidence" / "leaderboard.jsonl", ROOT / "docs" / "leaderboard.md"
BUILT_IN = (
  ("oracle",),
  *(("noisy", f"flip={flip}") for flip in (0.05, 0.15, 0.2, 0.25, 0.35)),
  *((name,) for name in ("fooled", "lexical", "random", "thief", "suffix", "stale", "nan")),
)
_KEY = ("source", "reviewer", "model", "settings")
_COLUMNS = {
  "usable": "usable",
  "role_accuracy": "roles right",
  "kappa": "kappa",
  "first_error_f1": "first error, F1",
  "errors_in_wins": "errors in wins",
  "applause": "applause",
  "gradient_snr": "SNR / RLOO's",
  "predicted_speedup": "predicted speed-up",
  "realised": "realised",
  "dollars_per_1000": "$ / 1,000",
}
_ABOUT = """\
# Reviewers, audited

Made by `python -m evidence.leaderboard` from the rows in `evidence/leaderboard.jsonl`; do not edit.
A row of your own:

    dca-jax audit --config=configs/quickstart.py --reviewer=NAME:MODEL --workdir=runs/audit
    python -m evidence.leaderboard runs/audit/audit.json

[reviewers.md](reviewers.md#is-it-good-enough) says what the columns mean; in brackets 95 %
intervals. `applause` is what the needless kind of step that a reviewer likes best gets beside one
that is to be credited. `realised` is the measured speed-up of `weighted` credit over `uniform` on
seed 42, of which the surface saw only `uniform`; 0 where 80 % was not reached in 90 steps.
"""


def audit_built_in(trajectories: str) -> list[dict[str, Any]]:
  """Rows of the built-in reviewers."""
  rows = []
  for name, *settings in BUILT_IN:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
      command = ["audit", f"--trajectories={trajectories}", f"--reviewer={name}"]
      command += [f"--config.reviewer.{said}" for said in settings]
      if cli.main([*command, f"--workdir={folder}"]):
        raise SystemExit(1)
      rows.append(json.loads((pathlib.Path(folder) / "audit.json").read_text()))
  return rows


def realised(path: str) -> dict[str, float]:
  """The speed-up of every reviewer over `uniform`, of medians over seeds, at its better rate."""
  took: dict[str, list[float]] = collections.defaultdict(list)
  for line in map(json.loads, pathlib.Path(path).read_text().splitlines()):
    took[line["arm"]].append(line["completions"] or float("inf"))
  uniform = statistics.median(took.pop("uniform"))
  best: dict[str, float] = {}
  for arm, own in took.items():
    name = arm.partition(",")[0]
    best[name] = max(best.get(name, 0.0), round(uniform / statistics.median(own), 2))
  return best


def page(rows: Sequence[dict[str, Any]]) -> str:
  """The page, a table for every source, the most promising reviewer first."""
  parts = [_ABOUT]
  for source in dict.fromkeys(row["source"] for row in rows):
    own = [row for row in rows if row["source"] == source]
    own.sort(key=lambda row: (-(row["predicted_speedup"] or 0), -(row["kappa"] or 0)))
    columns = {k: v for k, v in _COLUMNS.items() if any(_value(row, k) is not None for row in own)}
    lines = [["reviewer", *columns.values(), "verdict"]]
    lines.append(["---"] * len(lines[0]))
    lines += [[_name(row), *(_cell(row, k) for k in columns), row["verdict"]] for row in own]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    counts = sorted({row["n"] for row in own})
    parts.append(f"## On `{source}`\n\nAnswers: {', '.join(map(str, counts))}.\n\n{table}\n")
  return "\n".join(parts)


def _name(row: dict[str, Any]) -> str:
  said = [f"`{row['reviewer']}`", row["model"], row["settings"]]
  return " ".join(filter(None, said))


def _value(row: dict[str, Any], key: str) -> Any:
  if key != "applause":
    return row.get(key)
  return max((x for k, x in row.items() if _is_applause(k)), default=None)


def _is_applause(key: str) -> bool:
  return key.startswith("applause_") and not key.endswith(("_low", "_high"))


def _cell(row: dict[str, Any], key: str) -> str:
  value = _value(row, key)
  if value is None:
    return "-"
  ends = [row.get(f"{key}_{end}") for end in ("low", "high")]
  return f"{value:.2f} [{ends[0]:.2f}, {ends[1]:.2f}]" if None not in ends else f"{value:.2f}"


def main(argv: Sequence[str] | None = None) -> None:
  """Takes rows in, and writes the page."""
  parser = argparse.ArgumentParser(prog="python -m evidence.leaderboard", description=__doc__)
  parser.add_argument("rows", nargs="*", help="audit.json files")
  parser.add_argument("--built-in", metavar="DIR")
  parser.add_argument("--realised", metavar="FILE")
  args = parser.parse_args(argv)
  new = audit_built_in(args.built_in) if args.built_in else []
  new += [json.loads(pathlib.Path(path).read_text()) for path in args.rows]
  kept = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
  by_key: dict[tuple[str, ...], dict[str, Any]] = {}
  for row in [*kept, *new]:
    own = tuple(row[k] for k in _KEY)
    was = by_key.get(own, {})
    by_key[own] = {k: was[k] for k in ("realised",) if k in was} | row
  if args.realised:
    for arm, speedup in realised(args.realised).items():
      name, _, setting = arm.partition(" ")
      for row in by_key.values():
        if (row["reviewer"], row["settings"]) == (name, setting and f"flip={setting}"):
          row["realised"] = speedup
  rows = list(by_key.values())
  ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
  PAGE.write_text(page(rows))


if __name__ == "__main__":
  main()
