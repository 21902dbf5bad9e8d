"""Our side of a comparison with other trainers: CPU-seconds of training steps and of sampling.

    taskset -c 0 python evidence/benchmarks/peers.py --work=FOLDER [--rows=mixed,1024] [--steps=8]
        [--peers=FILE.jsonl]

FOLDER has `model` (answers never end: equal lengths), `model_eos` (answers end by chance),
`tok_auto` (their tokenizer), `prompts.jsonl` and `heldout.jsonl` with `prompt` and `answer`. Every
row runs in a process of its own, with a cold cache of compiled programs, or that of --cache. FILE
has one JSON object for each number of a peer, {"row": ..., "peer": ..., "step": ...}, measured on
the same machine, alternated with this, and is printed beside ours.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

ROWS: dict[str, dict[str, Any]] = {
  "8 x 8 x 64": {"model": "model", "problems": 8, "tokens": 64},
  "8 x 8 mixed to 256": {"model": "model_eos", "problems": 8, "tokens": 256},
  "8 x 8 mixed carry 4": {"model": "model_eos", "problems": 8, "tokens": 256, "carry": 4},
  "8 x 8 mixed carry 8": {"model": "model_eos", "problems": 8, "tokens": 256, "carry": 8},
  "32 x 8 mixed to 256": {"model": "model_eos", "problems": 32, "tokens": 256},
  "8 x 8 x 1024": {"model": "model", "problems": 8, "tokens": 1024},
  "1 x 2 x 8192": {"model": "model", "problems": 1, "group": 2, "tokens": 8192},
}
COLUMNS = ("step", "sample", "us_a_token", "decoded", "wasted", "first_cpu", "rss_gib")
HEADS = (
  *("CPU-s a step", "of these sampling", "us a token", "tokens one by one", "wasted, %"),
  *("CPU-s to step 1", "RSS, GiB"),
)


def recipe(
  work: pathlib.Path,
  model: str,
  problems: int,
  tokens: int,
  steps: int,
  group: int = 8,
  carry: int = 0,
) -> dict:
  return {
    "steps": steps,
    "policy": {"pretrained": str(work / model)},
    "task": {
      "name": "jsonl",
      "path": str(work / "prompts.jsonl"),
      "heldout_path": str(work / "heldout.jsonl"),
      "question": "prompt",
      "answer": "answer",
      "chat_template": False,
      "tokenizer": str(work / "tok_auto"),
    },
    "rollout": {
      "problems": problems,
      "group": group,
      "max_prompt_tokens": 32,
      "max_tokens": tokens,
      "carry": carry,
    },
    "learner": {"loss": "ppo", "lr": 1e-6, "max_grad_norm": 1.0, "reference": False},
    "evaluate": {"problems": 1, "samples": 1, "k": 1},
    "checkpoint": {"every": steps},
  }


def measure(row: str, work: pathlib.Path, steps: int) -> dict[str, float]:
  """Trains, in this process. Medians of all steps but the first and the last, which also compile
  and evaluate; programs that a later step is the first to need make it an outlier."""
  import jax

  import dca_jax
  from dca_jax import tally
  from dca_jax.rollout import slots

  config = recipe(work, **ROWS[row], steps=steps + 1)
  laps: dict[str, list[float]] = {"sample": [], "step": []}
  clock = {"sample": 0.0, "step": 0.0}
  first: list[float] = []
  plain, decode = tally.Clock.lap, slots.decode
  counts = [[0, 0]]  # Of each step, tokens decoded one after the other, and times their rows.

  def counted(*given):
    before = int(jax.device_get(given[4].context.clock))
    out = decode(*given)
    n = int(jax.device_get(out[0].context.clock)) - before
    counts[-1][0] += n
    counts[-1][1] += n * len(given[5])
    return out

  def lap(self, name: str) -> None:
    plain(self, name)
    if name == "sample":
      laps["sample"].append(time.process_time() - clock["step"])
      counts.append([0, 0])

  def after(run, step: int, metrics: dict) -> None:
    if step == 1:
      first.append(time.process_time())
    now = time.process_time()
    laps["step"].append(now - clock["step"])
    tokens.append(metrics.get("train/generated_tokens", 0.0))
    clock["step"] = now

  tokens: list[float] = []
  tally.Clock.lap, slots.decode = lap, counted  # type: ignore[method-assign]
  with tempfile.TemporaryDirectory() as workdir:
    dca_jax.train(config, workdir, quiet=True, callbacks=[after])
  # Step 0 is the evaluation's; the first step compiles.
  kept = slice(2, steps + 1)
  sample = statistics.median(laps["sample"][1:steps])
  decoded, rows = (statistics.mean(x) for x in zip(*counts[1:steps], strict=True))
  rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  return {
    "step": statistics.median(laps["step"][kept]),
    "sample": sample,
    "us_a_token": 1e6 * sample / statistics.mean(tokens[kept]),
    "decoded": decoded,
    "wasted": 100 * (1 - statistics.mean(tokens[kept]) / rows),
    "first_cpu": first[0],
    "rss_gib": rss,
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--work", required=True, type=pathlib.Path)
  parser.add_argument("--rows", default="", help="parts of the rows' names, with commas")
  parser.add_argument("--steps", type=int, default=8)
  parser.add_argument("--peers", type=pathlib.Path)
  parser.add_argument("--cache", type=pathlib.Path, help="where compiled programs are kept")
  parser.add_argument("--one", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.one:
    print(json.dumps(measure(arguments.one, arguments.work.absolute(), arguments.steps)))
    return
  wanted = [name for name in ROWS if any(part in name for part in arguments.rows.split(","))]
  told = arguments.peers.read_text().splitlines() if arguments.peers else []
  peers = [json.loads(line) for line in told if line.strip()]
  print(f"{'':24}{'':12}" + "".join(f"{head:>20}" for head in HEADS))
  for row in wanted:
    with tempfile.TemporaryDirectory() as cache:
      command = [sys.executable, __file__, f"--work={arguments.work}", f"--steps={arguments.steps}"]
      done = subprocess.run(
        [*command, f"--one={row}"],
        env={"JAX_PLATFORMS": "cpu"}
        | os.environ
        | {"JAX_COMPILATION_CACHE_DIR": str(arguments.cache or cache)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
      )
    ours = {"row": row, "peer": "dca-jax", **json.loads(done.stdout.splitlines()[-1])}
    for numbers in (ours, *(peer for peer in peers if peer["row"] == row)):
      known = (f"{numbers[key]:20.2f}" if key in numbers else f"{'':20}" for key in COLUMNS)
      print(f"{row:24}{numbers['peer']:12}" + "".join(known), flush=True)


if __name__ == "__main__":
  main()
