"""How a batch is cut into parts, so that few positions are computed that nobody trains on.

The rows of each shard of devices are sorted by length and cut into parts of equally many rows. A
part is computed as wide as its longest row needs, in one of a few widths; each width is compiled
once, and a part where nothing counts costs nothing. The devices decide all of it from the mask of
tokens that count, so there is one program whatever the lengths are, and all processes agree.

Shapes: D shards of N rows each, B = D * N; parts of R rows a shard.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dca_jax.learner.loss import Batch
from dca_jax.policy import Policy, Prompts
from dca_jax.policy.sharding import AnyMesh, constrain

# A batch is cut until its parts have so few positions on a device, but into so many at most.
# Smaller parts waste less on their longest rows, and more on adding up gradients.
_POSITIONS, _MOST = 2048, 16
# So many times larger where parameters are spread over devices: every part gathers them anew.
_SPREAD = 4
# Widths beside the whole one, as fractions of it; narrower ones are not worth compiling.
_FRACTIONS, _NARROWEST = (1 / 4, 3 / 8, 5 / 8), 64


class Part(NamedTuple):
  """Some rows of a batch; or all parts, along a further axis in front."""

  rows_DxR: jax.Array
  """Which of its shard's rows; N where there is none."""
  width: jax.Array
  """Number of the least width that holds them, from 1; 0 where nothing counts."""


