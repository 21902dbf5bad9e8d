"""The jitted update: the gradient of the loss, summed over micro-batches, and an optimizer step."""

import functools
import typing

import jax
import jax.numpy as jnp
import optax

from dca_jax.learner.loss import Batch, Rows, Sums, loss_sums
from dca_jax.learner.optimizer import Learner
from dca_jax.learner.parts import (
  Part,
  add_prompts,
  cut,
  in_chunks,
  in_order,
  in_width,
  map_hidden,
  prompt_chunks,
  read_prompts,
  take,
  take_prompts,
  widened,
)
from dca_jax.policy import Policy, Prompts, Sampling, join, token_logprobs


class TrainState(typing.NamedTuple):
  """What training changes: parameters (with LoRA the adapters alone) and optimizer state; where
  values are learned, the head that gives them."""

  params: typing.Any
  opt_state: typing.Any
  value_head: typing.Any = None
  behind: typing.Any = None
  """The parameters one step ago, where batches are sampled one step ahead."""
  credit: typing.Any = None
  """What the credit scheme keeps."""
  unfinished: typing.Any = None
  """Completions that go on in the next step, where steps do not finish what they begin."""


def init_state(
  optimizer: optax.GradientTransformation, params, value_head=None, behind=None, credit=None
) -> TrainState:
  moments = optimizer.init(jax.tree.map(lambda x: x.astype(jnp.float32), params))
  return TrainState(params, moments, value_head, behind, credit)


def apply_rounded(params, changes, count: jax.Array):
  """bfloat16 parameters plus changes, rounded up or down by chance, as often as makes the mean
  exact.

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


@functools.partial(jax.jit, static_argnames="learner", donate_argnames="state")
def update(
  learner: Learner, state: TrainState, batch: Batch, on_policy: jax.Array, frozen=None
) -> tuple[TrainState, dict[str, jax.Array], jax.Array]:
  """One optimizer step on a whole batch, in parts (`parts.py`); one program for all lengths.

  Args:
    on_policy: true at the first update on this batch (see `loss_sums`).
    frozen: parameters that stay as they are, where `state` has adapters only.

  Returns:
    The new state, metrics (scalars), and the log-probabilities [B, T] before the update of tokens
    that count, 0 or anything elsewhere.
  """
  grads, sums, logp_BxT = gradient_sums(learner, state.params, frozen or {}, batch, on_policy)
  count = jnp.maximum(sums.tokens, 1.0)
  constant = learner.config.normalizer == "constant"
  divisor = jnp.float32(batch.tokens_BxT.size) if constant else count
  grads = jax.tree.map(lambda g: g / divisor, grads)
  changes, opt_state = learner.optimizer.update(grads, state.opt_state, state.params)
  metrics = {
    "learner/policy_loss": sums.policy_loss / divisor,
    "learner/entropy": sums.entropy / count,
    "learner/clip_fraction": sums.clipped / count,
    "learner/ratio": sums.ratio / count,
    "learner/tokens": sums.tokens,
    "learner/grad_norm": optax.tree.norm(grads),
    "sampler/logprob_error": sums.sampler_error,
  }
  if batch.reference_BxT is not None:
    metrics["learner/kl"] = sums.kl / count
  if learner.policy.config.weights == "bfloat16":
    count = optax.tree_utils.tree_get_all_with_path(opt_state, "count")[0][1]
    params = apply_rounded(state.params, changes, count)
  else:
    params = optax.apply_updates(state.params, changes)
  return state._replace(params=params, opt_state=opt_state), metrics, logp_BxT


def gradient_sums(
  learner: Learner, trained, frozen, batch: Batch, on_policy: jax.Array
) -> tuple[typing.Any, Sums, jax.Array]:
  """The gradient of the loss in float32, the `Sums` and the log-probabilities [B, T].

  Prompts are read once, whichever parts their rows lie in. The gradient with respect to what they
  left is summed over the parts, then goes back through the prompts.
  """
  policy, n = learner.policy, learner.config.micro_batches
  rows = batch.all_rows
  (b, t), p = rows.tokens_RxT.shape, len(batch.prompts_PxS)

  def loss(trained, left, lengths_R, part: Rows):
    prompts = Prompts(left[0], left[1], lengths_R)
    return loss_sums(learner, join(frozen, trained), prompts, part, on_policy)

  def of_width(width, prompts: Prompts, part: Rows):
    left, lengths_R = prompts[:2], prompts.lengths_P
    part = jax.tree.map(lambda x: x[:, :width], part)
    grads, (sums, logp) = jax.grad(loss, (0, 1), has_aux=True)(trained, left, lengths_R, part)
    return *grads, sums, widened(logp, t)

  def add_part(carry, part: Part):
    grads, back, sums = carry
    prompts_DxR = part.rows_DxR // (b // p)
    own = jax.tree.map(lambda x: take(policy, x, part.rows_DxR), rows)
    given = take_prompts(policy, prompts, prompts_DxR), own
    more_grads, more_back, more, logp_RxT = in_width(part, t, of_width, *given)
    back = add_prompts(back, prompts_DxR, more_back)
    most = jnp.maximum(sums.sampler_error, more.sampler_error)
    sums = jax.tree.map(jnp.add, sums, more)._replace(sampler_error=most)
    return (jax.tree.map(jnp.add, grads, more_grads), back, sums), logp_RxT

  given = batch.prompts_PxS, batch.prompt_lengths_P
  chunks = prompt_chunks(policy.mesh, p, n)
  prompts = read_prompts(policy, join(frozen, trained), given, chunks)
  zero = zeros(trained), zeros(prompts[:2]), Sums(*[jnp.float32(0)] * len(Sums._fields))
  parts = cut(policy, p, rows.counted_RxT, n)
  (grads, back, sums), logp = jax.lax.scan(add_part, zero, parts)

  def add_prompts_of(grads, given):
    """Adds what the gradient of some prompts comes to in the parameters; they are read anew."""
    chunk, back = given

    def read(trained):
      return policy.read_prompts(join(frozen, trained), *chunk)[:2]

    left, backwards = jax.vjp(read, trained)
    back = jax.tree.map(lambda g, x: g.astype(x.dtype), back, left)
    return jax.tree.map(jnp.add, grads, backwards(back)[0]), None

  grads, _ = jax.lax.scan(add_prompts_of, grads, in_chunks(given, back, chunks))
  return grads, sums, batch.of_episodes(in_order(parts, logp, b))


def zeros(shapes):
  """In float32, whatever the types are that are added to them."""
  return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)


@functools.partial(jax.jit, static_argnames=("policy", "sampling"))
def reference_logprobs(policy: Policy, sampling: Sampling, params, batch: Batch) -> jax.Array:
  """Log-probabilities [B, T] of the tokens that count, under another set of parameters; elsewhere 0
  or anything."""

  def of_hidden(hidden_RxTxD, tokens_RxT):
    return token_logprobs(hidden_RxTxD, policy.head(params), tokens_RxT, sampling)[0]

  return map_hidden(policy, params, batch, batch.rows.trained_RxT, of_hidden)
