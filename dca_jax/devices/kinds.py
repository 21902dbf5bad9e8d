"""Devices that the program knows, by what their vendors say of them."""

from typing import NamedTuple


class Kind(NamedTuple):
  """What one device has; a chip of tpu7x is two devices."""

  memory: float
  """Bytes."""
  bandwidth: float
  """Bytes of that memory a second."""
  flops: float
  """Operations a second of products in bfloat16, nothing left out for sparsity."""
  names: tuple[str, ...]
  """That JAX gives it."""


# Written down without a look at their sources, which are docs.cloud.google.com/tpu/docs/v5e, v5p,
# v6e and tpu7x, and NVIDIA's data sheets of the H100 and H200 (SXM), the A100 (SXM, 40 and 80 GB)
# and the L4, whose figures "with sparsity" are halved.
KINDS = {
  "v5e": Kind(16e9, 0.82e12, 197e12, ("TPU v5 lite", "TPU v5e")),
  "v6e": Kind(32e9, 1.64e12, 918e12, ("TPU v6 lite", "TPU v6e")),
  "v5p": Kind(95e9, 2.77e12, 459e12, ("TPU v5", "TPU v5p")),
  "tpu7x": Kind(96e9, 7.38e12 / 2, 2307e12 / 2, ("TPU7x",)),
  "L4": Kind(24e9, 0.30e12, 121e12, ("NVIDIA L4",)),
  "A100-40": Kind(40e9, 1.555e12, 312e12, ("NVIDIA A100-SXM4-40GB",)),
  "A100-80": Kind(80e9, 2.039e12, 312e12, ("NVIDIA A100-SXM4-80GB",)),
  "H100": Kind(80e9, 3.35e12, 989e12, ("NVIDIA H100 80GB HBM3",)),
  "H200": Kind(141e9, 4.80e12, 989e12, ("NVIDIA H200",)),
}


def kind_of(name: str) -> Kind | None:
  """The kind that JAX calls `name`, if it is known."""
  return next((kind for kind in KINDS.values() if name in kind.names), None)
