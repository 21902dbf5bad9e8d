"""The sampler: a whole rollout in one compiled program."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from dca_jax.checks import at_least, one_of, positive
from dca_jax.devices.processes import fetch, own_rows, put
from dca_jax.policy import Policy, Sampling, sampling_logits


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """The `rollout` section."""

  problems: int = 16
  """Problems in a batch."""
  group: int = 8
  """Completions of each problem."""
  max_prompt_tokens: int = 64
  max_tokens: int = 48
  """Longest completion, its end token included."""
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  stop: tuple[str, ...] = ()
  """Strings that end a completion too, with the token that completes one; found after sampling, in the text."""
  zero_variance: str = "keep"
  """Groups whose completions all have the same reward: `keep` trains on them too (they carry no outcome signal, but
  count in the normalizer and in the KL and entropy terms), `skip` leaves them out, `refill` replaces them by groups of
  problems from a second order of the data; the first order passes through all of them either way."""
  refill_rounds: int = 4
  """`refill`: at most this many batches are sampled for one step; groups still missing then are skipped."""

  @property
  def sampling(self) -> Sampling:
    return Sampling(self.temperature, self.top_k, self.top_p)

  def check(self) -> dict[str, str]:
    bad = at_least(1, self, "problems", "max_prompt_tokens", "refill_rounds") | at_least(
      2, self, "group", "max_tokens"
    )
    bad |= at_least(0, self, "top_k") | positive(self, "top_p", most=1)
    bad |= one_of(self, "zero_variance", "keep", "skip", "refill")
    if self.temperature <= 0:
      bad["temperature"] = "must be positive; for greedy decoding set rollout.top_k to 1"
    if not all(isinstance(string, str) and string for string in self.stop):
      bad["stop"] = "must be strings that are not empty"
    return bad

  def unused(self) -> dict[str, str]:
    if self.zero_variance == "refill":
      return {}
    return {"refill_rounds": f"rollout.zero_variance is '{self.zero_variance}'"}


Array = jax.Array | np.ndarray


class Samples(typing.NamedTuple):
  """Completions, B = P * G rows; row p * G + g is sample g of problem p."""

  tokens_BxT: Array
  """The end token included; anything may stand beyond a row's length."""
  lengths_B: Array
  """At least 1."""
  truncated_B: Array
  """True where the row ran out of tokens before an end token."""
  logprobs_BxT: Array
  """Log-probability of each token under the distribution that it was drawn from."""


GREEDY = -1
"""The number of a sample that takes the likeliest token each time."""


@functools.partial(jax.jit, static_argnames=("policy", "sampling", "max_tokens"))
def sample(
  policy: Policy,
  params,
  prompts_PxS: jax.Array,
  prompt_lengths_P: jax.Array,
  problem_ids_P: jax.Array,
  key: jax.Array,
  end_ids_E: jax.Array,
  *,
  numbers_PxG: jax.Array,
  sampling: Sampling,
  max_tokens: int,
) -> Samples:
  """Draws G completions of each prompt.

  The noise of token t of sample number g of a problem is `key` folded with (problem id, g, t), so a
  sample depends neither on its place in the batch nor on its neighbours; number `GREEDY` has none.
  Prompts are run once each; the loop stops when every row has ended.
  """

  def sample_key(i, g):
    return jax.random.fold_in(jax.random.fold_in(key, i), g)

  keys_B = jax.vmap(jax.vmap(sample_key, (None, 0)))(problem_ids_P, numbers_PxG).reshape(-1)
  greedy_Bx1 = numbers_PxG.reshape(-1, 1) == GREEDY
  rows, group = keys_B.shape[0], numbers_PxG.shape[1]
  last_PxD, cache, step = policy.decoder(params, prompts_PxS, prompt_lengths_P, group, max_tokens)

  class Carry(typing.NamedTuple):
    t: jax.Array
    hidden_BxD: jax.Array
    cache: tuple
    tokens_BxT: jax.Array
    logprobs_BxT: jax.Array
    lengths_B: jax.Array
    ended_B: jax.Array

  def body(c: Carry) -> Carry:
    logits_BxV = sampling_logits(c.hidden_BxD, policy.head(params), sampling)
    noise_BxV = jax.vmap(
      lambda k: jax.random.gumbel(jax.random.fold_in(k, c.t), logits_BxV.shape[1:])
    )(keys_B)
    token_B = jnp.argmax(logits_BxV + jnp.where(greedy_Bx1, 0.0, noise_BxV), -1).astype(jnp.int32)
    logprob_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BxV), token_B[:, None], 1)[:, 0]
    hidden_BxD, cache = step(c.cache, c.t, token_B)
    return Carry(
      c.t + 1,
      hidden_BxD,
      cache,
      c.tokens_BxT.at[:, c.t].set(token_B),
      c.logprobs_BxT.at[:, c.t].set(jnp.where(c.ended_B, 0.0, logprob_B)),
      c.lengths_B + ~c.ended_B,
      c.ended_B | (token_B[:, None] == end_ids_E).any(1),
    )

  start = Carry(
    jnp.int32(0),
    jnp.repeat(last_PxD, group, 0),
    cache,
    jnp.zeros((rows, max_tokens), jnp.int32),
    jnp.zeros((rows, max_tokens), jnp.float32),
    jnp.zeros(rows, jnp.int32),
    jnp.zeros(rows, bool),
  )
  end = jax.lax.while_loop(lambda c: (c.t < max_tokens) & ~c.ended_B.all(), body, start)
  return Samples(end.tokens_BxT, end.lengths_B, ~end.ended_B, end.logprobs_BxT)


class Sampler(typing.NamedTuple):
  """What sampling takes, but for the parameters and the problems: host arrays in, host arrays out."""

  policy: Policy
  config: RolloutConfig
  end_ids_E: jax.Array
  rows: NamedSharding
  """How problems are spread over the devices; each process gives and gets the rows that it owns."""

  def own(self, problems: int) -> np.ndarray:
    """Which of a batch of `problems` this process samples."""
    return own_rows(self.rows, problems)

  def __call__(self, params, prompts_PxS, lengths_P, ids_P, key, numbers: np.ndarray) -> Samples:
    """`numbers` of the samples wanted, [G] of every problem or [P, G]; see `sample`."""
    numbers_PxG = np.broadcast_to(numbers, (len(lengths_P), numbers.shape[-1]))
    given = (
      prompts_PxS,
      lengths_P,
      np.asarray(ids_P, np.uint32),
      np.asarray(numbers_PxG, np.int32),
    )
    *arrays, numbers_PxG = put(given, self.rows)
    samples = sample(
      self.policy,
      params,
      *arrays,
      key,
      self.end_ids_E,
      numbers_PxG=numbers_PxG,
      sampling=self.config.sampling,
      max_tokens=self.config.max_tokens,
    )
    return fetch(samples, self.rows)
