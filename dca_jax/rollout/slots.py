"""The engine: rows that decode together; what has ended makes room.

One jitted program decodes all rows until enough of them have ended, or their cache is full. Between
calls the host takes what has ended, puts waiting problems into the free rows, and where none wait
lays the live rows into fewer, and their cache into one of another size.

The keys and values of a row lie in rings that all rows write at the same place: that of the next
token, whichever token of its row it is. So a row can begin at any time, and nothing is moved when
it does. What a row may read of a ring follows from how many tokens it has read.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dca_jax.checks import at_least
from dca_jax.policy import Policy, Prompts, Sampling, by_layer, by_round, sampling_logits
from dca_jax.policy.attention import KeyValue
from dca_jax.policy.sharding import batch_sharding, constrain, replicated
from dca_jax.policy.transformer import Context
from dca_jax.rollout.config import RolloutConfig
from dca_jax.rollout.engine import GREEDY, Begun, EngineConfig, Further, Sample, Wanted
from dca_jax.rollout.schedule import Returning, Schedule, ring_sizes
from dca_jax.rollout.steps import StopFinder
from dca_jax.tasks.tokenizer import end_ids, token_bytes


class Slots(typing.NamedTuple):
  """R rows that decode, each with up to T tokens."""

  context: Context
  hidden_RxD: jax.Array
  """Predicts the next token."""
  keys_R: jax.Array
  """Of a sample's noise; folded with the place of the token in its answer."""
  greedy_R: jax.Array
  limits_R: jax.Array
  begun_R: jax.Array
  """Tokens of the answer that the prompt holds already."""
  tokens_RxT: jax.Array
  logprobs_RxT: jax.Array

  @property
  def lengths_R(self) -> jax.Array:
    """Tokens that each row has written; the last of them has been read too."""
    return self.context.read_B


class Ends(typing.NamedTuple):
  """When decoding ends."""

  ids_E: typing.Any
  """Tokens that end a row."""
  clock: typing.Any
  live: typing.Any
  """Rows that are few enough."""


@functools.partial(jax.jit, static_argnames=("policy", "ring", "most"))
def begin(policy: Policy, params, wanted: Wanted, key, *, ring: int, most: int) -> Slots:
  """Rows that have read their prompts; each prompt is run once for its group.

  Args:
    ring: tokens in the ring of a layer.
    most: tokens in the longest sample.
  """
  group = wanted.numbers_PxG.shape[1]
  prompts = policy.read_prompts(params, wanted.prompts_PxS, wanted.prompt_lengths_P)
  rows = wanted.numbers_PxG.size
  context = Context(
    by_layer(prompts.cache),
    jnp.asarray(wanted.prompt_lengths_P),
    policy.empty_cache(rows, ring),
    jnp.int32(0),
    jnp.zeros(rows, jnp.int32),
  )

  def sample_key(problem, number):
    return jax.random.fold_in(jax.random.fold_in(key, problem), number)

  slots = Slots(
    context,
    jnp.repeat(prompts.last_PxD, group, 0),
    jax.vmap(jax.vmap(sample_key, (None, 0)))(wanted.problems_P, wanted.numbers_PxG).reshape(-1),
    wanted.numbers_PxG.reshape(-1) == GREEDY,
    jnp.repeat(wanted.limits_P, group),
    jnp.repeat(wanted.begun_P, group),
    jnp.zeros((rows, most), jnp.int32),
    jnp.zeros((rows, most), jnp.float32),
  )
  return _spread(policy, slots)


