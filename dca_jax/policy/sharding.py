"""Where the arrays of a policy live on a mesh of devices."""

from typing import cast

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
AnyMesh = Mesh | AbstractMesh  # An abstract one has shapes only.


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
  """Rows over all data-parallel devices."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: AnyMesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def rules(mesh: AnyMesh, vocab: int) -> list[tuple[str, str | tuple[str, ...]]]:
  """Logical axis -> mesh axes, in order: the first rule whose mesh axes are free in an array
  applies.

  So logits are spread by the vocabulary where it divides, and the output matrix is never gathered.
  """
  parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
  by_vocab = [("vocab", ("fsdp", "tensor"))] if vocab % parts == 0 else []
  tensor = [(name, "tensor") for name in ("experts", "heads", "kv_heads", "mlp")]
  return [*by_vocab, ("rows", ("data", "fsdp")), ("rows", "data"), ("embed", "fsdp"), *tensor]


def constrain(x: jax.Array, mesh: Mesh | None, *names: str | None, vocab: int = 1) -> jax.Array:
  """`x` laid out by the names of its axes; without this XLA may compute every row on every
  device."""
  if mesh is None or mesh.size == 1:
    return x
  spec = cast(PartitionSpec, nn.logical_to_mesh_axes(names, rules(mesh, vocab)))
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
