"""Low-rank adapters (LoRA, Hu et al. 2022): which parameters are trained,
and adapters added to the weights they adapt.

A weight W with an adapter works as W + alpha / rank * A B. Only A and B are trained; they are
parameters of the policy like all others, and told apart by their names, `lora_a` and `lora_b`.
"""

from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict


def split(params) -> tuple[dict[str, Any], dict[str, Any]]:
  """Parameters (or anything else of their structure) as those that stay and those that are trained.

  Where there are no adapters everything is trained.
  """
  flat = flatten_dict(params)
  trained = {path: x for path, x in flat.items() if path[-1].startswith("lora_")} or flat
  return unflatten_dict(
    {path: x for path, x in flat.items() if path not in trained}
  ), unflatten_dict(trained)


def join(frozen, trained) -> dict[str, Any]:
  """The inverse of `split`; copies nothing."""
  return unflatten_dict(flatten_dict(frozen) | flatten_dict(trained))


def merge(params, scale: float) -> dict[str, Any]:
  """Parameters without adapters that compute the same; `scale` is alpha / rank."""
  frozen, adapters = (flatten_dict(part) for part in split(params))
  for path, b in adapters.items():
    if path[-1] == "lora_b":
      kernel, a = (*path[:-1], "kernel"), adapters[*path[:-1], "lora_a"]
      # A's last axis and B's first behind those of layers are the rank; the kernel has all others.
      layers = b.shape[: a.ndim + b.ndim - 2 - frozen[kernel].ndim]
      rank = b.shape[len(layers)]
      product = jnp.asarray(a).reshape(*layers, -1, rank) @ b.reshape(*layers, rank, -1)
      frozen[kernel] = frozen[kernel].astype(jnp.float32) + scale * product.reshape(
        frozen[kernel].shape
      )
  return unflatten_dict(frozen)
