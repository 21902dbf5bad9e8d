"""The policy-gradient loss: a sum over tokens, divided once, when all micro-batches are summed."""

import typing
from typing import Any

import jax
import jax.numpy as jnp

from dca_jax.learner.optimizer import Learner
from dca_jax.policy import Prompts, token_logprobs


class Rewrites(typing.NamedTuple):
  """Answers that somebody else began, E = P * X rows; row p * X + x follows prompt p."""

  tokens_ExT: jax.Array
  weights_ExT: jax.Array
  """Of the negative log-likelihood of each token in the loss; 0 where nothing is to be learnt of
  it, as in a row that nobody filled."""


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
  rewrites: Rewrites | None = None
  """What is learnt beside the episodes, where the run has any."""

  @property
  def rows(self) -> "Rows":
    trained_BxT = self.sampled_BxT & self.trained_B[:, None]
    floats = self.logprobs_BxT, self.reference_BxT, self.advantages_BxT
    return Rows(self.tokens_BxT, trained_BxT, *floats)

  @property
  def all_rows(self) -> "Rows":
    """The rows, those of the rewrites behind the others of their prompt."""
    if self.rewrites is None:
      return self.rows
    p, t = len(self.prompts_PxS), self.tokens_BxT.shape[1]

    def joined(x_BxT: jax.Array, y_ExT: jax.Array) -> jax.Array:
      both = x_BxT.reshape(p, -1, t), y_ExT.reshape(p, -1, t)
      return jnp.concatenate(both, 1).reshape(-1, t)

    tokens_ExT, weights_ExT = self.rewrites
    empty = jax.tree.map(lambda x: jnp.zeros(tokens_ExT.shape, x.dtype), self.rows)
    rows = jax.tree.map(joined, self.rows, empty._replace(tokens_RxT=tokens_ExT))
    return rows._replace(learnt_RxT=joined(jnp.zeros(self.tokens_BxT.shape), weights_ExT))

  def of_episodes(self, x_RxT: jax.Array) -> jax.Array:
    """Of what there is for `all_rows` the part [B, T] of the episodes."""
    p, t = len(self.prompts_PxS), self.tokens_BxT.shape[1]
    return x_RxT.reshape(p, -1, t)[:, : len(self.tokens_BxT) // p].reshape(-1, t)


class Rows(typing.NamedTuple):
  """R rows of a batch, or of a part of one, each with up to T tokens."""

  tokens_RxT: jax.Array
  trained_RxT: jax.Array
  """Tokens that count; the others add nothing to any sum."""
  logprobs_RxT: jax.Array
  reference_RxT: jax.Array | None
  advantages_RxT: Any
  learnt_RxT: jax.Array | None = None
  """See `Rewrites.weights_ExT`; such tokens are in no other sum."""

  @property
  def counted_RxT(self) -> jax.Array:
    """Tokens that anything is learnt of."""
    return self.trained_RxT if self.learnt_RxT is None else self.trained_RxT | (self.learnt_RxT > 0)


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
  loss, kl = -total(objective), jnp.float32(0)
  # A measurement takes no part in the gradient: 0 times what is not finite is no 0.
  if config.entropy:
    loss -= config.entropy * total(entropy)
  if (weights_RxT := rows.learnt_RxT) is not None:
    loss -= jnp.where(weights_RxT > 0, weights_RxT * logp, 0.0).sum()
  if rows.reference_RxT is not None:
    gap = jnp.where(mask, rows.reference_RxT - logp, 0.0)
    kl = total(expm1_bounded(gap) - gap)
    if config.kl:
      loss += config.kl * kl
  error = jnp.where(mask & on_policy, jnp.abs(logp - rows.logprobs_RxT), 0.0).max()
  acts = clipped * rows.advantages_RxT < ratio * rows.advantages_RxT
  sums = Sums(
    total(1.0), -total(objective), total(entropy), kl, total(1.0 * acts), total(ratio), error
  )
  return loss, (jax.lax.stop_gradient(sums), jax.lax.stop_gradient(logp))
