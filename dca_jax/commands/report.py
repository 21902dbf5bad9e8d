"""What pages and tables say of runs: scores, curves, answers in the colours of their credit."""

import bisect
import io
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from etils import epath

from dca_jax.commands.pages import render
from dca_jax.config import ConfigError, flatten, read_saved, saved_config
from dca_jax.episode import Episode
from dca_jax.store.metrics import missing_steps, read_metrics
from dca_jax.store.symptoms import findings

PALETTE = ("#5d6671", "#0b7285", "#d9480f", "#6741d9", "#2b8a3e", "#c2255c", "#846800", "#1864ab")


def summary(workdir: epath.Path) -> dict[str, Any]:
  """What a run's page says beside its curves and episodes.

  Raises:
    ConfigError: there is no run, or it has not finished a step.
  """
  saved, metrics = read_saved(os.fspath(workdir)), read_metrics(workdir)
  trained = [m for m in metrics if "train/accuracy" in m]
  if not trained:
    raise ConfigError(f"--workdir={workdir} holds a run that has not finished a step yet")
  return {
    "title": f"dca-jax: {workdir.parent.name}/{workdir.name}",
    "about": _about(flatten(saved)),
    "notation": _notation(workdir),
    "lost": missing_steps(metrics),
    "scores_header": ["", *score_header(metrics)[1:]],
    "scores": score_rows(metrics),
    "findings": findings(metrics),
    "seconds": _seconds(trained),
    "settings": json.dumps(saved, indent=2),
  }


def _notation(workdir: epath.Path) -> str:
  """What the run's task says of it, where that can be imported here."""
  try:
    return saved_config(os.fspath(workdir)).task.notation
  except ConfigError:
    return ""


def _about(config: dict[str, Any]) -> str:
  def setting(key: str):
    return config.get(key, "?")  # Another version may have written it.

  return (
    f"Task {setting('task.name')}, reviewer {setting('reviewer.name')}, credit "
    f"{setting('credit.scheme')}, seed {setting('seed')}; {setting('rollout.problems')} problems x "
    f"{setting('rollout.group')} completions a step, learning rate {setting('learner.lr')}. "
    "Intervals are 95 % over problems; curves are means of 5 steps."
  )


def _seconds(trained: list[dict]) -> list[list[str]]:
  keys = [key for key in trained[-1] if key.startswith("seconds/")]
  medians = {key: statistics.median(m[key] for m in trained if key in m) for key in keys}
  return [[key.removeprefix("seconds/"), f"{seconds:.3f} s"] for key, seconds in medians.items()]


def chart(panels, x_label: str, size: tuple[float, float], kind: str = "svg"):
  """Draws panels side by side; each is (y label, {curve: (x, y) or a list of (x, y),
  one per seed}).

  Returns:
    An SVG element, or the bytes of a PNG.
  """
  from matplotlib.ticker import EngFormatter

  def paint(axes) -> None:
    for axis, (label, curves) in zip(axes, panels, strict=True):
      for i, (name, runs) in enumerate(curves.items()):
        for j, (x, y) in enumerate(runs if isinstance(runs, list) else [runs]):
          axis.plot(
            x, y, linewidth=1.6, alpha=0.9, label=name if j == 0 and name else None, **line_style(i)
          )
      axis.set(xlabel=x_label, ylabel=label)
      axis.xaxis.set_major_formatter(EngFormatter(sep=""))
      axis.grid(alpha=0.25)
      if label == "accuracy":
        axis.set_ylim(0, 1)
      if len(curves) > 4:  # Too many to stand among the curves.
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
      elif any(curves):
        axis.legend(frameon=False)

  return draw(len(panels), size, kind, paint)


def line_style(i: int) -> dict[str, str]:
  """Of curve number i: a colour, and dots when the colours begin again."""
  return {"color": PALETTE[i % len(PALETTE)], "linestyle": "-" if i < len(PALETTE) else ":"}


def draw(
  columns: int,
  size: tuple[float, float],
  kind: str,
  paint: Callable[[Sequence], None],
  share_y: bool = False,
):
  """A figure with panels side by side that `paint` fills; an SVG element, or the bytes of a PNG."""
  from matplotlib import rc_context
  from matplotlib.figure import Figure

  out = io.BytesIO()
  with rc_context(
    {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}
  ):
    figure = Figure(size, layout="constrained")
    paint(figure.subplots(1, columns, squeeze=False, sharey=share_y)[0])
    figure.savefig(out, format=kind, dpi=150)
  drawn = out.getvalue()
  return drawn if kind == "png" else drawn[drawn.index(b"<svg") :].decode()


def running_total(metrics: list[dict], key: str) -> list[float]:
  return list(itertools.accumulate(m.get(key, 0.0) for m in metrics))


def moving_average(values: list[float], window: int = 5) -> list[float]:
  return [statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def _scored(metrics: list[dict]) -> list[dict]:
  """The rows of the first and the last evaluation; one row where they are the same."""
  scored = [m for m in metrics if any(key.startswith("eval/") for key in m)]
  return [scored[0], scored[-1]] if len(scored) > 1 else scored


def score_header(metrics: list[dict]) -> list[str]:
  return ["held-out", *(f"step {m['step']}" for m in _scored(metrics))]


def score_rows(metrics: list[dict]) -> list[list[str]]:
  """The evaluations of the first and the last policy, a row for each score."""
  ends = _scored(metrics)
  keys = dict.fromkeys(key for m in ends for key in m if key.startswith("eval/"))
  names = [key for key in keys if not key.endswith(("_low", "_high"))]

  def cell(m: dict, key: str) -> str:
    if key not in m:
      return "-"
    low, high = m.get(f"{key}_low", m[key]), m.get(f"{key}_high", m[key])
    return f"{m[key]:.1f}" if low == high else f"{m[key]:.3f} [{low:.3f}, {high:.3f}]"

  return [[name.removeprefix("eval/"), *(cell(m, name) for m in ends)] for name in names]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
  lines = [
    "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
    for row in [header, *rows]
  ]
  return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


_BOUNDS = (0.05, 0.2, 0.5, 1.0)  # Of the shades: the same in every answer and in every report.
_GREENS = ("#ffffff", "#e6f5ea", "#bfe6c8", "#8fd19e", "#57b66d")
_REDS = ("#ffffff", "#fdeaea", "#fac8c8", "#f29d9d", "#e56b6b")


def _shade(credit: float) -> str:
  return (_REDS if credit < 0 else _GREENS)[bisect.bisect_right(_BOUNDS, abs(credit))]


def credit_html(episodes: Iterable[Episode]) -> str:
  """The text of episodes as HTML for a notebook, each step in the colour of its credit."""
  return render("answers.html", answers=[*map(_answer, episodes)])


def _answer(e: Episode) -> dict[str, Any]:
  """What a page shows of an episode."""
  steps, given = [], e.given()
  for k, step in enumerate(e.steps):
    credit = statistics.fmean(e.credit[step.start : step.end] or [0.0])
    role = e.review.roles[k] if e.review.roles else f"no review ({e.review.status})"
    label = f"{role} {credit:+.2f}".replace("-", "\u2212")
    why = e.review.reasons[k] if e.review.reasons else ""
    shown = {"given": given[k], "text": step.text, "label": label, "shade": _shade(credit)}
    steps.append({**shown, "why": why})
  truncated = "truncated" if e.outcome.truncated else f"wrong, the answer is {e.problem.answer}"
  verdict = "correct" if e.outcome.correct else truncated
  return {
    "prompt": e.problem.prompt,
    "steps": steps,
    "verdict": f"{verdict}; advantage {e.advantage:+.3f}",
  }
