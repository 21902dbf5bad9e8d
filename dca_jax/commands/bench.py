"""How fast a recipe trains on the devices of this machine, and how far that is from what they can
do at most."""

import collections
import contextlib
import dataclasses
import json
import platform
import resource
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dca_jax.commands.report import text_table
from dca_jax.config import Config
from dca_jax.devices import mesh
from dca_jax.devices.kinds import Kind, kind_of
from dca_jax.devices.memory import bytes_of
from dca_jax.devices.preemption import notices
from dca_jax.devices.processes import versions
from dca_jax.episode import Episode
from dca_jax.policy import PolicyConfig, join, split
from dca_jax.policy.config import STACKS
from dca_jax.run import Trainer, opened
from dca_jax.step import train_step
from dca_jax.store.checkpoints import read_params, read_start
from dca_jax.store.trajectories import read_trajectories
from dca_jax.store.workdir import locate

STEPS = 3
"""Training steps that are measured, after one in which everything is compiled."""


class Work(NamedTuple):
  """The least that a step takes, whatever computes it: of all devices together, except `held`."""

  steps: int
  """Tokens that are decoded one after the other: those of the longest answer."""
  held: int
  """Bytes of parameters on a device, which each of those reads."""
  cache: float
  """Bytes of keys and values, each of them read as often as there is a token after it."""
  flops: float
  """Of the updates on the batch and, where there is one, the reference policy."""


def bench(config: Config, workdir: str = "") -> dict[str, Any]:
  """Measurements of a few real training steps, which leave nothing behind.

  Groups are trained on also where all fare alike, as they do with random weights. Most schemes then
  ask the reviewer nothing, so its wait means something with the weights of a run.

  Args:
    workdir: of a run, whose newest policy is taken; with none the weights are random.

  Returns:
    What goes into JSON: medians over the steps, and shares of what the vendor says that the devices
    can do; None where that is not known.

  Raises:
    UserError: as training does, before the first step.
  """
  kept = dataclasses.replace(config.rollout, zero_variance="keep")
  config = dataclasses.replace(config, rollout=kept)

  def start(config, folder, policy, task, tokenizer, programs) -> Any:
    if not workdir:
      return programs.init_params(jax.random.key(0))
    _, trained = read_params(locate(workdir), None)
    frozen = split(read_start(locate(workdir)))[0] if config.policy.lora_rank else {}
    return jax.device_put(join(frozen, trained), programs.param_shardings)

  with (
    tempfile.TemporaryDirectory() as folder,
    notices() as stops,
    compiling() as seconds,
    opened(config, folder, "never", stops, True, start) as t,
  ):
    seen = []
    for step in range(1, STEPS + 2):
      metrics, _, stop, _ = train_step(t, step)
      if stop:
        raise stops.agreed(stop)
      seen.append((metrics, work(t, [*read_trajectories(t.folder / "trajectories", step)])))
    devices = t.programs.everywhere.mesh.devices
    name = devices.flat[0].device_kind
    reviewed = {"wait_seconds": _median(m["seconds/review"] for m, _ in seen[1:])}
    return {
      "device": {"kind": name, "count": devices.size},
      "versions": {
        "Python": platform.python_version(),
        "dca-jax": version("dca-jax"),
        **versions(),
      },
      "weights": workdir or "random",
      "steps": STEPS,
      **speeds(seen[1:], kind_of(name), devices.size),
      "reviewer": reviewed if config.reviewer.gives else {"wait_seconds": 0.0},
      "compile_seconds": {name: round(s, 2) for name, s in seconds.items() if s >= 0.1},
      "peak_memory_bytes": _peak_memory(devices.flat[0]),
      "settings": json.loads(config.to_json()),
    }


def work(t: Trainer, episodes: Sequence[Episode]) -> Work:
  """What a batch of the trainer's takes."""
  c, group, p = t.policy.config, t.config.rollout.group, t.programs
  problems = [t.task.problem("train", episode.problem.id) for episode in episodes[::group]]
  prompts_P = t.sampler.encode(problems)[1]
  prompts_B = np.repeat(prompts_P, group)
  lengths_B = np.array([len(episode.tokens) for episode in episodes])
  longest_P = lengths_B.reshape(-1, group).max(1)

  def place(layer: PolicyConfig) -> int:
    return 2 * layer.kv_heads * layer.head_dim * jnp.dtype(c.dtype).itemsize

  def score(layer: PolicyConfig) -> int:
    return 4 * layer.heads * layer.head_dim

  own = read(c, lengths_B, 0 * lengths_B, place)
  shared = read(c, longest_P, prompts_P, place) - read(c, longest_P, 0 * longest_P, place)

  sampling = mesh.sampler_mesh(t.config.mesh, mesh.make_mesh(t.config.mesh))
  params = jax.eval_shape(lambda params: mesh.sampler_params(t.policy, params), p.start)
  blocks = sum(_used(c, path, x.size) for path, x in jax.tree.leaves_with_path(p.start))
  tokens, width = lengths_B.sum(), t.policy.rows * c.width
  products = 2 * (blocks * (tokens + prompts_P.sum()) + width * tokens)
  scores = read(c, lengths_B, prompts_B, score) + read(c, prompts_P, 0 * prompts_P, score)
  updates = t.config.learner.updates_per_batch
  # Of weights that stay no gradient is computed.
  passes = updates * (2 if c.lora_rank else 3) + t.config.learner.has_reference
  return Work(
    int(longest_P.max()),
    bytes_of(params, mesh.param_shardings(sampling, t.policy)),
    float(own + shared),
    float(passes * products + (3 * updates + t.config.learner.has_reference) * scores),
  )


