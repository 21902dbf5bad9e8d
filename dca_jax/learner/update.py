"""The policy-gradient loss and the jitted update.

Everything is a sum over tokens, divided once, at the end, over all micro-batches.
"""

import functools
import typing

import jax
import jax.numpy as jnp
import optax

from dca_jax.learner.optimizer import LearnerConfig
from dca_jax.policy import Policy, Sampling, join, token_logprobs


class TrainState(typing.NamedTuple):
  """What training changes: parameters (with LoRA the adapters alone) and optimizer state; where values are learned, the
  head that gives them."""

  params: typing.Any
  opt_state: typing.Any
  value_head: typing.Any = None
  behind: typing.Any = None
  """The parameters one step ago, where batches are sampled one step ahead."""


class Batch(typing.NamedTuple):
  """What an update reads, B = P * G rows; row p * G + g is completion g of prompt p."""

  prompts_PxS: jax.Array
  prompt_lengths_P: jax.Array
  completions_BxT: jax.Array
  lengths_B: jax.Array
  trained_B: jax.Array
  """Rows that count; the others add nothing to any sum."""
  advantages_BxT: jax.Array
  logprobs_BxT: jax.Array
  """Under the policy that sampled."""
  reference_BxT: jax.Array | None
  """Log-probabilities under the reference policy, where there is one."""


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
  """exp(x) - 1, and beyond `_FAR` a straight line, so that neither it nor its gradient overflows.

  Of all tokens that a policy writes, less than one in e^10 is e^10 times likelier under another.
  """
  near = jnp.minimum(x, _FAR)
  return jnp.expm1(near) + jnp.exp(near) * (x - near)


def loss_sums(
  policy: Policy, config: LearnerConfig, sampling: Sampling, params, batch: Batch, on_policy: jax.Array
) -> tuple[jax.Array, tuple[Sums, jax.Array]]:
  """The loss summed over tokens, not yet divided, with what it is made of.

  Args:
    on_policy: true at the first update on a batch. There the old log-probabilities are the new ones with the gradient
      stopped, so that the ratio is exactly 1 and not 1 to within the sampler's rounding.

  Returns:
    The sum to minimise, the other sums, and the log-probabilities [B, T], which are the old ones of a later update.
  """
  hidden = policy.completion_hidden(params, batch.prompts_PxS, batch.prompt_lengths_P, batch.completions_BxT)
  logp, entropy = token_logprobs(hidden, policy.head(params), batch.completions_BxT, sampling)
  t = batch.completions_BxT.shape[1]
  mask = (jnp.arange(t) < batch.lengths_B[:, None]) & batch.trained_B[:, None]

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
    if config.kl:  # Or it is a measurement, and takes no part in the gradient.
      loss += config.kl * kl
  error = jnp.where(mask & on_policy, jnp.abs(logp - batch.logprobs_BxT), 0.0).max()
  acts = clipped * batch.advantages_BxT < ratio * batch.advantages_BxT
  sums = Sums(total(1.0), -total(objective), total(entropy), kl, total(1.0 * acts), total(ratio), error)
  return loss, (jax.lax.stop_gradient(sums), jax.lax.stop_gradient(logp))


def init_state(optimizer: optax.GradientTransformation, params, value_head=None, behind=None) -> TrainState:
  moments = optimizer.init(jax.tree.map(lambda x: x.astype(jnp.float32), params))
  return TrainState(params, moments, value_head, behind)


def apply_rounded(params, changes, count: jax.Array):
  """bfloat16 parameters plus changes, rounded up or down by chance, as often as makes the mean exact.

  Args:
    count: updates so far, which keys the chance.
  """
  key = jax.random.fold_in(jax.random.key(0), count)

  def one(i, x, change):
    # A bfloat16 is the upper half of a float32: noise in the lower half carries over or is cut off.
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32) + change, jnp.uint32)
    bits += jax.random.bits(jax.random.fold_in(key, i), x.shape, jnp.uint16)
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(x.dtype)

  numbers = jax.tree.unflatten(jax.tree.structure(params), range(len(jax.tree.leaves(params))))
  return jax.tree.map(one, numbers, params, changes)


