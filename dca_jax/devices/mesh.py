"""The device mesh, and where every array lives on it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import cast

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from dca_jax.errors import UserError
from dca_jax.learner import TrainState
from dca_jax.policy import Policy, split
from dca_jax.policy.sharding import AXES, AnyMesh, batch_sharding, replicated, rules

_TYPES = (AxisType.Auto,) * 3


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """The `mesh` section: devices along each axis; -1 takes the rest."""

  data: int = -1
  """Copies of the parameters, each with its own part of the batch."""
  fsdp: int = 1
  """Parts of the parameters; these devices share the batch too."""
  tensor: int = 1
  """Parts of each matrix product."""
  sampler: tuple[int, ...] = ()
  """The same three while sampling, such as (-1, 1, 1); the parameters are laid out so once a step,
  each process having all of them. Empty: as above, within each process."""

  @property
  def sizes(self) -> tuple[int, ...]:
    return self.data, self.fsdp, self.tensor

  def check(self) -> dict[str, str]:
    named = dict(zip(AXES, self.sizes, strict=True))
    bad = {
      key: "must be positive, or -1 for the rest" for key, n in named.items() if n == 0 or n < -1
    }
    if self.sizes.count(-1) > 1:
      bad["data"] = "only one axis of the mesh can be -1"
    if (
      len(self.sampler) not in (0, 3)
      or any(n == 0 or n < -1 for n in self.sampler)
      or self.sampler.count(-1) > 1
    ):
      bad["sampler"] = (
        "must be empty, or (data, fsdp, tensor), each positive, or one of them -1 for the rest"
      )
    return bad


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] = ()) -> Mesh:
  """The mesh for training, of all devices unless given some. Raises UserError
  where they do not fill it."""
  devices = devices or jax.devices()
  shape = _fill("mesh.data x mesh.fsdp x mesh.tensor", config.sizes, len(devices))
  # Parameters are laid out anew for sampling without leaving this order.
  return Mesh(by_process(device_order(shape, devices)), AXES, axis_types=_TYPES)


def sampler_mesh(config: MeshConfig, mesh: Mesh) -> Mesh:
  """The mesh for sampling, of the same devices in the same order; each process has a part of its
  `data` axis, and so all parameters.

  Raises:
    UserError: the devices do not fill it, or do not come apart by process.
  """
  processes = len({device.process_index for device in mesh.devices.flat})
  each = mesh.devices.size // processes
  if config.sampler:
    shape = _fill("mesh.sampler", config.sampler, mesh.devices.size)
  else:
    tensor = mesh.shape["tensor"]
    fsdp = math.gcd(mesh.shape["fsdp"], max(1, each // tensor))
    shape = mesh.devices.size // (fsdp * tensor), fsdp, tensor
  if shape[0] % processes:
    raise UserError(
      f"{'mesh.sampler' if config.sampler else 'the mesh'} would spread a copy of the parameters"
      f" over several of the {processes} processes while sampling; set mesh.sampler=(-1, FSDP,"
      f" TENSOR) with FSDP x TENSOR at most the {each} devices of a process"
    )
  return Mesh(mesh.devices.reshape(shape), AXES, axis_types=_TYPES)


def own_mesh(mesh: Mesh) -> Mesh:
  """This process's part of the mesh for sampling."""
  mine = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
  return Mesh(np.array(mine).reshape(-1, *mesh.devices.shape[1:]), AXES, axis_types=_TYPES)


def abstract_meshes(config: MeshConfig, devices: int) -> tuple[AbstractMesh, AbstractMesh]:
  """The meshes for training and for sampling of devices that need not exist."""
  shape = _fill("mesh.data x mesh.fsdp x mesh.tensor", config.sizes, devices)
  sampler = _fill("mesh.sampler", config.sampler, devices) if config.sampler else shape
  return AbstractMesh(shape, AXES), AbstractMesh(sampler, AXES)


