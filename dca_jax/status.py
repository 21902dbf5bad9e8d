"""What a run is doing, from what it left in its workdir; also while it is being written to."""

import datetime
import json
import statistics
import time

from dca_jax.config import ConfigError
from dca_jax.metrics import read_metrics
from dca_jax.workdir import locate


def status(workdir: str) -> str:
  """A few lines: how far a run is, when it last moved, what is saved, how it fares, what was spent.

  Raises:
    ConfigError: there is no run.
  """
  folder = locate(workdir)
  if not (folder / "config.json").exists():
    raise ConfigError(f"--workdir={workdir} holds no run")
  config = json.loads((folder / "config.json").read_text())
  what = f"{config['credit']['scheme']} credit, reviewer {config['reviewer']['name']}, seed {config['seed']}"
  metrics = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
  trained = [m for m in metrics if "train/accuracy" in m]
  if not trained:
    return f"{config['task']['name']}: {what}\nno step is finished yet"
  last, recent = trained[-1], trained[-20:]
  seconds = statistics.median(m["seconds/step"] for m in recent)
  left = (config["steps"] - last["step"]) * seconds
  ago = time.time() - (folder / "metrics.jsonl").stat().mtime
  place = folder / "checkpoints"
  saved = sorted(int(p.name) for p in place.iterdir() if p.name.isdigit()) if place.exists() else []
  lines = [
    f"{config['task']['name']}: {what}",
    f"step {last['step']} of {config['steps']}, written {_span(ago)} ago; {seconds:.2f} s a step"
    + (f", {_span(left)} to go" if left else ": finished"),
    f"reward {statistics.fmean(m['train/reward'] for m in recent):.3f} (mean of {len(recent)} steps)",
    f"checkpoints: {', '.join(map(str, saved)) or 'none yet'}",
  ]
  if "review/dollars_spent" in last:
    lines.append(f"reviews: {last['review/ok']:.0%} usable in the last step, ${last['review/dollars_spent']:.2f} spent")
  return "\n".join(lines)


def _span(seconds: float) -> str:
  return str(datetime.timedelta(seconds=round(max(0.0, seconds))))
