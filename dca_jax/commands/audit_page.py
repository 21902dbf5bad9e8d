"""audit.html: what an audit measured, and the answers that were judged worst."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from dca_jax.commands.pages import markup, render
from dca_jax.commands.report import PALETTE, draw
from dca_jax.episode import ROLES
from dca_jax.intervals import Estimate
from dca_jax.review.audit import CREDITED, Judged, confusion, usable
from dca_jax.review.faults import Pair

_WORST = 12
"""Answers that are shown."""
_PANELS = {
  "recall by role": "recall_",
  "needless steps found": "needless_",
  "planted faults found": "planted_",
}
_SHADES = {"same": "#ffffff", "other": "#fbf0d2", "credit": "#f29d9d"}


def write_page(
  folder: epath.Path,
  title: str,
  verdict: str,
  sections: Mapping[str, Sequence[tuple[str, Estimate]]],
  judged: Sequence[Judged],
  pairs: Sequence[Pair],
) -> None:
  """Writes the page of one audit.

  Args:
    sections: the measures under their headings, in order.
  """
  told = [j for j in judged if usable(j.review) and j.case.labels]
  faults = [Judged(p.planted.case, p.edited) for p in pairs]
  measures = dict(pair for own in sections.values() for pair in own)
  text = render(
    "audit.html",
    title=title,
    verdict=verdict,
    chart=markup(_chart(measures)),
    sections=[(name, [cells(*pair) for pair in own]) for name, own in sections.items() if own],
    roles=["true \\ said", *ROLES],
    confusion=confusion_rows(told),
    legend=[
      (_SHADES["other"], "another role, the same credit"),
      (_SHADES["credit"], "credited and should not be, or the other way round"),
    ],
    worst=[_answer(j) for j in _worst([*told, *faults])],
  )
  (folder / "audit.html").write_bytes(text.encode(errors="replace"))


def cells(name: str, e: Estimate) -> list[str]:
  """A measure as a row of a table."""
  return [name.replace("_", " "), f"{e.value:.3f}", f"{e.low:.3f} to {e.high:.3f}"]


def confusion_rows(told: Sequence[Judged]) -> list[list[str]]:
  """How often a step of each true role, with their number, was called what; `told` have labels."""
  if not told:
    return []
  counts = confusion(told).sum(0).astype(int)
  return [[f"{role} ({counts[i].sum()})", *map(str, counts[i])] for i, role in enumerate(ROLES)]


def _chart(measures: Mapping[str, Estimate]) -> str:
  """Shares with their intervals, a panel for each family."""
  panels = {
    title: [(k.removeprefix(start), e) for k, e in measures.items() if k.startswith(start)]
    for title, start in _PANELS.items()
  }
  panels = {title: own for title, own in panels.items() if own}
  if not panels:
    return ""

  def paint(axes: Sequence[Any]) -> None:
    for axis, (title, own), colour in zip(axes, panels.items(), PALETTE[1:], strict=False):
      values = np.array([e.value for _, e in own])
      ends = np.array([[e.value - e.low, e.high - e.value] for _, e in own]).T
      names = [name.replace("_", " ") for name, _ in own]
      axis.errorbar(values, names, xerr=np.maximum(ends, 0), fmt="o", color=colour, capsize=2)
      axis.set(title=title, xlim=(-0.03, 1.03))
      axis.invert_yaxis()
      axis.grid(axis="x", alpha=0.25)

  return str(draw(len(panels), (3.4 * len(panels), 3.2), "svg", paint))


def _wrong(true: str, said: str) -> str:
  """How far a role is off: `same`, `other`, or `credit` where it moves credit."""
  if said == true or not true:
    return "same"
  return "credit" if (said in CREDITED) != (true in CREDITED) else "other"


def _worst(told: Sequence[Judged]) -> list[Judged]:
  """The answers with the largest share of steps whose credit is wrong."""

  def bad(j: Judged) -> float:
    kinds = [_wrong(*pair) for pair in zip(j.case.labels, j.review.roles, strict=True)]
    return (kinds.count("credit") + 0.1 * kinds.count("other")) / len(kinds)

  return [j for j in sorted(told, key=bad, reverse=True)[:_WORST] if bad(j)]


def _answer(j: Judged) -> dict[str, Any]:
  request, steps = j.case.request, []
  whys = j.review.reasons or [""] * len(request.steps)
  rows = zip(request.steps, j.case.labels, j.review.roles, j.review.weights, whys, strict=True)
  for k, (text, true, said, weight, why) in enumerate(rows, 1):
    label = f"{said} x {weight:g}" + (f", truly {true}" if true and true != said else "")
    shade = _SHADES[_wrong(true, said)]
    given = request.given_before(k)
    steps.append({"text": text, "label": label, "shade": shade, "why": why, "given": given})
  verdict = "correct" if request.correct else "ran out of room" if request.truncated else "wrong"
  return {"prompt": request.problem, "steps": steps, "verdict": verdict}