@functools.partial(jax.jit, static_argnames="policy", donate_argnames="slots")
def take_up(policy: Policy, params, slots: Slots, rows_N, tokens_NxU, logprobs_NxU, lengths_N):
  """`slots`, in which no row has written anything, with what the rows `rows_N` wrote in earlier
  steps; it is read with the parameters of today. A row that there is not gets nothing."""
  c = slots.context
  prompts_N = rows_N // (slots.keys_R.shape[0] // c.prompt_lengths_P.shape[0])
  keys = by_round(jax.tree.map(lambda x: x[prompts_N], c.prompt), policy.config.round)
  prompts = Prompts(slots.hidden_RxD[rows_N], keys, c.prompt_lengths_P[prompts_N])
  hidden_NxD, own = policy.read_continuations(params, prompts, tokens_NxU, lengths_N)

  def put(into, x):
    return into.at[rows_N].set(x, mode="drop")

  cache = []
  for ring, written in zip(c.cache, by_layer(own), strict=True):
    size = ring.v.shape[2]
    # The newest token stands last, and the clock at 0; what is before the first is read by nobody.
    places_NxU = jnp.clip(jnp.arange(size) - size + lengths_N[:, None], 0, tokens_NxU.shape[1] - 1)
    k = jnp.take_along_axis(written.k, places_NxU[:, None, None], 3)
    v = jnp.take_along_axis(written.v, places_NxU[:, None, :, None], 2)
    cache.append(jax.tree.map(put, ring, KeyValue(k, v)))
  width = tokens_NxU.shape[1]
  slots = slots._replace(
    context=c._replace(cache=tuple(cache), read_B=put(c.read_B, lengths_N)),
    hidden_RxD=put(slots.hidden_RxD, hidden_NxD),
    tokens_RxT=slots.tokens_RxT.at[rows_N, :width].set(tokens_NxU, mode="drop"),
    logprobs_RxT=slots.logprobs_RxT.at[rows_N, :width].set(logprobs_NxU, mode="drop"),
  )
  return _spread(policy, slots)


@functools.partial(jax.jit, static_argnames=("policy", "sampling"), donate_argnames="slots")
def decode(
  policy: Policy, sampling: Sampling, params, ends: Ends, slots: Slots, live_R: jax.Array
) -> tuple[Slots, jax.Array]:
  """Decodes until the clock says `ends.clock`, or at most `ends.live` rows are live.

  The noise of token t of an answer is its key folded with t, so a sample depends neither on its row
  nor on its neighbours.

  Returns:
    The rows, and which of them are still live.
  """
  rows_R, most = jnp.arange(live_R.shape[0]), slots.tokens_RxT.shape[1]
  layers = policy.layers(params)

  def body(carry):
    s, live_R = carry
    logits_RxV = sampling_logits(s.hidden_RxD, policy.head(params), sampling)
    keys_R = jax.vmap(jax.random.fold_in)(s.keys_R, s.begun_R + s.lengths_R)
    noise_RxV = jax.vmap(lambda key: jax.random.gumbel(key, logits_RxV.shape[1:]))(keys_R)
    noise_RxV = jnp.where(s.greedy_R[:, None], 0.0, noise_RxV)
    token_R = jnp.argmax(logits_RxV + noise_RxV, -1).astype(jnp.int32)
    logit_R = jnp.take_along_axis(logits_RxV, token_R[:, None], 1)[:, 0]
    logprob_R = logit_R - jax.nn.logsumexp(logits_RxV, -1)
    hidden_RxD, cache = policy.decode(params, layers, s.context, token_R)
    at = rows_R, jnp.where(live_R, s.lengths_R, most)  # Beyond the end nothing is written.
    lengths_R = s.lengths_R + live_R
    ended_R = (token_R[:, None] == ends.ids_E).any(1) | (lengths_R >= s.limits_R)
    s = s._replace(
      context=s.context._replace(cache=cache, clock=s.context.clock + 1, read_B=lengths_R),
      hidden_RxD=hidden_RxD,
      tokens_RxT=s.tokens_RxT.at[at].set(token_R, mode="drop"),
      logprobs_RxT=s.logprobs_RxT.at[at].set(logprob_R, mode="drop"),
    )
    return s, live_R & ~ended_R

  def goes_on(carry) -> jax.Array:
    s, live_R = carry
    return (s.context.clock < ends.clock) & (live_R.sum() > ends.live)

  slots, live_R = jax.lax.while_loop(goes_on, body, (slots, live_R))
  return _spread(policy, slots), live_R


