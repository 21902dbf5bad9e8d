"""The laboratory: what every scheme does to the expected update, exactly, and to a policy
that can perform."""

import json
from typing import Any

import numpy as np
from etils import epath

from dca_jax.commands.report import PALETTE, draw, line_style, text_table
from evidence.lab import checks, drift, room, tree, tried


def run(folder: epath.Path) -> str:
  """All experiments; writes lab.png, checks.png, drift.png, room.png and lab.json into `folder`
  and returns the tables as text."""
  traces = tree.make_tree()
  rows = tree.table(traces)
  points = checks.curves(traces)
  curves = drift.run()
  ends = {name: drift.end(c) for name, c in curves.items()}
  rooms = room.run()
  (folder / "lab.png").write_bytes(_bars(rows))
  (folder / "checks.png").write_bytes(_checks(points))
  (folder / "drift.png").write_bytes(_lines(curves))
  (folder / "room.png").write_bytes(_rooms(rooms))
  numbers = {
    "tree": [r._asdict() for r in rows],
    "checks": [p._asdict() for p in points],
    "drift": {name: e._asdict() for name, e in ends.items()},
    "room": {start: {n: room.end(c)._asdict() for n, c in c.items()} for start, c in rooms.items()},
  }
  (folder / "lab.json").write_text(json.dumps(numbers, indent=2) + "\n")

  start = curves[next(iter(curves))].checks[:, 0].mean()
  drifted = [
    [
      name,
      f"{e.accuracy:.4f}",
      f"{e.worst:.4f}",
      f"{e.checks:.2f} +- {e.error:.2f}",
      f"{e.spread:.2f}",
    ]
    for name, e in ends.items()
  ]
  return "\n\n".join(
    [
      f"The exact update over all {len(traces.reward_N):,} traces of a policy that succeeds with"
      f" {traces.probability_N @ traces.reward_N:.3f}",
      _tree_table(rows),
      "Cosine with the policy gradient; signal to noise of one trace's update, which counts bias as"
      " signal, and without\nthat; how much more a check is reinforced than a step that does as"
      " little, where the policy leads (a better\nchance than at the start) and where it trails.",
      "Calibrated credit, by the spot checks that it has seen (one answer on each side of a step)",
      _checks_table(points),
      f"Training: {drift.UPDATES} updates of {drift.GROUPS * drift.GROUP} traces, {drift.SEEDS}"
      f" seeds; at first {start:.2f} of a trace's {drift.SLOTS} steps are checks",
      text_table(
        ["scheme, reviewer", "accuracy", "worst seed", "checks at the end +- s.e.", "s.d."], drifted
      ),
      "Checks do nothing and cost nothing here, so accuracy does not tell who drifts towards them.",
      f"Training where steps cost something: answers end themselves, at most {room.SLOTS} steps,"
      f" {room.UPDATES} updates, {room.SEEDS} seeds",
      *(f"{start}\n{_room_table(own)}" for start, own in rooms.items()),
      "Tried: doubly robust credit (share of steps checked x answers), a control variate along"
      " the trajectory, and\na critic distilled from reviews under potential at discount 1 and 0:"
      " signal to noise x cosine^2 / RLOO's, and premium",
      text_table(tried.HEADS, tried.table(traces)),
    ]
  )


def _checks(points: list[checks.Point]) -> bytes:
  def paint(axes: Any) -> None:
    for i, name in enumerate(dict.fromkeys(p.reviewer for p in points)):
      own = [p for p in points if p.reviewer == name]
      x = [max(p.checks, 30) for p in own]  # None stands at the left edge.
      for axis, key in zip(axes, ("snr", "leading"), strict=True):
        axis.plot(x, [getattr(p, key) for p in own], linewidth=1.5, label=name, **line_style(i))
    axes[0].set(ylabel="signal to noise x cosine^2 / RLOO's")
    axes[1].set(ylabel="premium of performing, leading")
    axes[0].legend(frameon=False)
    for axis in axes:
      axis.set(xscale="log", xlabel="spot checks (at the left edge none)")
      axis.grid(alpha=0.25)

  return draw(2, (10, 4), "png", paint)