def _fill(name: str, sizes: tuple[int, ...], devices: int) -> tuple[int, ...]:
  fixed = int(np.prod([n for n in sizes if n > 0]))
  shape = tuple(devices // fixed if n == -1 else n for n in sizes)
  if np.prod(shape) != devices:
    raise UserError(f"{name} = {' x '.join(map(str, sizes))} does not fit {devices} device(s)")
  return shape


def device_order(shape: tuple[int, ...], devices) -> np.ndarray:
  """`devices` in the shape of the mesh, neighbours in it close to each other.

  Between slices of a pod the network is slow, so only one axis goes across them: `data`,
  or else `fsdp`.
  """
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices == 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  across = next((axis for axis in (0, 1) if shape[axis] % slices == 0), None)
  if across is None:
    raise UserError(
      f"neither mesh.data = {shape[0]} nor mesh.fsdp = {shape[1]} is a multiple of the {slices}"
      " slices"
    )
  within, between = list(shape), [1, 1, 1]
  within[across], between[across] = shape[across] // slices, slices
  return mesh_utils.create_hybrid_device_mesh(
    within, between, devices, allow_split_physical_axes=True
  )


def by_process(order: np.ndarray) -> np.ndarray:
  """The devices in the same order, except that those of one process follow each other."""
  processes = list(dict.fromkeys(device.process_index for device in order.flat))
  return np.array(
    sorted(order.flat, key=lambda device: processes.index(device.process_index))
  ).reshape(order.shape)


def check_rows(mesh: AnyMesh, problems: int, carry: int = 0) -> None:
  """Raises UserError where problems do not spread evenly."""
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  for key, n in {"problems": problems, "carry": carry}.items():
    if n % shards:
      raise UserError(
        f"rollout.{key} = {n} does not divide over the {shards} devices of mesh.data x mesh.fsdp"
      )


def state_shardings(
  mesh: AnyMesh,
  policy: Policy,
  optimizer: optax.GradientTransformation,
  value_head=None,
  behind: bool = False,
  credit=None,
  unfinished=None,
) -> TrainState:
  """The sharding of every leaf of the train state; optimizer moments lie where their parameters do.

  A jitted `optimizer.init` would replicate the moments, so they are named here.
  """
  params = split(param_shardings(mesh, policy))[1]
  opt_state = optax.tree_utils.tree_map_params(
    optimizer,
    lambda _, sharding: sharding,
    jax.eval_shape(optimizer.init, split(param_shapes(policy))[1]),
    params,
    transform_non_params=lambda _: replicated(mesh),
  )
  head, kept = jax.tree.map(lambda _: replicated(mesh), (value_head, credit))
  rows = jax.tree.map(lambda _: batch_sharding(mesh), unfinished)
  return TrainState(params, opt_state, head, params if behind else None, kept, rows)


def param_shapes(policy: Policy):
  return nn.unbox(jax.eval_shape(policy.init_params, jax.random.key(0)))


def param_shardings(mesh: AnyMesh, policy: Policy):
  """The sharding of every parameter.

  Raises:
    UserError: a parameter does not divide over an axis of the mesh.
  """
  boxed = jax.eval_shape(policy.init_params, jax.random.key(0))
  params = nn.logical_to_mesh_sharding(
    nn.get_partition_spec(boxed), cast(Mesh, mesh), rules(mesh, policy.rows)
  )
  for (path, param), sharding in zip(
    jax.tree.leaves_with_path(nn.unbox(boxed)), jax.tree.leaves(params), strict=True
  ):
    for size, axis in zip(param.shape, sharding.spec, strict=False):
      if isinstance(axis, str) and size % mesh.shape[axis]:
        name = ".".join(key.key for key in path)
        raise UserError(
          f"mesh.{axis} = {mesh.shape[axis]} does not divide {size}, a side of the policy's {name}"
          f" {param.shape}; set mesh.{axis} to a divisor, or change the policy section"
        )
  return params


def sampler_params(policy: Policy, params):
  """Parameters as sampling reads them, in the type of its products.

  Norms and routers work in float32: a rounded router would choose other experts than the learner's.
  """

  def rounded(path, x):
    exact = {key.key for key in path} & {"scale", "router"}
    return x if exact else x.astype(policy.config.dtype)

  return jax.tree.map_with_path(rounded, params)


def relay(mesh: Mesh, sampler: Mesh, policy: Policy) -> Callable:
  """A function that makes `sampler_params` and lays them out for sampling, as arrays of this
  process's own devices; it copies nothing where nothing changes."""
  laid_out, own = None, own_mesh(sampler)
  if sampler != mesh or policy.config.kept != policy.config.dtype:
    shardings = param_shardings(sampler, policy)
    laid_out = jax.jit(functools.partial(sampler_params, policy), out_shardings=shardings)

  def local(x: jax.Array) -> jax.Array:
    sharding = NamedSharding(own, cast(NamedSharding, x.sharding).spec)
    parts = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

  def relayed(params):
    params = laid_out(params) if laid_out else params
    return jax.tree.map(local, params) if own != sampler else params

  return relayed