@functools.partial(jax.jit, static_argnames=("policy", "ring"))
def lay(policy: Policy, slots: Slots, rows_R, *, ring: int) -> Slots:
  """The rows `rows_R`, each with a prompt of its own, in rings for `ring` tokens."""
  c = slots.context
  prompts_R = rows_R // (slots.keys_R.shape[0] // c.prompt_lengths_P.shape[0])
  context = Context(
    jax.tree.map(lambda x: x[prompts_R], c.prompt),
    c.prompt_lengths_P[prompts_R],
    _resized(policy, jax.tree.map(lambda x: x[rows_R], c.cache), c.clock, ring),
    jnp.int32(0),
    c.read_B[rows_R],
  )
  return _spread(policy, Slots(context, *(x[rows_R] for x in slots[1:])))


@functools.partial(jax.jit, static_argnames=("policy", "ring"))
def widen(policy: Policy, slots: Slots, *, ring: int) -> Slots:
  """The same rows in rings for `ring` tokens."""
  c = slots.context
  cache = _resized(policy, c.cache, c.clock, ring)
  return _spread(policy, slots._replace(context=c._replace(cache=cache, clock=jnp.int32(0))))


def _resized(policy: Policy, cache: Sequence[KeyValue], clock, ring: int) -> tuple[KeyValue, ...]:
  """Rings of another size, the newest token last, so that their clock begins at 0 again."""
  shapes = jax.eval_shape(lambda: policy.empty_cache(1, ring))
  rings = []
  for own, shape in zip(cache, shapes, strict=True):
    old, new = own.v.shape[2], shape.v.shape[2]
    # Where the new ring is longer, its first places are read by nobody.
    order_U = (clock - new + jnp.arange(new)) % old
    rings.append(KeyValue(own.k[..., order_U], own.v[:, :, order_U]))
  return tuple(rings)


@functools.partial(jax.jit, static_argnames="policy", donate_argnames="slots")
def enter(policy: Policy, slots: Slots, new: Slots, rows_N) -> Slots:
  """Puts the rows of `new` in the place of free rows; in `slots` every row has a prompt of its
  own. A row of `rows_N` that there is not gets nothing."""
  c, own = slots.context, new.context
  prompts_N = jnp.arange(rows_N.shape[0]) // (rows_N.shape[0] // own.prompt_lengths_P.shape[0])

  def put(into, x):
    return into.at[rows_N].set(x, mode="drop")

  context = c._replace(
    prompt=jax.tree.map(lambda into, x: put(into, x[prompts_N]), c.prompt, own.prompt),
    prompt_lengths_P=put(c.prompt_lengths_P, own.prompt_lengths_P[prompts_N]),
    read_B=put(c.read_B, own.read_B),
  )
  return _spread(policy, Slots(context, *map(put, slots[1:], new[1:])))


def _spread(policy: Policy, slots: Slots) -> Slots:
  """Rows, and the heads of caches, where their devices compute them."""

  def one(x):
    heads = ("kv_heads", None, None) if x.ndim == 4 else (None,) * (x.ndim - 1)
    return constrain(x, policy.mesh, "rows", *heads) if x.ndim else x

  return jax.tree.map(one, slots)


@jax.jit
def noise_key(noise) -> jax.Array:
  """A key of numbers: that of the first, folded with each of the others."""
  return functools.reduce(jax.random.fold_in, noise[1:], jax.random.key(noise[0]))


_CHUNK = 32
"""Tokens after which the host looks for stop strings, and for what environments have answered."""
_LOOKS = 8
"""How often it looks at least whether enough has ended, in the time of the longest answer."""


@dataclasses.dataclass(frozen=True)
class SlotsConfig(EngineConfig):
  """Our own engine."""

  rows: int = 0
  """Rows that decode at once, of all processes together, down to the next multiple of
  rollout.group; 0 for a whole batch, and what is carried to the next. Fewer take less memory for
  their keys and values; the rest of a batch follows as rows end."""

  def check(self) -> dict[str, str]:
    return at_least(0, self, "rows")

  def cannot_carry(self, rollout):
    needed = rollout.carry * rollout.group
    fits = not self.rows or self.rows >= needed
    return "" if fits else f"has engine.rows={self.rows}, and {needed} samples go on at once"

  def at_once(self, rollout):
    whole = super().at_once(rollout)
    return min(self.rows or whole, whole) // rollout.group * rollout.group

  def open(self, policy, rollout, tokenizer):
    rows = self.at_once(rollout) // jax.process_count()
    pieces = functools.partial(token_bytes, tokenizer)
    chunk = _CHUNK if rollout.stop else rollout.max_tokens
    return Slotted(policy, rollout, end_ids(tokenizer), pieces, rows, chunk)


