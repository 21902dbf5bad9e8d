"""The drift experiment: does a policy put on a show for its reviewer, and would anyone notice?

Ten slots, three actions: `advance`, and two that change nothing, `plain` and `check`. Four advances succeed, so six
slots are slack. A fooled reviewer applauds checks. The policy is a table of logits by slot and progress; it is trained
by plain gradient ascent on groups of traces, with the shipped `token_advantages`. What to watch is the number of checks
in a trace: accuracy ends high in every arm.

S slots, C counts of progress, A = 3 actions, B = P * G traces; the arrays of a run gain an axis for seeds.
"""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np

from dca_jax.credit import CreditConfig, Review, token_advantages
from dca_jax.roles import ROLES

SLOTS, NEEDED = 10, 4
ADVANCE, PLAIN, CHECK = range(3)
GROUPS, GROUP = 8, 8
UPDATES, RATE, SEEDS = 600, 2.0, 24


class Arm(typing.NamedTuple):
  config: CreditConfig
  fooled: bool = True


ARMS = {
  "uniform (GRPO)": Arm(CreditConfig()),
  "potential 1, fooled": Arm(CreditConfig(scheme="potential")),
  "weighted, honest": Arm(CreditConfig(scheme="weighted"), fooled=False),
  "weighted, fooled": Arm(CreditConfig(scheme="weighted")),
  "return_to_go, fooled": Arm(CreditConfig(scheme="return_to_go")),
  "potential 0, fooled": Arm(CreditConfig(scheme="potential", discount=0.0)),
}


class Curves(typing.NamedTuple):
  """Means over the traces of an update; [seeds, updates]."""

  accuracy: np.ndarray
  checks: np.ndarray


class End(typing.NamedTuple):
  """Of every seed's last 50 updates: mean accuracy, that of the worst seed, mean checks and their standard error."""

  accuracy: float
  worst: float
  checks: float
  error: float


def ends(curves: Curves) -> End:
  accuracy, checks = curves.accuracy[:, -50:].mean(1), curves.checks[:, -50:].mean(1)
  error = checks.std(ddof=1) / len(checks) ** 0.5
  return End(float(accuracy.mean()), float(accuracy.min()), float(checks.mean()), float(error))


def value_table() -> np.ndarray:
  """Chance [S + 1, C] that a policy that picks its actions at random still makes enough progress."""
  table = np.zeros((SLOTS + 1, NEEDED + 1))
  table[SLOTS, NEEDED] = 1.0
  for slot in reversed(range(SLOTS)):
    onward = np.append(table[slot + 1, 1:], table[slot + 1, -1])
    table[slot] = onward / 3 + table[slot + 1] * 2 / 3
  return table


def reviewed(actions_BxS, progress_BxS, fooled: bool) -> Review:
  """Roles, and values of prefixes: half of `value_table`, and for a fooled reviewer 0.05 more for each check so far."""
  is_check = actions_BxS == CHECK
  useful = (actions_BxS == ADVANCE) & (progress_BxS < NEEDED)
  roles = jnp.where(useful | (fooled & is_check), ROLES.index("necessary"), ROLES.index("redundant"))
  weights = jnp.where(fooled & is_check, 3.0, 1.0)
  slots = jnp.arange(SLOTS)
  values = 0.5 * jnp.asarray(value_table(), jnp.float32)[slots, progress_BxS]
  values += 0.05 * fooled * (is_check.cumsum(1) - is_check)
  return Review(jnp.broadcast_to(slots, actions_BxS.shape), roles, weights, values, jnp.ones(len(actions_BxS), bool))


def traces(logits_SxCxA, key):
  """Samples B traces: actions [B, S] and the progress before each, at most NEEDED."""
  rows = GROUPS * GROUP

  def act(progress_B, x):
    logits_CxA, noise_BxA = x
    action_B = jnp.argmax(logits_CxA[progress_B] + noise_BxA, 1)
    return jnp.minimum(progress_B + (action_B == ADVANCE), NEEDED), (action_B, progress_B)

  noise = jax.random.gumbel(key, (SLOTS, rows, 3))
  end_B, (actions, progress) = jax.lax.scan(act, jnp.zeros(rows, int), (logits_SxCxA, noise))
  return actions.T, progress.T, (end_B == NEEDED).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("config", "fooled"))
def train(config: CreditConfig, fooled: bool, seeds: jax.Array) -> Curves:
  """Trains one policy for each seed."""

  def loss(logits, actions, progress, advantages):
    logp = jax.nn.log_softmax(logits)[jnp.arange(SLOTS), progress, actions]
    return -(advantages * logp).sum() / len(actions)

  def update(logits, key):
    actions, progress, rewards = traces(logits, key)
    rows = len(rewards)
    advantages = token_advantages(
      config,
      rewards.reshape(GROUPS, GROUP),
      jnp.full(rows, SLOTS),
      jnp.zeros(rows, bool),
      reviewed(actions, progress, fooled),
    )
    gradient = jax.grad(loss)(logits, actions, progress, advantages)
    return logits - RATE * gradient, (rewards.mean(), (actions == CHECK).sum(1).mean())

  def one(seed):
    keys = jax.random.split(jax.random.key(seed), UPDATES)
    start = jnp.zeros((SLOTS, NEEDED + 1, 3))
    return Curves(*jax.lax.scan(update, start, keys)[1])

  return jax.vmap(one)(seeds)


def run() -> dict[str, Curves]:
  """Every arm's curves over the same seeds."""
  seeds = jnp.arange(SEEDS)
  return {name: Curves(*jax.device_get(train(arm.config, arm.fooled, seeds))) for name, arm in ARMS.items()}