def _lines(curves: dict[str, drift.Curves]) -> bytes:
  x = np.arange(drift.UPDATES)

  def paint(axes) -> None:
    for i, (name, c) in enumerate(curves.items()):
      for axis, y in zip(axes, (c.checks, c.accuracy), strict=True):
        mean, spread = _smooth(y.mean(0)), _smooth(y.std(0, ddof=1))
        axis.plot(x, mean, linewidth=1.5, label=name, **line_style(i))
        if axis is axes[0]:
          axis.fill_between(
            x, mean - spread, mean + spread, color=line_style(i)["color"], alpha=0.12, linewidth=0
          )
    axes[0].set(xlabel="updates", ylabel="checks in a trace (mean and s.d. over seeds)")
    axes[1].set(xlabel="updates", ylabel="accuracy", ylim=(0, 1.01))
    axes[1].legend(frameon=False, loc="lower right")
    for axis in axes:
      axis.grid(alpha=0.25)

  return draw(2, (10, 4), "png", paint)


def _rooms(rooms: dict[str, dict[str, room.Curves]]) -> bytes:
  def paint(axes: Any) -> None:
    for axis, (start, own) in zip(axes, rooms.items(), strict=True):
      for i, (name, c) in enumerate(own.items()):
        y = _smooth(c.accuracy.mean(0))
        axis.plot(np.arange(len(y)), y, linewidth=1.5, label=name, **line_style(i))
      axis.set(xlabel=f"updates, {start} at first", ylabel="accuracy", ylim=(0, 1.01))
      axis.grid(alpha=0.25)
    axes[0].legend(frameon=False)

  return draw(len(rooms), (5 * len(rooms), 4), "png", paint)


def _room_table(curves: dict[str, room.Curves]) -> str:
  heads = ["scheme, reviewer", "accuracy", "worst seed", "checks", "steps", "truncated"]
  return text_table(heads, [[n, *(f"{x:.2f}" for x in room.end(c))] for n, c in curves.items()])


def _smooth(y: np.ndarray, window: int = 15) -> np.ndarray:
  return np.convolve(np.pad(y, (window - 1, 0), "edge"), np.full(window, 1 / window), "valid")


def _tree_table(rows) -> str:
  table = []
  for r in rows:
    snr = r.snr / rows[0].snr
    premiums = (round(x, 6) + 0.0 for x in (r.leading, r.trailing))  # No sign of a zero.
    numbers = f"{r.cosine:.6f}", f"{snr:.2f}", f"{snr * r.cosine**2:.2f}"
    table.append([r.name, *numbers, *(f"{x:+.6f}" for x in premiums)])
  heads = ["scheme, reviewer", "cosine", "SNR / RLOO", "x cosine^2", "premium, leading", "trailing"]
  return text_table(heads, table)


def _checks_table(points) -> str:
  table = []
  for p in points:
    premium = f"{round(p.leading, 3) + 0.0:+.3f} +- {p.spread:.3f}"
    table.append([p.reviewer, f"{p.checks:,}", f"{p.cosine:.3f}", f"{p.snr:.2f}", premium])
  heads = ["reviewer", "checks", "cosine", "SNR x cosine^2 / RLOO", "premium, leading +- s.d."]
  return text_table(heads, table)


def _bars(rows: list[tree.Row]) -> bytes:
  panels = {
    "cosine with the policy gradient": [r.cosine for r in rows],
    "signal to noise / RLOO's": [r.snr / rows[0].snr for r in rows],
    "premium of performing, leading": [r.leading for r in rows],
  }

  def paint(axes) -> None:
    for axis, label, colour in zip(axes, panels, PALETTE[1:], strict=False):
      axis.barh([r.name for r in rows], panels[label], color=colour, height=0.7)
      axis.set_xlabel(label)
      axis.grid(axis="x", alpha=0.25)
    axes[0].set_xlim(0, 1)
    axes[1].axvline(1, color=PALETTE[0], linewidth=0.8)
    axes[0].invert_yaxis()

  return draw(3, (10, 5), "png", paint, share_y=True)
