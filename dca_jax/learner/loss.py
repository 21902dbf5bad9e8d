"""The policy-gradient loss: a sum over tokens, divided once, when all micro-batches are summed."""

import typing
from typing import Any

import jax
import jax.numpy as jnp

from dca_jax.learner.optimizer import Learner
from dca_jax.policy import Prompts, token_logprobs


class Batch(typing.NamedTuple):
  """What an update reads, B = P * G rows; row p * G + g is episode g of prompt p."""

  prompts_PxS: jax.Array
  prompt_lengths_P: jax.Array
  tokens_BxT: jax.Array
  sampled_BxT: jax.Array
  """Tokens that the policy wrote. The others add nothing to any sum, whatever stands there."""
  trained_B: jax.Array
  """Episodes that count."""
  logprobs_BxT: jax.Array
  """Under the policy that sampled."""
  reference_BxT: jax.Array | None = None
  """Log-probabilities under the reference policy, where there is one."""
  advantages_BxT: Any = None
  """As soon as credit is assigned."""

  @property
  def rows(self) -> "Rows":
    trained_BxT = self.sampled_BxT & self.trained_B[:, None]
    floats = self.logprobs_BxT, self.reference_BxT, self.advantages_BxT
    return Rows(self.tokens_BxT, trained_BxT, *floats)


class Rows(typing.NamedTuple):
  """R rows of a batch, or of a part of one, each with up to T tokens."""

  tokens_RxT: jax.Array
  trained_RxT: jax.Array
  """Tokens that count; the others add nothing to any sum."""
  logprobs_RxT: jax.Array
  reference_RxT: jax.Array | None
  advantages_RxT: Any


class Sums(typing.NamedTuple):
  """Sums over trained tokens; divided by `tokens` they are means."""

  tokens: jax.Array
  policy_loss: jax.Array
  entropy: jax.Array
  kl: jax.Array
  clipped: jax.Array
  ratio: jax.Array
  sampler_error: jax.Array
  """Largest |learner - sampler| log-probability; a maximum, not a sum."""


_FAR = 10.0


def expm1_bounded(x: jax.Array) -> jax.Array:
  """exp(x) - 1, continued beyond `_FAR` as a straight line, so that neither it nor its gradient
  overflows.

  A policy writes tokens that are e^10 times likelier under another less than once in e^10, so
  little is changed.
  """
  near = jnp.minimum(x, _FAR)
  return jnp.expm1(near) + jnp.exp(near) * (x - near)


def loss_sums(
  learner: Learner, params, prompts: Prompts, rows: Rows, on_policy: jax.Array
) -> tuple[jax.Array, tuple[Sums, jax.Array]]:
  """The loss summed over tokens, not yet divided, with what it is made of.

  Args:
    prompts: of the rows, each of which may come several times: row p * R / P + i follows prompt p.
    on_policy: true at the first update on a batch. There the old log-probabilities are the new ones
      with the gradient stopped, so that the ratio is exactly 1 and not 1 to within the sampler's
      rounding.

  Returns:
    The sum to minimise, the other sums, and the log-probabilities [R, T], which are the old ones of
    a later update.
  """
  policy, config, mask = learner.policy, learner.config, rows.trained_RxT
  hidden = policy.continuation_hidden(params, prompts, rows.tokens_RxT)
  head = policy.head(params)
  logp, entropy = token_logprobs(hidden, head, rows.tokens_RxT, learner.sampling)

  def total(x):
    return jnp.where(mask, x, 0.0).sum()

  old = jnp.where(on_policy, jax.lax.stop_gradient(logp), rows.logprobs_RxT)
  ratio = 1 + expm1_bounded(jnp.where(mask, logp - old, 0.0))
  clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
  if config.loss == "ppo":
    objective = jnp.minimum(ratio * rows.advantages_RxT, clipped * rows.advantages_RxT)
  else:
    objective = logp * rows.advantages_RxT
  loss = -total(objective) - config.entropy * total(entropy)
  kl = jnp.float32(0)
  if rows.reference_RxT is not None:
    gap = jnp.where(mask, rows.reference_RxT - logp, 0.0)
    kl = total(expm1_bounded(gap) - gap)
    # A measurement takes no part in the gradient: 0 times what is not finite is no 0.
    if config.kl:
      loss += config.kl * kl
  error = jnp.where(mask & on_policy, jnp.abs(logp - rows.logprobs_RxT), 0.0).max()
  acts = clipped * rows.advantages_RxT < ratio * rows.advantages_RxT
  sums = Sums(
    total(1.0), -total(objective), total(entropy), kl, total(1.0 * acts), total(ratio), error
  )
  return loss, (jax.lax.stop_gradient(sums), jax.lax.stop_gradient(logp))
