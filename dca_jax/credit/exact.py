"""A task so small that all of its traces can be listed: the exact update of every scheme.

Six steps, five actions. `advance` makes progress; `error` opens an error and `fix` closes it;
`plain` and `check` change nothing, and a fooled reviewer applauds `check`. A trace succeeds if it
made enough progress and left no error open. The policy chooses freely at every prefix (its own
logits there), so the score vectors of two prefixes are orthogonal and expectations over all 15,625
traces have closed forms. Credit comes from the shipped schemes, in float32, a step being one token;
the rest is float64.

N traces, T = 6 steps, A = 5 actions.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dca_jax.credit.scheme import Given, ReviewArrays, Scheme
from dca_jax.episode import ROLES

STEPS = 6
ACTIONS = ("advance", "plain", "check", "error", "fix")
ADVANCE, PLAIN, CHECK, ERROR, FIX = range(len(ACTIONS))
NEEDED = 2
BIAS = np.array([1.0, 0.5, 0.5, 0.0, 0.0])


class Tree(NamedTuple):
  """Every trace of the policy, in lexicographic order, and what is true of it."""

  actions_NxT: np.ndarray
  policy: list[np.ndarray]
  """For each step t the probabilities [A^t, A] of the actions at each prefix that can stand before
  it."""
  probability_N: np.ndarray
  reward_N: np.ndarray
  value_NxT: np.ndarray
  """Chance of success from the prefix before step t."""
  progress_NxT: np.ndarray
  """Advances before step t."""
  open_NxT: np.ndarray
  """Whether an error stands open before step t."""


@functools.lru_cache
def make_tree(steps: int = STEPS, seed: int = 0) -> Tree:
  """The tree, its logits drawn around a common bias."""
  rng = np.random.default_rng(seed)
  actions = np.array(list(itertools.product(range(len(ACTIONS)), repeat=steps)))
  n = len(actions)
  policy = []
  for t in range(steps):
    before = actions[:: len(ACTIONS) ** (steps - t), :t]  # the prefixes
    # At first the policy makes no difference between the two inert actions: they are worth the
    # same.
    alike = np.where(before == CHECK, PLAIN, before) @ len(ACTIONS) ** np.arange(t)[::-1]
    noise = rng.normal(size=(len(before), len(ACTIONS)))[alike.astype(int)]
    odds = np.exp(BIAS + 0.5 * noise)
    policy.append(odds / odds.sum(1, keepdims=True))
  probability = np.ones(n)
  progress, is_open = np.zeros((n, steps + 1), int), np.zeros((n, steps + 1), bool)
  for t in range(steps):
    probability = probability * np.repeat(policy[t].reshape(-1), n // policy[t].size)
    progress[:, t + 1] = progress[:, t] + (actions[:, t] == ADVANCE)
    is_open[:, t + 1] = (is_open[:, t] | (actions[:, t] == ERROR)) & (actions[:, t] != FIX)
  reward = ((progress[:, -1] >= NEEDED) & ~is_open[:, -1]).astype(float)
  value = np.empty((n, steps))
  for t in range(steps):
    p, won = (x.reshape(len(policy[t]), -1) for x in (probability, probability * reward))
    value[:, t] = np.repeat(won.sum(1) / p.sum(1), p.shape[1])
  return Tree(actions, policy, probability, reward, value, progress[:, :-1], is_open[:, :-1])


def roles(tree: Tree) -> np.ndarray:
  """The true roles [N, T]: progress is necessary while it is needed, and a fix repairs where
  something is broken."""
  a = tree.actions_NxT
  cases = (a == ADVANCE) & (tree.progress_NxT < NEEDED), a == ERROR, (a == FIX) & tree.open_NxT
  return np.select(
    cases,
    [ROLES.index(role) for role in ("necessary", "error", "repair")],
    ROLES.index("redundant"),
  )


def review(
  tree: Tree, roles_NxT: Any = 0, weights_NxT: Any = 1.0, values_NxT: Any = np.nan
) -> ReviewArrays:
  n, t = tree.actions_NxT.shape
  said = (np.arange(t), roles_NxT, np.float32(weights_NxT), np.float32(values_NxT))
  ids, roles, weights, values = (np.broadcast_to(x, (n, t)) for x in said)
  return ReviewArrays(ids, roles, weights, values, np.ones(n, bool))


class Row(NamedTuple):
  """The exact expected update of one scheme with one reviewer."""

  name: str
  cosine: float
  """Between the expected update and the policy gradient."""
  snr: float
  """|E g|^2 / E |g - E g|^2 of one trace's update g."""
  leading: float
  """Performative premium: expected credit of `check` less that of `plain`, averaged over the
  prefixes from which the chance of success is above that of the start."""
  trailing: float
  """The same over the other prefixes."""


def credit(
  tree: Tree, scheme: Scheme, said: ReviewArrays, facts_NxT: np.ndarray | None = None
) -> np.ndarray:
  """The scheme's coefficient of every step, [N, T], with the exact expectation in the place of a
  group's mean; `facts_NxT` is what a scheme with a state knows of each step."""
  reward, p = tree.reward_N, tree.probability_N

  def expected(x_NxT: Any, counts_N: Any) -> jax.Array:
    weight = p * np.asarray(counts_N)
    return jnp.broadcast_to(
      jnp.asarray(weight @ np.asarray(x_NxT, float) / weight.sum(), jnp.float32), x_NxT.shape
    )

  given = Given(
    jnp.asarray(reward, jnp.float32),
    jnp.asarray(reward - p @ reward, jnp.float32),
    jnp.ones(tree.actions_NxT.shape, bool),
    jnp.zeros(len(reward), bool),
    ReviewArrays(*(jnp.asarray(x) for x in said)),
    expected,
    None if facts_NxT is None else jnp.asarray(facts_NxT, jnp.float32),
  )
  return np.asarray(scheme(given), float)


def measure(tree: Tree, name: str, credit_NxT: np.ndarray) -> Row:
  """The exact moments of the update sum_t credit_t grad log pi(a_t | prefix_t), by prefix and
  action."""
  size = inner = true_size = second = 0.0
  gains, weights, leads = [], [], []
  for t, pi in enumerate(tree.policy):
    # By action, and by every prefix that can stand before it.
    given, given_squared, won, reached = (
      (tree.probability_N * x_N).reshape(*pi.shape, -1).sum(2)
      for x_N in (credit_NxT[:, t], credit_NxT[:, t] ** 2, tree.reward_N, 1.0)
    )
    ours, truth = (joint - pi * joint.sum(1, keepdims=True) for joint in (given, won))
    size, inner, true_size = (
      size + (ours**2).sum(),
      inner + (ours * truth).sum(),
      true_size + (truth**2).sum(),
    )
    second += (
      given_squared * (1 - 2 * pi + (pi**2).sum(1, keepdims=True))
    ).sum()  # times |e_a - pi|^2
    mean = given / reached
    gains.append(mean[:, CHECK] - mean[:, PLAIN])
    weights.append(reached.sum(1))
    leads.append(won.sum(1) / weights[-1] > tree.probability_N @ tree.reward_N)
  gain, weight, lead = (np.concatenate(x) for x in (gains, weights, leads))
  premiums = (np.average(gain[where], weights=weight[where]) for where in (lead, ~lead))
  return Row(
    name,
    float(inner / np.sqrt(size * true_size)),
    float(size / (second - size)),
    *map(float, premiums),
  )
