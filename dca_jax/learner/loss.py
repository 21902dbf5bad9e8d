"""The policy-gradient loss: a sum over tokens, divided once, when all micro-batches are summed."""

import typing
from typing import Any

import jax
import jax.numpy as jnp

from dca_jax.learner.optimizer import LearnerConfig
from dca_jax.policy import Policy, Sampling, token_logprobs


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
  """exp(x) - 1, continued beyond `_FAR` as a straight line, so that neither it nor its gradient overflows.

  A policy writes tokens that are e^10 times likelier under another less than once in e^10, so little is changed.
  """
  near = jnp.minimum(x, _FAR)
  return jnp.expm1(near) + jnp.exp(near) * (x - near)


def loss_sums(
  policy: Policy,
  config: LearnerConfig,
  sampling: Sampling,
  params,
  batch: Batch,
  on_policy: jax.Array,
) -> tuple[jax.Array, tuple[Sums, jax.Array]]:
  """The loss summed over tokens, not yet divided, with what it is made of.

  Args:
    on_policy: true at the first update on a batch. There the old log-probabilities are the new ones with the gradient
      stopped, so that the ratio is exactly 1 and not 1 to within the sampler's rounding.

  Returns:
    The sum to minimise, the other sums, and the log-probabilities [B, T], which are the old ones of a later update.
  """
  hidden = policy.completion_hidden(
    params, batch.prompts_PxS, batch.prompt_lengths_P, batch.tokens_BxT
  )
  logp, entropy = token_logprobs(hidden, policy.head(params), batch.tokens_BxT, sampling)
  mask = batch.sampled_BxT & batch.trained_B[:, None]

  def total(x):
    return jnp.where(mask, x, 0.0).sum()

  old = jnp.where(on_policy, jax.lax.stop_gradient(logp), batch.logprobs_BxT)
  ratio = 1 + expm1_bounded(jnp.where(mask, logp - old, 0.0))
  clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
  if config.loss == "ppo":
    objective = jnp.minimum(ratio * batch.advantages_BxT, clipped * batch.advantages_BxT)
  else:
    objective = logp * batch.advantages_BxT
  loss = -total(objective) - config.entropy * total(entropy)
  kl = jnp.float32(0)
  if batch.reference_BxT is not None:
    gap = jnp.where(mask, batch.reference_BxT - logp, 0.0)
    kl = total(expm1_bounded(gap) - gap)
    if (
      config.kl
    ):  # A measurement takes no part in the gradient: 0 times what is not finite is no 0.
      loss += config.kl * kl
  error = jnp.where(mask & on_policy, jnp.abs(logp - batch.logprobs_BxT), 0.0).max()
  acts = clipped * batch.advantages_BxT < ratio * batch.advantages_BxT
  sums = Sums(
    total(1.0), -total(objective), total(entropy), kl, total(1.0 * acts), total(ratio), error
  )
  return loss, (jax.lax.stop_gradient(sums), jax.lax.stop_gradient(logp))
