"""How much memory a run takes on each device, from shapes alone: nothing is allocated,
no device is needed."""

import collections
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dca_jax import learner
from dca_jax.config import Config
from dca_jax.devices import mesh
from dca_jax.devices.memory import bytes_of, local_memory, size_of
from dca_jax.learner.parts import part_rows
from dca_jax.policy import Policy, Prompts, join, pretrained, split
from dca_jax.policy.logprobs import CHUNK_LOGITS
from dca_jax.rollout.schedule import ring_sizes
from dca_jax.tasks.tokenizer import id_count

# GB of each device's memory, docs.cloud.google.com/tpu/docs. A chip of tpu7x is two devices.
_CHIPS = {"v5e": 16, "v6e": 32, "v5p": 95, "tpu7x": 96}
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
  c, rollout = policy.config, config.rollout
  optimizer = learner.make_optimizer(config.learner, config.steps)
  whole = mesh.param_shapes(policy)
  shapes = jax.eval_shape(lambda p: learner.init_state(optimizer, p), split(whole)[1])
  shardings = mesh.state_shardings(devices, policy, optimizer)
  parameters = bytes_of(whole, mesh.param_shardings(devices, policy))
  trained = bytes_of(shapes.params, shardings.params)
  moments = bytes_of(shapes.opt_state, shardings.opt_state)
  copies = (bool(config.learner.reference) + bool(config.reviewer.overlap)) * trained
  copies += sum(member.device_bytes for member in config.reviewer.members)

  def rows(on, problems: int) -> int:
    return problems // (on.shape["data"] * on.shape["fsdp"])

  problems, item = rows(sampler, rollout.problems + rollout.carry), jnp.dtype(c.dtype).itemsize
  heads = c.kv_heads // sampler.shape["tensor"]
  # Evaluation draws batches of the same shape. Further answers have their own beginning as prompt.
  length, decoding = rollout.max_prompt_tokens, problems * rollout.group
  prompts = problems * length
  further = config.value.answers or config.spot.share or config.rewrite.most
  if further or "environment" in config.task.offers:
    prompts = decoding * (length + rollout.max_tokens)
  # Where a ring grows, the one before it is still there.
  grown = sum(ring_sizes(rollout.max_tokens)[-2:])
  positions = prompts + decoding * grown
  read = jax.eval_shape(lambda params: mesh.sampler_params(policy, params), whole)
  copied = config.mesh.sampler or c.kept != c.dtype
  sampling = {
    "parameters as the sampler has them": bytes_of(read, mesh.param_shardings(sampler, policy))
    if copied
    else 0,
    "layers, taken apart": bytes_of(
      read["blocks"], mesh.param_shardings(sampler, policy)["blocks"]
    ),
    "keys and values": 2 * c.depth * heads * c.head_dim * item * positions,
    "logits of one token": 3 * 4 * decoding * policy.rows,
  }
  problems, n = rows(devices, rollout.problems), config.learner.micro_batches
  all_rows = problems * (rollout.group + config.rewrite.most)
  part = part_rows(devices, all_rows, rollout.max_tokens, n)
  tokens, position = part * rollout.max_tokens, 2 * c.depth * heads * c.head_dim
  read = problems * rollout.max_prompt_tokens
  updating = {
    # Of all parts so far, in float32, and of this one.
    "gradients": moments // 2 + trained,
    "keys of the prompts, their gradients": position * read * (item + 4),
    "activations of a part": _saved(config, policy, part, problems // n),
    "logits of a chunk": 3 * 4 * min(max(CHUNK_LOGITS, policy.rows), tokens * policy.rows),
  }
  return Memory(parameters, moments, copies, sampling, updating)


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
  rollout = config.rollout
  mesh.check_rows(training, rollout.problems, config.learner.micro_batches, rollout.carry)
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
  for chip, room in {**{chip: gb * 1e9 for chip, gb in _CHIPS.items()}, local: size}.items():
    verdict = "fits" if m.peak < (1 - _FREE) * room else "does not fit"
    lines.append(f"{chip}, {room / 2**30:.1f} GiB: {verdict}")
  return "\n".join(lines)
