"""Drift where performing takes room, and where all fail at first: answers of their own length.

Five actions: `right` makes progress, `wrong` spoils the answer for good, `plain` and `check` change
nothing, `end` ends the answer. It succeeds if it ends, within the limit, unspoilt and with enough
progress; every step costs a little of the reward. A reviewer that is fooled in one class applauds
checks and is the oracle elsewhere. The policy is a table of logits by slot, progress and whether
the answer is spoilt, trained by plain gradient ascent with the shipped `token_advantages`. Two
starts: one that succeeds now and then, and one where nearly all groups fail.

S slots, A actions, B = P * G answers; the arrays of a run gain an axis for seeds.
"""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np

from dca_jax.credit import (
  Capo,
  Potential,
  ReviewArrays,
  Scheme,
  Signed,
  Uniform,
  Weighted,
  token_advantages,
)
from dca_jax.episode import ROLES

SLOTS, NEEDED, COST = 12, 4, 0.02
RIGHT, WRONG, PLAIN, CHECK, END = range(5)
GROUPS, GROUP = 8, 8
UPDATES, RATE, SEEDS = 400, 2.0, 8
STARTS = {"some succeed": (1.5, 0.0, 0.5, 0.5, -0.5), "nearly all fail": (1.5, 1.2, 0.5, 0.5, 0.5)}
"""Logits of the actions."""
ARMS: dict[str, tuple[Scheme, bool]] = {
  "uniform (RLOO)": (Uniform(), False),
  "weighted, honest": (Weighted(), False),
  "weighted, fooled": (Weighted(), True),
  "weighted, lambda 1, fooled": (Weighted(lam=1.0), True),
  "potential 1, fooled": (Potential(), True),
  "signed, honest": (Signed(), False),
  "signed, fooled": (Signed(), True),
  "capo, honest": (Capo(), False),
}
"""Scheme, and whether the reviewer is fooled."""


class Curves(typing.NamedTuple):
  """Means over the answers of an update; [seeds, updates]."""

  accuracy: np.ndarray
  checks: np.ndarray
  steps: np.ndarray
  truncated: np.ndarray


class End(typing.NamedTuple):
  """Of every seed's last 30 updates."""

  accuracy: float
  worst: float
  """Accuracy of the worst seed."""
  checks: float
  steps: float
  truncated: float


def end(curves: Curves) -> End:
  last = [x[:, -30:].mean(1) for x in curves]
  return End(float(last[0].mean()), float(last[0].min()), *(float(x.mean()) for x in last[1:]))


class Answers(typing.NamedTuple):
  """[B, S], but for `success_B` and `truncated_B`."""

  actions: jax.Array
  progress: jax.Array
  """Before each step."""
  spoilt: jax.Array
  sampled: jax.Array
  success_B: jax.Array
  truncated_B: jax.Array


def answers(logits: jax.Array, noise_SxBxA: jax.Array) -> Answers:
  """Samples B answers; `logits` are [S, NEEDED + 1, 2, A]."""

  def act(state, x):
    progress_B, spoilt_B, ended_B = state
    table, noise_BxA = x
    action_B = jnp.argmax(table[progress_B, spoilt_B] + noise_BxA, 1)
    after = (
      jnp.minimum(progress_B + (action_B == RIGHT), NEEDED),
      spoilt_B | (action_B == WRONG),
      ended_B | (action_B == END),
    )
    now = tuple(jnp.where(ended_B, old, new) for old, new in zip(state, after, strict=True))
    return now, (action_B, progress_B, spoilt_B, ~ended_B)

  b = noise_SxBxA.shape[1]
  start = jnp.zeros(b, int), jnp.zeros(b, int), jnp.zeros(b, bool)
  (progress_B, spoilt_B, ended_B), told = jax.lax.scan(act, start, (logits, noise_SxBxA))
  success_B = ended_B & (progress_B == NEEDED) & (spoilt_B == 0)
  return Answers(*(x.T for x in told), success_B, ~ended_B)


def reviewed(a: Answers, value: jax.Array, fooled: bool) -> ReviewArrays:
  clean, done = a.spoilt == 0, a.progress == NEEDED
  cases = {
    "error": (a.actions == WRONG) | ((a.actions == END) & clean & ~done),
    "redundant": (a.actions == CHECK) | ((a.actions == RIGHT) & done),
    "irrelevant": a.actions == PLAIN,
    "inherits": ~clean,
  }
  numbers = [ROLES.index(name) for name in cases]
  roles = jnp.select([*cases.values()], numbers, ROLES.index("necessary"))
  applauded = (a.actions == CHECK) & fooled
  roles = jnp.where(applauded, ROLES.index("necessary"), roles)
  slots = jnp.broadcast_to(jnp.arange(SLOTS), a.actions.shape)
  raised = 0.05 * fooled * (applauded.cumsum(1) - applauded)
  values = jnp.minimum(value[slots, a.progress, a.spoilt] + raised, 1.0)
  weights = jnp.where(applauded, 3.0, 1.0)
  return ReviewArrays(slots, roles, weights, values, jnp.ones(len(slots), bool))


def value_table(bias: tuple[float, ...]) -> np.ndarray:
  """Chance [S + 1, NEEDED + 1, 2] that the policy of the start still succeeds."""
  p = np.exp(bias) / np.exp(bias).sum()
  table = np.zeros((SLOTS + 1, NEEDED + 1, 2))
  for slot in reversed(range(SLOTS)):
    ahead = table[slot + 1, :, 0]
    onward = np.append(ahead[1:], ahead[-1])
    table[slot, :, 0] = p[RIGHT] * onward + (p[PLAIN] + p[CHECK]) * ahead
    table[slot, NEEDED, 0] += p[END]
  return table


@functools.partial(jax.jit, static_argnames=("config", "fooled", "bias"))
def train(config: Scheme, fooled: bool, bias: tuple[float, ...], noise: jax.Array) -> Curves:
  """Trains one policy for each seed, of `noise` [seeds, updates, S, B, A]."""
  value = jnp.asarray(value_table(bias), jnp.float32)

  def loss(logits, a, advantages):
    slots = jnp.arange(SLOTS)
    logp = jax.nn.log_softmax(logits)[slots, a.progress, a.spoilt, a.actions]
    return -(advantages * logp).sum() / len(logp)

  def update(logits, noise):
    a = answers(logits, noise)
    steps_B = a.sampled.sum(1)
    rewards = (a.success_B * (1 - COST * steps_B)).reshape(GROUPS, GROUP)
    said = reviewed(a, value, fooled)
    advantages = token_advantages(config, rewards, a.sampled, a.truncated_B, said)
    checks = ((a.actions == CHECK) & a.sampled).sum(1)
    told = a.success_B, checks, steps_B, a.truncated_B
    gradient = jax.grad(loss)(logits, a, advantages)
    return logits - RATE * gradient, tuple(x.mean(dtype=jnp.float32) for x in told)

  start = jnp.broadcast_to(jnp.array(bias), (SLOTS, NEEDED + 1, 2, 5))
  return jax.vmap(lambda own: Curves(*jax.lax.scan(update, start, own)[1]))(noise)


def run() -> dict[str, dict[str, Curves]]:
  """Every start's arms, all over the same noise."""
  noise = jax.random.gumbel(jax.random.key(0), (SEEDS, UPDATES, SLOTS, GROUPS * GROUP, 5))
  return {
    start: {
      name: Curves(*jax.device_get(train(config, fooled, bias, noise)))
      for name, (config, fooled) in ARMS.items()
    }
    for start, bias in STARTS.items()
  }