def widths(most: int) -> list[int]:
  """How wide a part may be, in rising order."""
  narrower = [-int(-most * fraction // 8) * 8 for fraction in _FRACTIONS]
  return [width for width in narrower if _NARROWEST <= width < most] + [most]


def part_rows(mesh: AnyMesh | None, rows: int, most: int, micro_batches: int) -> int:
  """How many of a device's `rows` of up to `most` tokens are computed together."""
  positions = _POSITIONS * (_SPREAD if mesh and mesh.shape["fsdp"] > 1 else 1)
  parts = max(micro_batches, min(_MOST, rows * most // positions))
  return -(-rows // min(rows, parts))


def shards_of(mesh: AnyMesh | None, prompts: int) -> int:
  """Over how many devices rows are spread; where prompts do not divide, each has all of them."""
  shards = mesh.shape["data"] * mesh.shape["fsdp"] if mesh else 1
  return 1 if prompts % shards else shards


def prompt_chunks(mesh: AnyMesh | None, prompts: int, micro_batches: int) -> int:
  """How many chunks prompts are read in, one after the other: at most `micro_batches`, and so many
  that every device has as many prompts in each."""
  own = prompts // shards_of(mesh, prompts)
  return max(n for n in range(1, min(own, micro_batches) + 1) if own % n == 0)


def cut(policy: Policy, prompts: int, counted_BxT: jax.Array, micro_batches: int = 1) -> Part:
  """All parts of a batch, the longest rows first.

  Args:
    prompts: how many the batch has; a shard of devices has those of its rows.
    counted_BxT: tokens that count. A row is as long as its last one is far.
    micro_batches: how many parts there are at least.
  """
  b, t = counted_BxT.shape
  shards = shards_of(policy.mesh, prompts)
  rows = b // shards
  size = part_rows(policy.mesh, rows, t, micro_batches)
  lengths_B = jnp.where(counted_BxT, jnp.arange(1, t + 1), 0).max(1)
  lengths_DxN = lengths_B.reshape(shards, rows)
  order_DxN = jnp.argsort(-lengths_DxN, 1, stable=True)
  longest = jnp.take_along_axis(lengths_DxN, order_DxN[:, ::size], 1).max(0)
  order = jnp.pad(order_DxN, ((0, 0), (0, -rows % size)), constant_values=rows)
  number = jnp.searchsorted(jnp.array([0, *widths(t)]), longest)
  return Part(order.reshape(shards, -1, size).swapaxes(0, 1), number)


def in_width(part: Part, most: int, of_width: Callable, *given):
  """`of_width(width, *given)` in the part's own width; zeros where nothing counts.

  Args:
    of_width: gives arrays of the same shapes in every width.
  """
  branches = [functools.partial(of_width, width) for width in widths(most)]

  def nothing(*given):
    shapes = jax.eval_shape(branches[-1], *given)
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

  return jax.lax.switch(part.width, [nothing, *branches], *given)


def widened(x_RxW: jax.Array, most: int) -> jax.Array:
  """[R, W, ...] with zeros after it up to [R, most, ...]."""
  missing = most - x_RxW.shape[1]
  return jnp.pad(x_RxW, ((0, 0), (0, missing), *[(0, 0)] * (x_RxW.ndim - 2)))


def map_hidden(
  policy: Policy, params, batch: Batch, counted_BxT: jax.Array, of_hidden: Callable
) -> jax.Array:
  """What `of_hidden` makes of hidden states [R, W, D] and their tokens [R, W], as [B, T, ...];
  zeros where no part had to be so wide."""
  (b, t), prompts = batch.tokens_BxT.shape, (batch.prompts_PxS, batch.prompt_lengths_P)
  read, p = policy.read_prompts(params, *prompts), len(batch.prompts_PxS)

  def of_width(width, own: Prompts, tokens_RxT):
    tokens_RxW = tokens_RxT[:, :width]
    hidden_RxWxD = policy.continuation_hidden(params, own, tokens_RxW)
    return widened(of_hidden(hidden_RxWxD, tokens_RxW), t)

  def of_part(_, part: Part):
    tokens_RxT = take(policy, batch.tokens_BxT, part.rows_DxR)
    own = take_prompts(policy, read, part.rows_DxR // (b // p))
    return None, in_width(part, t, of_width, own, tokens_RxT)

  parts = cut(policy, p, counted_BxT)
  return in_order(parts, jax.lax.scan(of_part, None, parts)[1], b)


def in_order(parts: Part, x_CxR: jax.Array, rows: int) -> jax.Array:
  """[rows, ...] of what all C parts have [C, D * R, ...]."""
  c, d, r = parts.rows_DxR.shape
  rest = x_CxR.shape[2:]
  places_DxN = jnp.argsort(parts.rows_DxR.swapaxes(0, 1).reshape(d, c * r), 1)[:, : rows // d]
  x_DxN = x_CxR.reshape(c, d, r, *rest).swapaxes(0, 1).reshape(d, c * r, *rest)
  return jax.vmap(lambda x, places: x[places])(x_DxN, places_DxN).reshape(rows, *rest)


def _axes(left, before: int = 0):
  """On which axis of what prompts leave (last states, keys and values, lengths) they are
  counted, behind so many others."""
  _, cache, *lengths = left
  return 0, jax.tree.map(lambda x: x.ndim - 4 - before, cache), *[0] * len(lengths)


def read_prompts(policy: Policy, params, prompts, chunks: int) -> Prompts:
  """Prompts ([P, S], their lengths [P]) read in so many chunks, one after the other."""

  def joined(x, axis):
    x = jnp.moveaxis(x, 0, axis + 1)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

  def read(chunk):
    return tuple(policy.read_prompts(params, *chunk))

  left = jax.lax.map(read, jax.tree.map(lambda x: _chunks(x, 0, chunks), prompts))
  return Prompts(*jax.tree.map(joined, left, _axes(left, before=1)))


def in_chunks(prompts, left, chunks: int):
  """Both with an axis of chunks in front."""
  prompts = jax.tree.map(lambda x: _chunks(x, 0, chunks), prompts)
  return prompts, jax.tree.map(lambda x, axis: _chunks(x, axis, chunks), left, _axes(left))


def _chunks(x: jax.Array, axis: int, chunks: int) -> jax.Array:
  """A chunk takes every n-th on `axis`, so that each device keeps those that it holds."""
  return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, chunks, *x.shape[axis + 1 :]), axis + 1, 0)


def take_prompts(policy: Policy, prompts: Prompts, rows_DxR: jax.Array) -> Prompts:
  """These prompts of each shard's, which may come several times."""
  taken = jax.tree.map(
    lambda x, axis: take(policy, x, rows_DxR, axis), tuple(prompts), _axes(prompts)
  )
  return Prompts(*taken)


def add_prompts(into, rows_DxR: jax.Array, left):
  """`into` plus the gradients with respect to what the prompts of `take_prompts` left."""
  return jax.tree.map(lambda x, y, axis: add(x, rows_DxR, y, axis), into, left, _axes(left))


def take(policy: Policy, x: jax.Array, rows_DxR: jax.Array, axis: int = 0) -> jax.Array:
  """Rows [D * R] of an array that has all of them on `axis`; zeros where there is none."""

  def one(x, rows):
    return jnp.take(x, rows, axis, mode="fill", fill_value=0)

  taken = jax.vmap(one, (axis, 0), axis)(_by_shard(x, rows_DxR, axis), rows_DxR)
  taken = taken.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])
  return constrain(taken, policy.mesh, *[None] * axis, "rows", *[None] * (x.ndim - axis - 1))


def add(into: jax.Array, rows_DxR: jax.Array, x: jax.Array, axis: int = 0) -> jax.Array:
  """`into` plus rows, several of which may belong to one place; the transpose of `take`."""

  def one(into, rows, x):
    return into.at[*[slice(None)] * axis, rows].add(x.astype(into.dtype), mode="drop")

  arrays = _by_shard(into, rows_DxR, axis), rows_DxR, _by_shard(x, rows_DxR, axis)
  return jax.vmap(one, (axis, 0, axis), axis)(*arrays).reshape(into.shape)


def _by_shard(x: jax.Array, rows_DxR: jax.Array, axis: int) -> jax.Array:
  return x.reshape(*x.shape[:axis], len(rows_DxR), -1, *x.shape[axis + 1 :])
