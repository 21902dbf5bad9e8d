"""How much memory a run takes on each device, from shapes alone: nothing is allocated,
no device is needed."""

import collections
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dca_jax import learner
from dca_jax.config import Config
from dca_jax.devices import mesh
from dca_jax.devices.kinds import KINDS
from dca_jax.devices.memory import bytes_of, local_memory, size_of
from dca_jax.learner.parts import part_rows, prompt_chunks
from dca_jax.policy import Policy, Prompts, join, pretrained, split
from dca_jax.policy.config import STACKS
from dca_jax.policy.logprobs import chunk_logits
from dca_jax.rollout.schedule import ladder, ring_sizes
from dca_jax.tasks.tokenizer import id_count

_FREE = 0.1  # Part of a device's memory that is left to programs and to fragmentation.


class Memory(NamedTuple):
  """Bytes on each device."""

  parameters: int
  optimizer: int
  copies: int
  """The reference policy, the policy one step behind, and trained reviewers."""
  sampling: dict[str, int]
  updating: dict[str, int]

  @property
  def resident(self) -> int:
    return self.parameters + self.optimizer + self.copies

  @property
  def peak(self) -> int:
    return self.resident + max(sum(self.sampling.values()), sum(self.updating.values()))


def memory(config: Config, policy: Policy, devices: mesh.AnyMesh, sampler: mesh.AnyMesh) -> Memory:
  """What a run of `config` takes on each device of a mesh.

  What stays is exact. Activations are what the backward pass of one micro-batch keeps, as JAX
  traces it, counted as if `tensor` did not divide them; XLA may need less, and buffers of its own
  besides.
  """
  c, rollout, learning = policy.config, config.rollout, config.learner
  optimizer = learner.make_optimizer(learning, config.steps)
  whole = mesh.param_shapes(policy)
  shapes = jax.eval_shape(lambda p: learner.init_state(optimizer, p), split(whole)[1])
  shardings = mesh.state_shardings(devices, policy, optimizer)
  parameters = bytes_of(whole, mesh.param_shardings(devices, policy))
  trained = bytes_of(shapes.params, shardings.params)
  moments = bytes_of(shapes.opt_state, shardings.opt_state)
  copies = (learning.has_reference + bool(config.reviewer.overlap)) * trained
  copies += sum(member.device_bytes for member in config.reviewer.members)

  problems = rollout.problems // (devices.shape["data"] * devices.shape["fsdp"])
  rows = problems * (rollout.group + config.rewrite.most)
  part = part_rows(devices, rows, rollout.max_tokens, learning.micro_batches)
  chunk = problems // prompt_chunks(None, problems, learning.micro_batches)
  tokens, read = part * rollout.max_tokens, problems * rollout.max_prompt_tokens
  position = keys_bytes(policy, 1) // devices.shape["tensor"]
  updating = {
    # Of all parts so far, in float32, and of this one.
    "gradients": moments // 2 + trained,
    "keys of the prompts, their gradients": read
    * (position + 4 * position // jnp.dtype(c.dtype).itemsize),
    "activations of a part": _saved(config, policy, part, chunk),
    "logits of a chunk": 2 * 4 * min(chunk_logits(policy.rows, c.width), tokens * policy.rows),
  }
  return Memory(parameters, moments, copies, _sampling(config, policy, sampler), updating)


def _sampling(config: Config, policy: Policy, sampler: mesh.AnyMesh) -> dict[str, int]:
  c, rollout, shards = policy.config, config.rollout, sampler.shape["data"] * sampler.shape["fsdp"]
  # Evaluation draws batches of the same shape.
  at_once = config.engine.at_once(rollout)
  problems = -(-at_once // rollout.group // shards)
  length, rows = rollout.max_prompt_tokens, problems * rollout.group
  prompts = problems * length
  if at_once < rollout.problems * rollout.group or rollout.carry:
    prompts = rows * length  # Where rows follow others, each has a prompt of its own.
  further = config.value.answers or config.spot.share or config.rewrite.most
  if further or "environment" in config.task.offers:  # Answers have their beginning as prompt.
    prompts = rows * (length + rollout.max_tokens)
  rings = ring_sizes(rollout.max_tokens)
  place, ring = (keys_bytes(policy, size) // sampler.shape["tensor"] for size in (1, rings[-1]))
  whole, laid_out = mesh.param_shapes(policy), mesh.param_shardings(sampler, policy)
  read = jax.eval_shape(lambda params: mesh.sampler_params(policy, params), whole)
  stacks = [name for name in STACKS if name in read]
  copied = config.mesh.sampler or c.kept != c.dtype
  decoded = {
    "layers, taken apart": bytes_of(*({k: tree[k] for k in stacks} for tree in (read, laid_out))),
    "logits of one token": 3 * 4 * rows * policy.rows,
  }
  # Where fewer rows are laid anew, each with a prompt of its own, all are still there, and what is
  # there only while they decode is not.
  fewer = max(ladder(rows, 1)[1:], default=0) if len(rings) > 1 else 0
  again = fewer * (length * place + ring)
  return {
    "parameters as the sampler has them": bytes_of(read, laid_out) if copied else 0,
    "keys and values": prompts * place + rows * ring,
    **decoded,
    "keys and values, laid anew": max(0, again - sum(decoded.values())),
  }


def keys_bytes(policy: Policy, size: int) -> int:
  """What the keys and values of `size` tokens take, in all layers, in a ring of that size."""
  cache = jax.eval_shape(lambda: policy.empty_cache(1, size))
  return sum(size_of(x.shape, x.dtype) for x in jax.tree.leaves(cache))


def _saved(config: Config, policy: Policy, rows: int, problems: int) -> int:
  """Bytes that the backward pass keeps from the forward pass, of a part of so many rows or of the
  prompts of a micro-batch, whichever are more."""
  params, optimizer = (
    mesh.param_shapes(policy),
    learner.make_optimizer(config.learner, config.steps),
  )
  settings = learner.Learner(policy, config.learner, config.rollout.sampling, optimizer)

  def read(params, batch):
    return policy.read_prompts(params, batch.prompts_PxS, batch.prompt_lengths_P)

  def of_prompts(params, batch):
    frozen, trained = split(params)
    return jax.vjp(lambda trained: read(join(frozen, trained), batch)[:2], trained)[1]

  def of_part(params, batch, prompts):
    frozen, trained = split(params)

    def loss(trained, left):
      whole = join(frozen, trained), Prompts(left[0], left[1], prompts.lengths_P)
      return learner.loss_sums(settings, *whole, batch.rows, jnp.bool_(True))[0]

    return jax.vjp(loss, trained, prompts[:2])[1]

  def count(tree):
    return collections.Counter((a.shape, a.dtype) for a in jax.tree.leaves(tree))

  def kept(f, *given):
    # What has the shape of a parameter is one, which stays anyway.
    extra = count(jax.eval_shape(f, params, *given)) - count(params)
    return sum(n * size_of(*array) for array, n in extra.items())

  part = batch_shapes(config, rows, 1)
  prompts = jax.eval_shape(read, params, part)
  return max(kept(of_part, part, prompts), kept(of_prompts, batch_shapes(config, problems, 1)))


def batch_shapes(config: Config, problems: int, group: int) -> learner.Batch:
  """Shapes of what an update reads, without a reference policy."""
  rows, t = problems * group, config.rollout.max_tokens

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)

  tokens, floats = array(jnp.int32, rows, t), array(jnp.float32, rows, t)
  prompts = array(jnp.int32, problems, config.rollout.max_prompt_tokens)
  sampled, trained = array(jnp.bool_, rows, t), array(jnp.bool_, rows)
  lengths = array(jnp.int32, problems)
  return learner.Batch(prompts, lengths, tokens, sampled, trained, floats, None, floats)


def plan(config: Config, devices: int) -> str:
  """A table of the memory on each of so many devices, and which chips it fits.

  Raises:
    UserError: the mesh does not fit so many devices, or the policy
      or the batch does not divide over it.
  """
  # A model's config.json has the size of its vocabulary, so neither its tokenizer nor the data are
  # needed.
  known = pretrained.resolve(config.policy, 0)
  policy = Policy(known, known.vocab_size or id_count(config.task.open().tokenizer()))
  training, sampling = mesh.abstract_meshes(config.mesh, devices)
  mesh.check_rows(training, config.rollout.problems, config.rollout.carry)
  m = memory(config, policy, training, sampling)
  count = sum(size_of(a.shape, jnp.int8) for a in jax.tree.leaves(mesh.param_shapes(policy)))
  layout = ", ".join(f"{axis} {n}" for axis, n in training.shape.items())
  unit, name = (2**30, "GiB") if m.peak > 2**30 else (2**20, "MiB")
  lines = [f"{count:,} parameters; {name} on each of {devices} device(s) ({layout})", ""]
  stays = {"parameters": m.parameters, "optimizer": m.optimizer, "copies of the policy": m.copies}
  for title, part in (
    ("", stays),
    ("while sampling:", m.sampling),
    ("while updating:", m.updating),
  ):
    lines += [title] if title else []
    lines += [f"  {what:36}{size / unit:10.2f}" for what, size in part.items() if size]
  lines += [f"  {'at most':36}{m.peak / unit:10.2f}", ""]
  local, size = local_memory()
  for chip, room in {**{name: kind.memory for name, kind in KINDS.items()}, local: size}.items():
    verdict = "fits" if m.peak < (1 - _FREE) * room else "does not fit"
    lines.append(f"{chip}, {room / 2**30:.1f} GiB: {verdict}")
  return "\n".join(lines)
