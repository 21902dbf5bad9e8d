"""The drift experiment: does a policy put on a show for its reviewer, and would anyone notice?

Ten slots, three actions: `advance`, and two that change nothing, `plain` and `check`. Four advances
succeed, so six slots are slack. A fooled reviewer applauds checks. The policy is a table of logits
by slot and progress; it is trained by plain gradient ascent on groups of traces, with the shipped
`token_advantages`. What to watch is the number of checks in a trace: accuracy ends high in every
arm.

S slots, C counts of progress, A = 3 actions, B = P * G traces; the arrays
of a run gain an axis for seeds.
"""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np

from dca_jax.credit import (
  Potential,
  ReturnToGo,
  ReviewArrays,
  Scheme,
  Uniform,
  Weighted,
  token_advantages,
)
from dca_jax.episode import ROLES

SLOTS, NEEDED = 10, 4
ADVANCE, PLAIN, CHECK = range(3)
GROUPS, GROUP = 8, 8
UPDATES, RATE, SEEDS = 600, 2.0, 24


class Reviewer(typing.NamedTuple):
  """What is said of checks, and how values are made."""

  fooled: float = 1.0
  """1: a check is necessary, with weight 3, and raises the value of what follows; 0: it is
  redundant, as it is."""
  scale: float = 0.5
  """Of `value_table`; at 0.5 there is always room above a value, at 1 good prefixes have none."""
  applause: float = 0.05
  """What a check adds to the values behind it, which end at 1."""


ARMS = {
  "uniform (RLOO)": (Uniform(), Reviewer()),
  "potential 1, fooled": (Potential(), Reviewer()),
  "potential 0, honest": (Potential(discount=0.0), Reviewer(fooled=0.0)),
  "potential 0, fooled": (Potential(discount=0.0), Reviewer()),
  "potential 0, fooled, no headroom": (Potential(discount=0.0), Reviewer(1.0, 1.0, 0.15)),
  "weighted, honest": (Weighted(), Reviewer(fooled=0.0)),
  "weighted, fooled": (Weighted(), Reviewer()),
  "weighted, lambda 1, fooled": (Weighted(lam=1.0), Reviewer()),
  "return_to_go, fooled": (ReturnToGo(), Reviewer()),
}


class Curves(typing.NamedTuple):
  """Means over the traces of an update; [seeds, updates]."""

  accuracy: np.ndarray
  checks: np.ndarray


class End(typing.NamedTuple):
  """Of every seed's last 50 updates: mean accuracy, that of the worst seed, mean checks and their
  spread over seeds."""

  accuracy: float
  worst: float
  checks: float
  spread: float

  @property
  def error(self) -> float:
    """Standard error of the mean number of checks."""
    return self.spread / SEEDS**0.5


def end(curves: Curves) -> End:
  accuracy, checks = curves.accuracy[:, -50:].mean(1), curves.checks[:, -50:].mean(1)
  return End(
    float(accuracy.mean()), float(accuracy.min()), float(checks.mean()), float(checks.std(ddof=1))
  )


def value_table() -> np.ndarray:
  """Chance [S + 1, C] that a policy that picks its actions at random still makes enough
  progress."""
  table = np.zeros((SLOTS + 1, NEEDED + 1))
  table[SLOTS, NEEDED] = 1.0
  for slot in reversed(range(SLOTS)):
    onward = np.append(table[slot + 1, 1:], table[slot + 1, -1])
    table[slot] = onward / 3 + table[slot + 1] * 2 / 3
  return table


def reviewed(actions_BxS, progress_BxS, reviewer: Reviewer) -> ReviewArrays:
  is_check = actions_BxS == CHECK
  applauded = is_check & (reviewer.fooled > 0)
  useful = (actions_BxS == ADVANCE) & (progress_BxS < NEEDED)
  roles = jnp.where(useful | applauded, ROLES.index("necessary"), ROLES.index("redundant"))
  slots = jnp.arange(SLOTS)
  values = reviewer.scale * jnp.asarray(value_table(), jnp.float32)[slots, progress_BxS]
  values += reviewer.fooled * reviewer.applause * (is_check.cumsum(1) - is_check)
  step_ids, weights = jnp.broadcast_to(slots, actions_BxS.shape), jnp.where(applauded, 3.0, 1.0)
  return ReviewArrays(
    step_ids, roles, weights, jnp.minimum(values, 1.0), jnp.ones(len(actions_BxS), bool)
  )


def traces(logits_SxCxA, noise_SxBxA):
  """Samples B traces: actions [B, S], the progress before each (at most NEEDED),
  and rewards [B]."""

  def act(progress_B, x):
    logits_CxA, noise_BxA = x
    action_B = jnp.argmax(logits_CxA[progress_B] + noise_BxA, 1)
    return jnp.minimum(progress_B + (action_B == ADVANCE), NEEDED), (action_B, progress_B)

  end_B, (actions, progress) = jax.lax.scan(
    act, jnp.zeros(noise_SxBxA.shape[1], int), (logits_SxCxA, noise_SxBxA)
  )
  return actions.T, progress.T, (end_B == NEEDED).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="config")
def train(config: Scheme, reviewer: Reviewer, noise: jax.Array) -> Curves:
  """Trains one policy for each seed, of `noise` [seeds, updates, S, B, A]."""

  def loss(logits, actions, progress, advantages):
    logp = jax.nn.log_softmax(logits)[jnp.arange(SLOTS), progress, actions]
    return -(advantages * logp).sum() / len(actions)

  def update(logits, noise):
    actions, progress, rewards = traces(logits, noise)
    rows = len(rewards)
    said, grouped = reviewed(actions, progress, reviewer), rewards.reshape(GROUPS, GROUP)
    advantages = token_advantages(
      config, grouped, jnp.ones((rows, SLOTS), bool), jnp.zeros(rows, bool), said
    )
    gradient = jax.grad(loss)(logits, actions, progress, advantages)
    return logits - RATE * gradient, (rewards.mean(), (actions == CHECK).sum(1).mean())

  start = jnp.zeros((SLOTS, NEEDED + 1, 3))
  return jax.vmap(lambda own: Curves(*jax.lax.scan(update, start, own)[1]))(noise)


def run() -> dict[str, Curves]:
  """Every arm's curves over the same noise."""
  noise = jax.random.gumbel(jax.random.key(0), (SEEDS, UPDATES, SLOTS, GROUPS * GROUP, 3))
  return {
    name: Curves(*jax.device_get(train(config, reviewer, noise)))
    for name, (config, reviewer) in ARMS.items()
  }
