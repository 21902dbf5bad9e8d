"""The jitted update: the gradient of the loss, summed over micro-batches, and an optimizer step."""

import functools
import typing

import jax
import jax.numpy as jnp
import optax

from dca_jax.learner.loss import Batch, Sums, loss_sums
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
  credit: typing.Any = None
  """What the credit scheme keeps."""


def init_state(
  optimizer: optax.GradientTransformation, params, value_head=None, behind=None, credit=None
) -> TrainState:
  moments = optimizer.init(jax.tree.map(lambda x: x.astype(jnp.float32), params))
  return TrainState(params, moments, value_head, behind, credit)


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
  jax.jit,
  static_argnames=("policy", "config", "optimizer", "sampling", "group"),
  donate_argnames="state",
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
  rows = batch.tokens_BxT.shape[0]
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
    grads = jax.tree.map(
      jnp.add, grads, more_grads
    )  # In float32, whatever the type of the parameters.
    added = jax.tree.map(jnp.add, sums, more)
    return (
      grads,
      added._replace(sampler_error=jnp.maximum(sums.sampler_error, more.sampler_error)),
    ), logp_BxT

  zero = (
    jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.params),
    Sums(*[jnp.float32(0)] * len(Sums._fields)),
  )
  (grads, sums), logp_nxBxT = jax.lax.scan(accumulate, zero, jax.tree.map(split, batch))

  count = jnp.maximum(sums.tokens, 1.0)
  divisor = jnp.float32(batch.tokens_BxT.size) if config.normalizer == "constant" else count
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
    params = apply_rounded(
      state.params, changes, optax.tree_utils.tree_get_all_with_path(opt_state, "count")[0][1]
    )
  else:
    params = optax.apply_updates(state.params, changes)
  state = state._replace(params=params, opt_state=opt_state)
  return state, metrics, in_order(logp_nxBxT)


@functools.partial(jax.jit, static_argnames=("policy", "sampling"))
def reference_logprobs(
  policy: Policy, sampling: Sampling, params, prompts_PxS, prompt_lengths_P, tokens_BxT
) -> jax.Array:
  """Log-probabilities [B, T] of tokens under another set of parameters."""
  hidden = policy.completion_hidden(params, prompts_PxS, prompt_lengths_P, tokens_BxT)
  return token_logprobs(hidden, policy.head(params), tokens_BxT, sampling)[0]
