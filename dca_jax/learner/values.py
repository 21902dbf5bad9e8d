"""Values of prefixes that are learned: a small head on the policy's hidden states, trained on the
outcomes of earlier batches (the value baseline of PPO, Schulman et al. 2017)."""

import dataclasses
import functools
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dca_jax.checks import at_least, positive
from dca_jax.credit import Array, ReviewArrays
from dca_jax.learner.loss import Batch
from dca_jax.learner.parts import map_hidden
from dca_jax.policy import Policy
from dca_jax.rollout.prefixes import FromEnvironment, FromReviewer, MonteCarlo, Values


@dataclasses.dataclass(frozen=True)
class Learned(Values):
  """The values of a head that is trained along the way."""

  source: str = "learned"
  width: int = 128
  """Of the head's hidden layer."""
  lr: float = 3e-3
  """The head's learning rate (Adam)."""
  updates: int = 8
  """Optimizer steps on each batch, after the batch's values have been read."""

  def check(self) -> dict[str, str]:
    return at_least(1, self, "width", "updates") | positive(self, "lr")

  def init(self, width: int, seed: int) -> "ValueHead":
    return init_head(self, width, seed)

  def read(
    self, policy: Policy, head: "ValueHead", params: Any, batch: Batch, review: ReviewArrays
  ) -> "tuple[ReviewArrays, Memory]":
    return learned_values(self, policy, head, params, batch, review)

  def learn(
    self, head: "ValueHead", memory: "Memory", batch: Batch, rewards_PxG: jax.Array
  ) -> "tuple[ValueHead, dict[str, jax.Array]]":
    head, loss = fit_head(self, head, memory, batch.sampled_BxT, rewards_PxG)
    return head, {"value/loss": loss}


_ALL = (FromReviewer, MonteCarlo, Learned, FromEnvironment)
VALUES: dict[str, type[Values]] = {kind.source: kind for kind in _ALL}


class ValueHead(NamedTuple):
  """Parameters and optimizer state of the head."""

  params: Any
  opt_state: Any


def _head(config: Learned) -> nn.Module:
  # The last layer begins at 0, so the first values are one half.
  return nn.Sequential(
    [nn.Dense(config.width), nn.gelu, nn.Dense(1, kernel_init=nn.initializers.zeros)]
  )


def _logits(config: Learned, params: Any, hidden_BxTxD: jax.Array) -> jax.Array:
  return cast(jax.Array, _head(config).apply(params, hidden_BxTxD))[..., 0]


def init_head(config: Learned, width: int, seed: int) -> ValueHead:
  """A new head for hidden states of `width`."""
  params = _head(config).init(jax.random.key(seed), jnp.zeros((1, width)))
  return ValueHead(params, optax.adam(config.lr).init(params))


class Memory(NamedTuple):
  """What values were read from, for the head to learn from when the update is done."""

  hidden_BxTxD: jax.Array
  step_ids_BxT: Array


@functools.partial(jax.jit, static_argnames=("config", "policy"))
def learned_values(
  config: Learned,
  policy: Policy,
  head: ValueHead,
  params: Any,
  batch: Batch,
  review: ReviewArrays,
) -> tuple[ReviewArrays, Memory]:
  """The review with the head's values in it, and what they were read from.

  The hidden state that predicts a step's first token has seen the prompt and the steps before, and
  nothing else.
  """
  hidden_BxTxD = map_hidden(
    policy, params, batch, batch.sampled_BxT, lambda hidden, _: hidden.astype(jnp.float32)
  )
  values_BxT = jax.nn.sigmoid(_logits(config, head.params, hidden_BxTxD))
  rows_Bx1, shape = jnp.arange(values_BxT.shape[0])[:, None], review.values_BxK.shape
  first_BxT = _first_of_step(review.step_ids_BxT, batch.sampled_BxT)
  place_BxT = jnp.where(first_BxT, review.step_ids_BxT, shape[1])
  values_BxK = jnp.full(shape, jnp.nan).at[rows_Bx1, place_BxT].set(values_BxT, mode="drop")
  review = review._replace(values_BxK=values_BxK, ok_B=jnp.ones_like(review.ok_B))
  return review, Memory(hidden_BxTxD, review.step_ids_BxT)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="head")
def fit_head(
  config: Learned,
  head: ValueHead,
  memory: Memory,
  sampled_BxT: jax.Array,
  rewards_PxG: jax.Array,
) -> tuple[ValueHead, jax.Array]:
  """Trains the head to predict outcomes from step boundaries; returns it, and its loss (nats)
  before that."""
  counts_BxT = _first_of_step(memory.step_ids_BxT, sampled_BxT)
  rewards_Bx1 = rewards_PxG.reshape(-1, 1)

  def loss(params: Any) -> jax.Array:
    logits_BxT = _logits(config, params, memory.hidden_BxTxD)
    nats_BxT = optax.sigmoid_binary_cross_entropy(logits_BxT, rewards_Bx1)
    return nats_BxT.mean(where=counts_BxT)

  def update(head: ValueHead, _: None) -> tuple[ValueHead, jax.Array]:
    value, grads = jax.value_and_grad(loss)(head.params)
    changes, opt_state = optax.adam(config.lr).update(grads, head.opt_state)
    return ValueHead(optax.apply_updates(head.params, changes), opt_state), value

  head, losses = jax.lax.scan(update, head, length=config.updates)
  return head, losses[0]


def _first_of_step(step_ids_BxT: Array, sampled_BxT: jax.Array) -> jax.Array:
  """Whether a token is the first that the policy sampled of its step."""
  so_far_BxT = jax.lax.cummax(jnp.where(sampled_BxT, step_ids_BxT, -1), 1)
  return sampled_BxT & (jnp.diff(so_far_BxT, axis=1, prepend=-1) > 0)
