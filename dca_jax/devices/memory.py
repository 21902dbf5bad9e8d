"""Memory of devices, from shapes alone."""

import math
import os

import jax
import jax.numpy as jnp

from dca_jax.errors import UserError


def bytes_of(shapes, shardings) -> int:
  """Bytes on each device of arrays that are given as shapes."""
  leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
  return sum(size_of(sharding.shard_shape(a.shape), a.dtype) for a, sharding in leaves)


def size_of(shape, dtype) -> int:
  return jnp.dtype(dtype).itemsize * math.prod(shape)


def check_fits(arrays) -> None:
  """Raises UserError where what stays in memory alone, given as shapes with shardings,
  is more than a device has."""
  needed = bytes_of(arrays, jax.tree.map(lambda a: a.sharding, arrays))
  name, room = local_memory()
  if needed > room:
    raise UserError(
      f"parameters and optimizer take {needed / 2**30:.1f} GiB on each device, and {name} has"
      f" {room / 2**30:.1f}; raise mesh.fsdp, or see `dca-jax plan`"
    )


def local_memory() -> tuple[str, float]:
  """A name for the devices of this process, and the bytes that each has."""
  device = jax.local_devices()[0]
  if stats := device.memory_stats():
    return f"a {device.device_kind} of this machine", stats["bytes_limit"]
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  return "a CPU device of this machine", memory / jax.local_device_count()
