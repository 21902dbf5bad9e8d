"""Compiles a recipe's update and decoding for TPUs that are not there, and prints the memory they
take by XLA's own account, the cycles by its estimate, what a decoded token moves, and the least
time that arithmetic and memory allow; real steps take longer, often twice as long.

    pip install libtpu  # the version that jax's `tpu` extra names
    python evidence/benchmarks/tpu.py --config=configs/gsm8k_qwen3.py --topology=v5e:2x4

Needs no weights, only the model's config.json (a folder with just that will do as
policy.pretrained). The device count is that of the topology; --devices takes the first ones. The
compiler refuses a program that does not fit a chip.
"""

import argparse
import functools
import math
import os
import re
import time
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # Or libtpu asks the network for them.

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from dca_jax import config as config_lib
from dca_jax import learner
from dca_jax.commands.plan import batch_shapes, memory
from dca_jax.devices import mesh
from dca_jax.devices.kinds import KINDS
from dca_jax.policy import Policy, pretrained, split
from dca_jax.policy.config import STACKS
from dca_jax.policy.sharding import batch_sharding, replicated
from dca_jax.rollout import Wanted, slots
from dca_jax.tasks.tokenizer import id_count


def main() -> None:
  """Long, because most of it is the shapes and shardings that both programs are compiled for."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--config", required=True)
  parser.add_argument("--topology", required=True, help="such as v5e:2x4, v6e:4x4, v5p:2x2x4")
  parser.add_argument("--devices", type=int)
  arguments, overrides = parser.parse_known_args()
  chips = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology).devices[
    : arguments.devices
  ]
  config = config_lib.load(arguments.config, overrides)
  training = mesh.make_mesh(config.mesh, chips)
  sampling = mesh.sampler_mesh(config.mesh, training)
  known = pretrained.resolve(config.policy, 0)
  policy = Policy(known, known.vocab_size or id_count(config.task.open().tokenizer()))
  planned = memory(config, policy, training, sampling)

  def on(sharding, dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  def laid_out(shapes, shardings):
    return jax.tree.map(lambda a, s: on(s, a.dtype, *a.shape), shapes, shardings)

  def spread(shapes, mesh_of):
    return jax.tree.map(lambda a: on(batch_sharding(mesh_of), a.dtype, *a.shape), shapes)

  r, optimizer = config.rollout, learner.make_optimizer(config.learner, config.steps)
  p, b, t = r.problems, r.problems * r.group, r.max_tokens

  whole, learning, writing = (
    mesh.param_shapes(policy),
    policy.clone(mesh=training),
    policy.clone(mesh=sampling),
  )
  state = jax.eval_shape(lambda params: learner.init_state(optimizer, params), split(whole)[1])
  state = laid_out(state, mesh.state_shardings(training, policy, optimizer))
  batch = batch_shapes(config, p, r.group)
  batch = batch._replace(reference_BxT=batch.logprobs_BxT if config.learner.has_reference else None)
  frozen = split(laid_out(whole, mesh.param_shardings(training, policy)))[0]
  updating = learner.update.lower(
    learner.Learner(learning, config.learner, r.sampling, optimizer),
    state,
    spread(batch, training),
    on(replicated(training), jnp.bool_),
    frozen or None,
  )
  report(
    "update", updating, planned.parameters + planned.optimizer + sum(planned.updating.values())
  )

  same = replicated(sampling)
  params = jax.eval_shape(lambda params: mesh.sampler_params(policy, params), whole)
  params = laid_out(params, mesh.param_shardings(sampling, policy))
  ids, numbers = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((p,), (p, r.group)))
  prompts = batch.prompts_PxS, batch.prompt_lengths_P
  given = spread(Wanted(*prompts, ids, numbers, ids, ids), sampling)
  start = functools.partial(slots.begin, writing, ring=t, most=t)
  rows = jax.eval_shape(start, params, given, on(same, jax.random.key(0).dtype))
  rows = jax.tree.map(lambda a: on(same, a.dtype) if not a.ndim else spread(a, sampling), rows)
  ends = slots.Ends(on(same, jnp.int32, 1), on(same, jnp.int32), on(same, jnp.int32))
  live = spread(jax.ShapeDtypeStruct((b,), jnp.bool_), sampling)
  lowered = slots.decode.lower(writing, r.sampling, params, ends, rows, live)
  decoding = {**planned.sampling, "keys and values, laid anew": 0}  # That is another program's.
  compiled = report("decode", lowered, planned.parameters + sum(decoding.values()))
  held = held_bytes(params)
  least = held + held_bytes((rows.context.prompt, rows.context.cache))
  moved = loop_traffic(compiled.as_text())
  print(
    f"a decoded token reads {moved.read / 1e9:.2f} GB on each chip, {moved.read / least:.2f} times"
    f" its parameters, prompts and full caches, and writes {moved.written / 1e9:.2f} GB;"
    f" chips exchange {moved.exchanged / 1e6:.3f} MB"
  )

  # Times by the roofline.
  kind = KINDS[arguments.topology.split(":")[0]]
  layers = [whole[name] for name in STACKS if name in whole]
  weights = sum(x.size for x in jax.tree.leaves(layers)) + policy.rows * known.width
  forward = 2 * weights * (b * t + p * r.max_prompt_tokens)
  passes = (2 if known.lora_rank else 3) + (known.remat == "layers") + config.learner.has_reference
  cache = planned.sampling["keys and values"] * (r.max_prompt_tokens + b // p * t / 2)
  cache /= r.max_prompt_tokens + b // p * t
  sampled, updated = t * (held + cache) / kind.bandwidth, passes * forward / kind.flops / len(chips)
  print(
    f"a step takes at least {sampled:.1f} s to sample {t} tokens a row, and {updated:.1f} s to"
    " update"
  )


def held_bytes(tree) -> int:
  """What a chip holds of it."""
  return sum(
    np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def report(name: str, lowered, planned: int):
  """Compiles, and says what memory that takes."""
  begun = time.perf_counter()
  compiled = lowered.compile()
  m, unit = compiled.memory_analysis(), 2**30
  print(
    f"{name}: {m.peak_memory_in_bytes / unit:.2f} GiB on each chip, planned {planned / unit:.2f};"
    f" {estimated_cycles(compiled.as_text()) / 1e9:.4f} billion cycles by the compiler's estimate;"
    f" compiled in {time.perf_counter() - begun:.0f} s",
    flush=True,
  )
  return compiled


def estimated_cycles(hlo: str) -> int:
  """What the compiler thinks that a program takes; a v5e has 1.5 billion cycles a second.

  Of branches the last counts, so parts of a batch are of the whole width, and layers have windows
  where any has; a loop counts as often as it turns, or once where that is not known.
  """
  bodies: dict[str, list[str]] = {}
  for line in hlo.splitlines():
    if found := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
      name = found[1]
      bodies[name] = []
    elif line.startswith(" "):
      bodies[name].append(line)

  def called(line: str, key: str) -> list[str]:
    found = re.search(rf"{key}=\{{?([^,}}]+(?:, %[^,}}]+)*)", line)
    return re.findall(r"%([\w.\-]+)", found[1]) if found else []

  @functools.cache
  def of(name: str) -> int:
    total = 0
    for line in bodies[name]:
      # What else a line has of them is of its parts.
      total += sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', line)[:1]))
      if " while(" in line:
        (until,) = called(line, "condition")
        turns = re.search(r"s32\[\]\S* constant\((\d+)\)", "\n".join(bodies[until]))
        total += sum(map(of, called(line, "body"))) * (int(turns[1]) if turns else 1)
      elif " conditional(" in line:
        total += of(called(line, "branch_computations")[-1])
      elif " call(" in line:
        total += sum(map(of, called(line, "to_apply")))
    return total

  return of(re.search(r"^ENTRY %?([\w.\-]+)", hlo, re.MULTILINE)[1])


# What a compiled program moves between a chip's memory (HBM) and its units, by its scheduled HLO.

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_SHAPE = re.compile(r"\b(pred|bf16|[fsu]\d+)\[([\d,]*)\]((?:\{[^}]*\})?)")
_LINE = re.compile(r"^\s+(?:ROOT )?(%[\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_IN_PLACE = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant")
_COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


class Traffic(NamedTuple):
  """Of one turn of a loop."""

  read: int
  """Bytes of HBM; where an operation reads a part of what it is given, all of it counts."""
  written: int
  exchanged: int
  """Bytes that operations of several chips give to each."""


def loop_traffic(hlo: str) -> Traffic:
  """Of the program's first `while`; its own loops count as one turn."""
  body = re.findall(r"while\(.*?body=(%[\w.\-]+)", hlo)[-1]
  begin = hlo.index(f"\n{body} ")
  types: dict[str, str] = {}
  read = written = exchanged = 0
  for line in hlo[begin : hlo.index("\n}", begin)].splitlines():
    if not (found := _LINE.match(line)):
      continue
    name, kind, operation, rest = found.groups()
    types[name] = kind
    if operation.removesuffix("-start") in _COLLECTIVES:
      exchanged += sum(_size(shape) for shape in _SHAPE.findall(kind))
    if operation in _IN_PLACE or operation.endswith("-done"):
      continue
    given = [types.get(operand, "") for operand in _operands(rest)]
    if operation.endswith("-start"):  # A copy to or from VMEM, under way beside the rest.
      source, target = _SHAPE.findall(kind)[:2]
      if operation == "copy-start":
        source, target = target, source
      moved = min(_size(source), _size(target))
      read += moved * _in_hbm(source)
      written += moved * _in_hbm(target)
      continue
    if operation == "dynamic-update-slice":  # What is written is the update.
      given, kind = given[1:], given[1]
    if name.startswith("%gather"):
      given = [kind, *given[1:]]
    read += sum(_hbm(one) for one in given)
    written += _hbm(kind)
  return Traffic(read, written, exchanged)


def _operands(rest: str) -> list[str]:
  depth = 1
  for i, letter in enumerate(rest):
    depth += (letter == "(") - (letter == ")")
    if not depth:
      return re.findall(r"%[\w.\-]+", rest[:i])
  return []


def _hbm(kind: str) -> int:
  return sum(_size(shape) for shape in _SHAPE.findall(kind) if _in_hbm(shape))


def _in_hbm(shape: tuple[str, str, str]) -> bool:
  return "S(" not in shape[2]


def _size(shape: tuple[str, str, str]) -> int:
  kind, dimensions, _ = shape
  return math.prod(map(int, filter(None, dimensions.split(",")))) * _BYTES.get(kind, 4)


if __name__ == "__main__":
  main()
