"""A run, or a comparison of runs, as one self-contained HTML page."""

import html
import io
import itertools
import json
import statistics
from collections.abc import Callable, Sequence

from etils import epath

from dca_jax.metrics import read_metrics
from dca_jax.rollout import Trajectory, read_trajectories

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2024; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem 1.2rem .25rem 0; border-bottom: 1px solid #e3e6ea; }
svg { max-width: 100%; height: auto; } .note { color: #5d6671; } details { margin: .4rem 0; }
pre { background: #f6f7f9; padding: .8rem; overflow: auto; }
.answer { font-family: ui-monospace, monospace; margin: .6rem 0 1.1rem; }
.step { display: inline-block; padding: 0 .25rem; margin: .1rem .15rem .1rem 0; border-radius: .25rem; }
"""
PALETTE = ("#5d6671", "#0b7285", "#d9480f", "#6741d9", "#2b8a3e", "#c2255c", "#846800", "#1864ab")


def write_report(workdir: epath.Path) -> epath.Path:
  """Writes `report.html` into a run's workdir from what the run left there."""
  metrics = read_metrics(workdir)
  config = json.loads((workdir / "config.json").read_text())
  trained = [m for m in metrics if "train/accuracy" in m]
  rollout, x = config["rollout"], running_total(trained, "train/completions")
  about = (
    f"Task {config['task']['name']}, reviewer {config['reviewer']['name']}, credit {config['credit']['scheme']}, "
    f"seed {config['seed']}; {rollout['problems']} problems x {rollout['group']} completions a step, "
    f"learning rate {config['learner']['lr']:g}. Intervals are 95 % over problems; curves are means of 5 steps."
  )
  timed = [key for key in trained[-1] if key.startswith("seconds/")]
  seconds = [[key.removeprefix("seconds/"), f"{statistics.median(m[key] for m in trained):.3f} s"] for key in timed]
  panels = [
    ("accuracy", {"sampled, in training": (x, moving_average([m["train/accuracy"] for m in trained]))}),
    ("tokens in a completion", {"": (x, [m["train/length"] for m in trained])}),
    ("entropy (nats)", {"": (x, [m["learner/entropy"] for m in trained])}),
    ("KL to the start (nats)", {"": (x, [m["learner/kl"] for m in trained])}),
  ]
  body = [
    f"<p class=note>{html.escape(about)}</p>",
    "<h2>Held-out problems</h2>",
    html_table(["", "step 0", f"step {metrics[-1]['step']}"], score_rows(metrics)),
    "<h2>Learning curve</h2>",
    chart(panels[:1], "completions sampled", (7.5, 3.2)),
    chart(panels[1:], "completions sampled", (7.5, 2.4)),
    "<h2>Where the seconds go</h2>",
    html_table(["", "median per step"], seconds),
    "<h2>What credit did</h2>",
    "<p class=note>Answers of the first and the last step. Green steps were reinforced, red ones discouraged; the "
    "deeper, the more per token. Point at a step for its role.</p>",
    *_examples(workdir, [trained[0]["step"], trained[-1]["step"]]),
    f"<details><summary>config.json</summary><pre>{html.escape(json.dumps(config, indent=2))}</pre></details>",
  ]
  path = workdir / "report.html"
  path.write_text(page(f"dca-jax: {workdir.parent.name}/{workdir.name}", body))
  return path


def page(title: str, body: Sequence[str]) -> str:
  return (
    f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"
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
          axis.plot(x, y, linewidth=1.6, alpha=0.9, label=name if j == 0 and name else None, **line_style(i))
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


def draw(columns: int, size: tuple[float, float], kind: str, paint: Callable[[Sequence], None], share_y: bool = False):
  """A figure with panels side by side that `paint` fills; an SVG element, or the bytes of a PNG."""
  from matplotlib import rc_context
  from matplotlib.figure import Figure

  out = io.BytesIO()
  with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}):
    figure = Figure(size, layout="constrained")
    paint(figure.subplots(1, columns, squeeze=False, sharey=share_y)[0])
    figure.savefig(out, format=kind, dpi=150)
  drawn = out.getvalue()
  return drawn if kind == "png" else drawn[drawn.index(b"<svg") :].decode()


def running_total(metrics: list[dict], key: str) -> list[float]:
  return list(itertools.accumulate(m[key] for m in metrics))


def moving_average(values: list[float], window: int = 5) -> list[float]:
  return [statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def score_rows(metrics: list[dict]) -> list[list[str]]:
  """The evaluations of the first and the last policy, a row for each score."""
  scored = [m for m in metrics if any(key.startswith("eval/") for key in m)]
  names = [key for key in scored[0] if key.startswith("eval/") and not key.endswith(("_low", "_high"))]

  def cell(m: dict, key: str) -> str:
    if m[f"{key}_low"] == m[f"{key}_high"]:
      return f"{m[key]:.1f}"
    return f"{m[key]:.3f} [{m[f'{key}_low']:.3f}, {m[f'{key}_high']:.3f}]"

  return [[name.removeprefix("eval/"), *(cell(m, name) for m in (scored[0], scored[-1]))] for name in names]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
  lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]]
  return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  cells = "".join(f"<th>{html.escape(h)}" for h in header)
  body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}" for c in row) for row in rows)
  return f"<table><tr>{cells}{body}</table>"


def _examples(workdir: epath.Path, steps: list[int]):
  """Two wins and two losses of each step, of different problems as far as they go."""
  for step in steps:
    yield f"<p><b>Step {step}</b></p>"
    told = [t for t in read_trajectories(workdir / "trajectories", step) if t.advantage]
    for correct in (True, False):
      by_problem = {t.problem: t for t in told if t.correct == correct}
      yield from map(_example, [*by_problem.values()][:2])


def _example(t: Trajectory) -> str:
  scale = max(abs(t.advantage), 1e-9)
  steps = ""
  for s in t.steps:
    credit = statistics.fmean(t.credit[s["start"] : s["end"]])
    strength = min(1.0, 0.25 * abs(credit) / scale)
    colour = f"rgba({'43,138,62' if credit > 0 else '201,42,42'},{strength:.2f})"
    title = html.escape(f"{s.get('role', 'not reviewed')}, {credit:+.3f} per token")
    steps += f'<span class=step style="background:{colour}" title="{title}">{html.escape(s["text"])}</span>'
  verdict = "correct" if t.correct else "truncated" if t.truncated else f"wrong, the answer is {t.answer}"
  return (
    f"<div class=answer>{html.escape(t.prompt)}<br>{steps}<br>"
    f"<span class=note>{html.escape(verdict)}; advantage {t.advantage:+.3f}</span></div>"
  )