@functools.partial(
  jax.jit, static_argnames=("policy", "config", "optimizer", "sampling", "group"), donate_argnames="state"
)
def update(
  policy: Policy,
  config: LearnerConfig,
  optimizer: optax.GradientTransformation,
  sampling: Sampling,
  group: int,
  state: TrainState,
  batch: Batch,
  on_policy: jax.Array,
  frozen=None,
) -> tuple[TrainState, dict[str, jax.Array], jax.Array]:
  """One optimizer step on a whole batch.

  Args:
    on_policy: true at the first update on this batch (see `loss_sums`).
    frozen: parameters that stay as they are, where `state` has adapters only.

  Returns:
    The new state, metrics (scalars), and the log-probabilities [B, T] before the update.
  """
  n = config.micro_batches
  rows = batch.completions_BxT.shape[0]
  problems = rows // group

  def split(x):
    # Micro-batch i takes every n-th problem, so that each device keeps the problems that it holds.
    per_problem = x.reshape(problems // n, n, x.shape[0] // problems, *x.shape[1:])
    return per_problem.swapaxes(0, 1).reshape(n, -1, *x.shape[1:])

  def in_order(x_nxBxT):
    parts = x_nxBxT.reshape(n, problems // n, group, *x_nxBxT.shape[2:])
    return parts.swapaxes(0, 1).reshape(rows, *x_nxBxT.shape[2:])

  def loss(trained, micro_batch):
    return loss_sums(policy, config, sampling, join(frozen or {}, trained), micro_batch, on_policy)

  gradient = jax.grad(loss, has_aux=True)

  def accumulate(carry, micro_batch):
    grads, sums = carry
    more_grads, (more, logp_BxT) = gradient(state.params, micro_batch)
    grads = jax.tree.map(jnp.add, grads, more_grads)  # In float32, whatever the type of the parameters.
    added = jax.tree.map(jnp.add, sums, more)
    return (grads, added._replace(sampler_error=jnp.maximum(sums.sampler_error, more.sampler_error))), logp_BxT

  zero = (
    jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.params),
    Sums(*[jnp.float32(0)] * len(Sums._fields)),
  )
  (grads, sums), logp_nxBxT = jax.lax.scan(accumulate, zero, jax.tree.map(split, batch))

  count = jnp.maximum(sums.tokens, 1.0)
  divisor = jnp.float32(batch.completions_BxT.size) if config.normalizer == "constant" else count
  grads = jax.tree.map(lambda g: g / divisor, grads)
  changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
  metrics = {
    "learner/policy_loss": sums.policy_loss / divisor,
    "learner/entropy": sums.entropy / count,
    "learner/kl": sums.kl / count,
    "learner/clip_fraction": sums.clipped / count,
    "learner/ratio": sums.ratio / count,
    "learner/tokens": sums.tokens,
    "learner/grad_norm": optax.tree.norm(grads),
    "sampler/logprob_error": sums.sampler_error,
  }
  if policy.config.weights == "bfloat16":
    params = apply_rounded(state.params, changes, optax.tree_utils.tree_get_all_with_path(opt_state, "count")[0][1])
  else:
    params = optax.apply_updates(state.params, changes)
  state = state._replace(params=params, opt_state=opt_state)
  return state, metrics, in_order(logp_nxBxT)


@functools.partial(jax.jit, static_argnames=("policy", "sampling"))
def reference_logprobs(
  policy: Policy, sampling: Sampling, params, prompts_PxS, prompt_lengths_P, completions_BxT
) -> jax.Array:
  """Log-probabilities [B, T] of completions under another set of parameters."""
  hidden = policy.completion_hidden(params, prompts_PxS, prompt_lengths_P, completions_BxT)
  return token_logprobs(hidden, policy.head(params), completions_BxT, sampling)[0]