ENGINES: dict[str, type[EngineConfig]] = {"slots": SlotsConfig}


@dataclasses.dataclass(frozen=True)
class Slotted:
  """The engine on the devices of `policy.mesh`."""

  policy: Policy
  rollout: RolloutConfig
  end_ids: tuple[int, ...]
  pieces: Callable[[np.ndarray], Sequence[bytes]]
  """The bytes of each token."""
  rows: int
  """That decode at once."""
  chunk: int
  """Tokens after which the host looks at the latest at what has been written."""

  @functools.cached_property
  def _by_row(self) -> NamedSharding:
    return batch_sharding(self._mesh)

  @functools.cached_property
  def _everywhere(self) -> NamedSharding:
    return replicated(self._mesh)

  @property
  def _mesh(self) -> Mesh:
    assert self.policy.mesh is not None
    return self.policy.mesh

  def stream(
    self,
    params,
    wanted: Wanted,
    noise: Sequence[int],
    further: Further | None = None,
    begun: Begun | None = None,
  ) -> Iterator[Sample]:
    """See `Engine`."""
    policy, sampling = self.policy, self.rollout.sampling
    shards = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
    group, most = wanted.numbers_PxG.shape[1], int(wanted.limits_P.max())
    plan = Schedule(wanted.limits_P, group, self.rows, shards, most)
    if further:  # Others may be longer.
      plan = returning = Returning(wanted.limits_P, self.rows, shards, self.rollout.max_tokens)
    key = noise_key(self._put(np.array(noise, np.uint32)))
    first = np.flatnonzero(plan.live_R[:: plan.group])
    if begun:
      plan.take_up(begun.lengths_PxG, begun.ended_PxG)
      left_P = (~begun.ended_PxG).sum(1)
    new = functools.partial(self._begin, params, key, plan.ring)
    slots, clock = new(wanted, first, plan.at_once), 0
    finders: dict[int, StopFinder] = {}
    ended: list[Sample] = []
    chunk = min(self.chunk, _CHUNK) if further else self.chunk
    if begun:
      chunk = min(chunk, _CHUNK, -(-self.rollout.max_tokens // _LOOKS))
      slots = self._laid(plan, self._taken_up(params, plan, slots, begun))
    while plan.live_R.any():
      until = clock + min(plan.room, chunk)
      ends = Ends(np.array(self.end_ids, np.int32), np.int32(until), np.int32(plan.enough))
      live_R = jax.device_put(plan.live_R, self._by_row)
      slots, live_R = decode(policy, sampling, params, self._put(ends), slots, live_R)
      yield from ended  # Whoever takes them works while the devices decode.
      ended = list(self._ended(plan, slots, live_R, wanted, finders))
      if begun:
        np.subtract.at(left_P, [sample.row // plan.group for sample in ended], 1)
        if (left_P == 0).sum() >= begun.enough:
          break
      if further:  # Environments work while the devices do.
        yield from ended
        ended = []
        while more := further.take(wait=not plan.live_R.any() and not plan.waiting):
          wanted = wanted.and_then(more)
          returning.add(more.limits_P)
        returning.expected = further.expected()
      while problems := plan.entering():
        if slots.context.prompt_lengths_P.size < plan.sample_R.size:
          rows = np.minimum(np.arange(plan.sample_R.size), slots.keys_R.size - 1)
          slots = lay(policy, slots, self._put(rows), ring=plan.ring)
        rows_N = self._put(plan.place(problems))
        slots = enter(policy, slots, new(wanted, problems, plan.batch), rows_N)
      slots = self._laid(plan, slots)
      clock = int(jax.device_get(slots.context.clock))
    yield from ended
    if begun:
      yield from self._under_way(plan, slots)

  def _laid(self, plan: Schedule, slots: Slots) -> Slots:
    """The live rows in fewer or in larger rings, where that is time."""
    if (rows_R := plan.fewer()) is not None:
      plan.ring = plan.ring_needed()
      return lay(self.policy, slots, self._put(rows_R), ring=plan.ring)
    if plan.room == 0:
      plan.ring = plan.ring_needed()
      return widen(self.policy, slots, ring=plan.ring)
    return slots

  def _taken_up(self, params, plan: Schedule, slots: Slots, begun: Begun) -> Slots:
    """Rows that have read what was written of their samples; those of like lengths together."""
    written = [x.reshape(-1, x.shape[2]) for x in begun[:2]]
    rows = np.flatnonzero(plan.live_R & (plan.lengths_R > 0))
    rows, size = rows[np.argsort(-plan.lengths_R[rows], kind="stable")], plan.batch * plan.group
    for first in range(0, len(rows), size):
      some = rows[first : first + size]
      width = next(n for n in ring_sizes(written[0].shape[1]) if n >= plan.lengths_R[some[0]])
      missing = size - len(some)
      given = [plan.lengths_R[some], *(x[plan.sample_R[some], :width] for x in written)]
      lengths, *both = (np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for x in given)
      rows_N = np.pad(some, (0, missing), constant_values=len(plan.sample_R))
      slots = take_up(self.policy, params, slots, *self._put((rows_N, *both, lengths)))
    return slots

  def _under_way(self, plan: Schedule, slots: Slots) -> Iterator[Sample]:
    """What has not ended."""
    tokens_RxT, logprobs_RxT = jax.device_get((slots.tokens_RxT, slots.logprobs_RxT))
    for r in np.flatnonzero(plan.live_R).tolist():
      sample, n = int(plan.sample_R[r]), int(plan.lengths_R[r])
      yield Sample(sample, tokens_RxT[r, :n].copy(), logprobs_RxT[r, :n].copy(), False, ended=False)

  def _begin(self, params, key, ring: int, wanted: Wanted, problems, count: int) -> Slots:
    """Rows of `problems`, filled up to `count` problems with rows that stay free."""
    own = Wanted(*(x[np.resize(problems, count)] for x in wanted))
    own = own._replace(problems_P=own.problems_P.astype(np.uint32))  # Some are above 2**31.
    own = jax.device_put(own, self._by_row)
    most = self.rollout.max_tokens
    return begin(self.policy, params, own, key, ring=ring, most=most)

  def _ended(
    self, plan: Schedule, slots: Slots, live_R, wanted: Wanted, finders: dict[int, StopFinder]
  ) -> Iterator[Sample]:
    """What has ended since the last look; tells the schedule."""
    live_R, lengths_R = jax.device_get((live_R, slots.lengths_R))
    before_R, plan.lengths_R = plan.lengths_R, lengths_R.copy()
    looked_R = plan.live_R if self.rollout.stop else plan.live_R & ~live_R
    if not looked_R.any():
      return
    tokens_RxT, logprobs_RxT = jax.device_get((slots.tokens_RxT, slots.logprobs_RxT))
    for r in np.flatnonzero(looked_R).tolist():
      sample, n = int(plan.sample_R[r]), int(lengths_R[r])
      stop = None
      if self.rollout.stop:
        if sample not in finders:
          finders[sample] = self._finder(wanted, sample)
          finders[sample].feed(self.pieces(tokens_RxT[r, : before_R[r]]))
        stop = finders[sample].feed(self.pieces(tokens_RxT[r, before_R[r] : n]))
      if stop is None and live_R[r]:
        continue
      n = stop or n
      tokens, logprobs = tokens_RxT[r, :n].copy(), logprobs_RxT[r, :n].copy()
      yield Sample(sample, tokens, logprobs, stop is None and int(tokens[-1]) not in self.end_ids)
      plan.sample_R[r] = -1

  def _finder(self, wanted: Wanted, sample: int) -> StopFinder:
    p = sample // wanted.numbers_PxG.shape[1]
    end = wanted.prompt_lengths_P[p]
    begun = wanted.prompts_PxS[p, end - wanted.begun_P[p] : end]
    return StopFinder(self.rollout.stop, b"".join(self.pieces(begun)))

  def _put(self, tree):
    return jax.device_put(tree, self._everywhere)
