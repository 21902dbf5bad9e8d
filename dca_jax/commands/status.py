"""What a run is doing, from what it left in its workdir; also while it is being written to."""

import datetime
import statistics
import time

from dca_jax.config import flatten, read_saved
from dca_jax.store.metrics import read_metrics
from dca_jax.store.workdir import locate


def status(workdir: str) -> str:
  """A few lines: how far a run is, when it last moved, what is saved, how it fares, what was spent.

  Raises:
    ConfigError: there is no run, or its config.json is damaged.
  """
  folder, config = locate(workdir), flatten(read_saved(workdir))

  def setting(key: str):
    return config.get(key, "?")  # Another version may have written it.

  task, steps = setting("task.name"), setting("steps")
  what = f"{setting('credit.scheme')} credit, reviewer {setting('reviewer.name')}"
  what = f"{what}, seed {setting('seed')}"
  trained = [m for m in read_metrics(folder) if "train/accuracy" in m]
  if not trained:
    return f"{task}: {what}\nno step is finished yet"
  last, recent = trained[-1], trained[-20:]
  ago = time.time() - (folder / "metrics.jsonl").stat().mtime
  place = folder / "checkpoints"
  saved = sorted(int(p.name) for p in place.iterdir() if p.name.isdigit()) if place.exists() else []
  line = f"step {last['step']} of {steps}, written {_span(ago)} ago"
  if timed := [m["seconds/step"] for m in recent if "seconds/step" in m]:
    seconds = statistics.median(timed)
    left = (steps - last["step"]) * seconds if isinstance(steps, int) else 0
    line += f"; {seconds:.2f} s a step" + (f", {_span(left)} to go" if left else ": finished")
  lines = [f"{task}: {what}", line]
  if rewards := [m["train/reward"] for m in recent if "train/reward" in m]:
    lines.append(f"reward {statistics.fmean(rewards):.3f} (mean of {len(rewards)} steps)")
  lines.append(f"checkpoints: {', '.join(map(str, saved)) or 'none yet'}")
  if "review/dollars_spent" in last:
    usable = f"{last['review/ok']:.0%} usable in the last step, " if "review/ok" in last else ""
    lines.append(f"reviews: {usable}${last['review/dollars_spent']:.2f} spent")
  return "\n".join(lines)


def _span(seconds: float) -> str:
  return str(datetime.timedelta(seconds=round(min(max(0.0, seconds), 1e9))))