def _used(config: PolicyConfig, path: Any, size: int) -> int:
  """How many of a parameter's numbers a token is multiplied with: of experts those of the chosen;
  the output matrix is counted by itself."""
  if path[0].key not in (*STACKS, "layer_projection"):
    return 0
  of_expert = any(key.key.startswith(("expert_", "experts_")) for key in path)
  return size * config.experts_per_token // config.experts if of_expert else size


def read(
  config: PolicyConfig,
  lengths_R: np.ndarray,
  before_R: np.ndarray,
  size: Callable[[PolicyConfig], int] = lambda _: 1,
) -> int:
  """Places that tokens attend to, of all layers, each times a `size` of its layer: those of rows of
  so many tokens, each with as many as `before_R` says before it, and of a windowed layer no more
  than its window."""
  places = np.concatenate(
    [n + np.arange(1, k + 1) for n, k in zip(before_R, lengths_R, strict=True)]
  )
  whole, near = int(places.sum()), int(places.clip(max=config.window).sum())
  layers = range(config.depth)
  return sum(size(config.of_layer(i)) * (near if i in config.windowed else whole) for i in layers)


def speeds(
  steps: Sequence[tuple[dict[str, float], Work]], kind: Kind | None, devices: int
) -> dict[str, dict[str, float | None]]:
  """Medians of sampling and of the update, and shares of the peaks of `kind`."""

  def roofline(work: Work) -> float:
    bandwidth = kind.bandwidth if kind else 0.0
    return (work.steps * work.held + work.cache / devices) / bandwidth

  sampled, updated = "seconds/sample", "seconds/update"
  return {
    "sample": {
      "seconds": _median(m[sampled] for m, _ in steps),
      "tokens_per_second": _median(m["train/generated_tokens"] / m[sampled] for m, _ in steps),
      "least_bytes_per_token_step": _median(w.held + w.cache / devices / w.steps for _, w in steps),
      "roofline_share": _median(roofline(w) / m[sampled] for m, w in steps) if kind else None,
    },
    "update": {
      "seconds": _median(m[updated] for m, _ in steps),
      "tokens_per_second": _median(m["learner/tokens"] / m[updated] for m, _ in steps),
      "flops": _median(w.flops for _, w in steps),
      "flops_per_second_and_device": _median(w.flops / m[updated] / devices for m, w in steps),
      "mfu": _median(w.flops / m[updated] / devices / kind.flops for m, w in steps)
      if kind
      else None,
    },
  }


def table(found: dict[str, Any]) -> str:
  """The measurements for a reader."""

  def share(value: float | None, of: str) -> str:
    return f" ({value:.0%} of {of})" if value is not None else ""

  sample, update = found["sample"], found["update"]
  speed = update["flops_per_second_and_device"] / 1e12
  (of, memory), *_ = found["peak_memory_bytes"].items()
  rows = [
    ["sampling", sample["seconds"], f"{sample['tokens_per_second']:,.0f} tokens/s"],
    ["waiting for the reviewer", found["reviewer"]["wait_seconds"], ""],
    ["update", update["seconds"], f"{speed:,.3f} TFLOP/s a device"],
    ["compilation, once", sum(found["compile_seconds"].values()), ""],
  ]
  rows[0][2] += share(sample["roofline_share"], "the memory's speed")
  rows[2][2] += share(update["mfu"], "the peak")
  where = f"{found['device']['count']} x {found['device']['kind']}"
  lines = [[what, f"{seconds:.3f} s", rate] for what, seconds, rate in rows]
  return text_table(
    [where, "seconds", ""], [*lines, [f"memory of the {of}", f"{memory / 2**30:.2f} GiB", ""]]
  )


@contextlib.contextmanager
def compiling() -> Iterator[dict[str, float]]:
  """Seconds in which programs are compiled, or read from the cache, by their names."""
  seconds: dict[str, float] = collections.defaultdict(float)

  def listen(event: str, duration_secs: float, **told: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      seconds[str(told.get("fun_name", "")).removeprefix("jit(").removesuffix(")")] += duration_secs

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield seconds
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def _peak_memory(device: jax.Device) -> dict[str, int]:
  """Bytes, of a device, or of the process where it is the CPU."""
  if stats := device.memory_stats():
    return {"device": stats["peak_bytes_in_use"]}
  return {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def _median(values: Iterable[float]) -> float:
  return float(statistics.median(values))
