"""The device mesh, and where every array lives on it."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dca_jax.errors import UserError
from dca_jax.learner import TrainState
from dca_jax.policy import Policy

# Logical axis of a parameter -> mesh axis. Names that are missing are not sharded.
_RULES = (("embed", "fsdp"), ("heads", "tensor"), ("kv_heads", "tensor"), ("mlp", "tensor"), ("vocab", "tensor"))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """The `mesh` section: devices along each axis; -1 takes the rest."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1

  def check(self) -> dict[str, str]:
    sizes = dataclasses.asdict(self)
    bad = {k: "must be positive, or -1 for the rest" for k, n in sizes.items() if n == 0 or n < -1}
    if list(sizes.values()).count(-1) > 1:
      bad["data"] = "only one axis of the mesh can be -1"
    return bad


def make_mesh(config: MeshConfig) -> Mesh:
  """Raises UserError where the devices do not fill the mesh."""
  sizes, devices = dataclasses.astuple(config), jax.devices()
  fixed = int(np.prod([n for n in sizes if n > 0]))
  shape = tuple(len(devices) // fixed if n == -1 else n for n in sizes)
  if np.prod(shape) != len(devices):
    raise UserError(
      f"mesh.data x mesh.fsdp x mesh.tensor = {' x '.join(map(str, sizes))} does not fit {len(devices)} device(s)"
    )
  return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over all data-parallel devices."""
  return NamedSharding(mesh, P(("data", "fsdp")))


def check_divisible(mesh: Mesh, problems: int) -> None:
  """Raises UserError where a micro-batch of `problems` does not spread evenly over the data-parallel devices."""
  devices = mesh.shape["data"] * mesh.shape["fsdp"]
  if problems % devices:
    raise UserError(
      f"rollout.problems / learner.micro_batches = {problems} does not divide over the {devices} devices of"
      " mesh.data x mesh.fsdp"
    )


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def state_shardings(
  mesh: Mesh, policy: Policy, optimizer: optax.GradientTransformation, value_head=None, behind: bool = False
) -> TrainState:
  """The sharding of every leaf of the train state; optimizer moments lie where their parameters do.

  A jitted `optimizer.init` would replicate the moments, so they are named here.

  Raises:
    UserError: a parameter does not divide over an axis of the mesh.
  """
  boxed = jax.eval_shape(policy.init_params, jax.random.key(0))
  # A vocabulary is as large as it is; where it does not divide, it is not sharded.
  rules = [rule for rule in _RULES if rule[0] != "vocab" or policy.rows % mesh.shape["tensor"] == 0]
  params = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules)
  for (path, param), sharding in zip(jax.tree.leaves_with_path(nn.unbox(boxed)), jax.tree.leaves(params), strict=True):
    for size, axis in zip(param.shape, sharding.spec, strict=False):
      if axis and size % mesh.shape[axis]:
        name = ".".join(key.key for key in path)
        raise UserError(
          f"mesh.{axis} = {mesh.shape[axis]} does not divide {size}, a side of the policy's {name} {param.shape};"
          f" set mesh.{axis} to a divisor, or change the policy section"
        )
  opt_state = optax.tree_utils.tree_map_params(
    optimizer,
    lambda _, sharding: sharding,
    jax.eval_shape(optimizer.init, nn.unbox(boxed)),
    params,
    transform_non_params=lambda _: replicated(mesh),
  )
  head = jax.tree.map(lambda _: replicated(mesh), value_head)
  return TrainState(params, opt_state, head, params if behind else None)
