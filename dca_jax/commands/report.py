"""A run, or a comparison of runs, as one self-contained HTML page."""

import bisect
import html
import io
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from etils import epath

from dca_jax.config import ConfigError, flatten, read_saved
from dca_jax.episode import Episode
from dca_jax.store.metrics import missing_steps, read_metrics
from dca_jax.store.symptoms import findings
from dca_jax.store.trajectories import read_trajectories

_ANSWERS = """
.answer { font-family: ui-monospace, monospace; margin: .6rem 0 1.1rem; }
.answer, .step { white-space: pre-wrap; overflow-wrap: anywhere; }
.step { display: inline-block; padding: 0 .3rem; margin: .1rem .15rem .1rem 0; border-radius: .25rem; }
.step { border: 1px solid #d5d9de; color: #1c2024; } small { font-size: .72rem; }
"""
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2024; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem 1.2rem .25rem 0; border-bottom: 1px solid #e3e6ea; }
svg { max-width: 100%; height: auto; } .note { color: #5d6671; } details { margin: .4rem 0; }
pre { background: #f6f7f9; padding: .8rem; overflow: auto; }
.wide { overflow-x: auto; } .wide svg { max-width: none; }
"""
PALETTE = ("#5d6671", "#0b7285", "#d9480f", "#6741d9", "#2b8a3e", "#c2255c", "#846800", "#1864ab")


def write_report(workdir: epath.Path) -> epath.Path:
  """Writes `report.html` into a run's workdir from what the run left there.

  Raises:
    ConfigError: there is no run, or it has not finished a step.
  """
  saved, metrics = read_saved(os.fspath(workdir)), read_metrics(workdir)
  trained = [m for m in metrics if "train/accuracy" in m]
  if not trained:
    raise ConfigError(f"--workdir={workdir} holds a run that has not finished a step yet")
  sections = [
    ("Held-out problems", _scores(metrics)),
    ("What looks wrong", [html_list(findings(metrics))] if findings(metrics) else []),
    ("Learning curve", _curves(trained)),
    ("Where the seconds go", [html_table(["", "median per step"], _seconds(trained))]),
    ("What credit did", _examples(workdir, trained)),
  ]
  body = [_note(_about(flatten(saved)))]
  if lost := missing_steps(metrics):
    body.append(_note(f"metrics.jsonl does not tell of steps {lost}, so they are not counted."))
  for title, content in sections:
    body += [f"<h2>{title}</h2>", *content] if content else []
  settings = html.escape(json.dumps(saved, indent=2))
  body.append(f"<details><summary>config.json</summary><pre>{settings}</pre></details>")
  path = workdir / "report.html"
  text = page(f"dca-jax: {workdir.parent.name}/{workdir.name}", body)
  path.write_bytes(text.encode(errors="replace"))  # Data may hold halves of characters.
  return path


def _about(config: dict[str, Any]) -> str:
  def setting(key: str):
    return config.get(key, "?")  # Another version may have written it.

  return (
    f"Task {setting('task.name')}, reviewer {setting('reviewer.name')}, credit "
    f"{setting('credit.scheme')}, seed {setting('seed')}; {setting('rollout.problems')} problems x "
    f"{setting('rollout.group')} completions a step, learning rate {setting('learner.lr')}. "
    "Intervals are 95 % over problems; curves are means of 5 steps."
  )


def _scores(metrics: list[dict]) -> list[str]:
  if rows := score_rows(metrics):
    return [html_table(["", *score_header(metrics)[1:]], rows)]
  return [_note("No evaluation stands in metrics.jsonl.")]


def _curves(trained: list[dict]) -> list[str]:
  completions = running_total(trained, "train/completions")

  def of(key: str, smooth=list):
    rows = [(x, m[key]) for x, m in zip(completions, trained, strict=True) if key in m]
    return ([x for x, _ in rows], smooth([y for _, y in rows]))

  sampled = [("accuracy", {"sampled, in training": of("train/accuracy", moving_average)})]
  labels = ("tokens in a completion", "entropy (nats)", "KL to the start (nats)")
  keys = ("train/length", "learner/entropy", "learner/kl")
  others = [(label, {"": of(key)}) for label, key in zip(labels, keys, strict=True)]
  charts = [(sampled, (7.5, 3.2)), (others, (7.5, 2.4))]
  drawn = [chart(panels, "completions sampled", size) for panels, size in charts]
  return [f"<div class=wide>{svg}</div>" for svg in drawn]


def _seconds(trained: list[dict]) -> list[list[str]]:
  keys = [key for key in trained[-1] if key.startswith("seconds/")]
  medians = {key: statistics.median(m[key] for m in trained if key in m) for key in keys}
  return [[key.removeprefix("seconds/"), f"{seconds:.3f} s"] for key, seconds in medians.items()]


def _note(text: str) -> str:
  return f"<p class=note>{html.escape(text)}</p>"


def html_list(items: Sequence[str]) -> str:
  return "<ul>" + "".join(f"<li>{html.escape(item)}" for item in items) + "</ul>"


def page(title: str, body: Sequence[str]) -> str:
  return (
    "<!doctype html><html lang=en><meta charset=utf-8>"
    "<meta name=viewport content='width=device-width'>"
    f"<title>{html.escape(title)}</title><style>{_STYLE}{_ANSWERS}</style>"
    f"<h1>{html.escape(title)}</h1>\n" + "\n".join(body) + "\n</html>\n"
  )


def chart(panels, x_label: str, size: tuple[float, float], kind: str = "svg"):
  """Draws panels side by side; each is (y label, {curve: (x, y) or a list of (x, y), one per seed}).

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


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  cells = "".join(f"<th>{html.escape(h)}" for h in header)
  body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}" for c in row) for row in rows)
  return f"<div class=wide><table><tr>{cells}{body}</table></div>"


def _examples(workdir: epath.Path, trained: list[dict]) -> list[str]:
  """Two wins and two losses of the first and of the last step, of different problems if they can."""
  shades = "".join(_span(label, shade) for shade, label in _legend())
  parts = [
    _note("Answers of the first and the last step; each step with its role and its mean credit."),
    f"<p class=note>Credit per token: {shades}</p>",
  ]
  for step in dict.fromkeys([trained[0]["step"], trained[-1]["step"]]):
    parts.append(f"<h3>Step {step}</h3>")
    kept = [*read_trajectories(workdir / "trajectories", step)]
    told = [t for t in kept if t.advantage]
    if not told:
      why = "The completions of every problem fared alike, so credit moved nothing." if kept else ""
      parts.append(
        _note(why or f"The trajectories of this step are not in {workdir / 'trajectories'}.")
      )
    for correct, kind in ((True, "right"), (False, "wrong")) if told else ():
      by_problem = {t.problem.id: t for t in told if t.outcome.correct == correct}
      parts += map(_example, [*by_problem.values()][:2])
      if not by_problem:
        parts.append(_note(f"Of problems whose completions fared differently, none was {kind}."))
  return parts


_BOUNDS = (0.05, 0.2, 0.5, 1.0)  # Of the shades: the same in every answer and in every report.
_GREENS = ("#ffffff", "#e6f5ea", "#bfe6c8", "#8fd19e", "#57b66d")
_REDS = ("#ffffff", "#fdeaea", "#fac8c8", "#f29d9d", "#e56b6b")


def _span(content: str, shade: str) -> str:
  return f'<span class=step style="background:{shade}">{content}</span>'


def _shade(credit: float) -> str:
  return (_REDS if credit < 0 else _GREENS)[bisect.bisect_right(_BOUNDS, abs(credit))]


def _legend() -> list[tuple[str, str]]:
  """The shades from the most discouraged to the most reinforced, and what they mean."""
  ranges = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(_BOUNDS)] + [
    f"{_BOUNDS[-1]:g} and more"
  ]
  minus = [(shade, f"\u2212({label})") for shade, label in zip(_REDS[1:], ranges, strict=True)]
  plus = [(shade, label) for shade, label in zip(_GREENS[1:], ranges, strict=True)]
  return [*minus[::-1], (_GREENS[0], f"under {_BOUNDS[0]:g} either way"), *plus]


def credit_html(episodes: Iterable[Episode]) -> str:
  """The text of episodes as HTML for a notebook, each step in the colour of its credit."""
  return f"<style>{_ANSWERS}</style>" + "".join(map(_example, episodes))


def _example(e: Episode) -> str:
  steps = ""
  for k, step in enumerate(e.steps):
    credit = statistics.fmean(e.credit[step.start : step.end] or [0.0])
    role = e.review.roles[k] if e.review.roles else f"no review ({e.review.status})"
    label = html.escape(f"{role} {credit:+.2f}".replace("-", "\u2212"))
    steps += _span(f"{html.escape(step.text)} <small>{label}</small>", _shade(credit))
  truncated = "truncated" if e.outcome.truncated else f"wrong, the answer is {e.problem.answer}"
  verdict = "correct" if e.outcome.correct else truncated
  return (
    f"<div class=answer>{html.escape(e.problem.prompt)}<br>{steps or '(no step)'}<br>"
    f"<span class=note>{html.escape(verdict)}; advantage {e.advantage:+.3f}</span></div>"
  )
