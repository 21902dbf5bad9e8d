"""Episodes whose number of turns is the policy's choice: which credit by turn is unbiased.

    python -m evidence.lab.stopping

In each of up to five turns the policy answers, which ends the episode, finds something, wastes its
turn or breaks something. An answer is right if enough was found and nothing is broken; who never
answers fails. After every turn the environment scores the state: the share of what is needed that
was found. All traces are listed, so updates are exact; the schemes are the shipped ones.

N traces, K = 5 turns, A = 4 actions.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dca_jax.credit import Potential, ReviewArrays, Scheme, Uniform
from dca_jax.credit.scheme import Given

TURNS, NEEDED = 5, 2
ANSWER, FIND, WASTE, BREAK = range(4)


class Traces(NamedTuple):
  """Every episode of a policy that chooses freely at every prefix."""

  probability_N: np.ndarray
  reward_N: np.ndarray
  reached_NxK: np.ndarray
  """Whether the episode has such a turn."""
  score_NxK: np.ndarray
  """The environment's of the state before the turn."""
  gradient_NxKxD: np.ndarray
  """Of the log-probability of the turn, by every logit."""


def traces(seed: int = 0) -> Traces:
  rng = np.random.default_rng(seed)
  prefixes: dict[tuple[int, ...], np.ndarray] = {}

  def walk(prefix: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if len(prefix) == TURNS or ANSWER in prefix:
      yield prefix
      return
    odds = np.exp(rng.normal(size=4) + np.array([0.0, 1.0, 0.0, -1.0]))
    prefixes[prefix] = odds / odds.sum()
    for action in range(4):
      yield from walk((*prefix, action))

  episodes = [*walk(())]
  place = {prefix: 4 * i for i, prefix in enumerate(prefixes)}
  shape = len(episodes), TURNS
  reached, score = np.zeros(shape, bool), np.zeros(shape)
  gradient = np.zeros((*shape, 4 * len(prefixes)))
  probability, reward = np.ones(shape[0]), np.zeros(shape[0])
  for i, episode in enumerate(episodes):
    for k, action in enumerate(episode):
      before = episode[:k]
      reached[i, k], score[i, k] = True, min(1.0, before.count(FIND) / NEEDED)
      at = place[before]
      gradient[i, k, at : at + 4] = -prefixes[before]
      gradient[i, k, at + action] += 1
      probability[i] *= prefixes[before][action]
    found, broken = episode.count(FIND), BREAK in episode
    reward[i] = episode[-1] == ANSWER and found >= NEEDED and not broken
  return Traces(probability, reward, reached, score, gradient)


def credit(t: Traces, scheme: Scheme, values_NxK: np.ndarray) -> np.ndarray:
  """What a shipped scheme gives every turn, [N, K]; the exact mean stands for that of a group."""
  n = len(t.reward_N)
  ids = jnp.broadcast_to(jnp.arange(TURNS), (n, TURNS))
  none, ones = jnp.zeros((n, TURNS)), jnp.ones(n, bool)
  said = ReviewArrays(ids, none.astype(int), none, jnp.asarray(values_NxK, jnp.float32), ones)
  own = jnp.asarray(t.reward_N - t.probability_N @ t.reward_N, jnp.float32)
  sampled = jnp.asarray(t.reached_NxK)
  rewards = jnp.asarray(t.reward_N, jnp.float32)
  given = Given(rewards, own, sampled, ~ones, said, lambda x, counts: x)
  return np.asarray(scheme(given), float)


def turn_rewards(t: Traces) -> np.ndarray:
  """What each turn changed of the score, [N, K]; an episode's add up to its reward."""
  after = np.concatenate([t.score_NxK[:, 1:], np.zeros((len(t.reward_N), 1))], 1)
  last = np.arange(TURNS) == t.reached_NxK.sum(1, keepdims=True) - 1
  return np.where(last, t.reward_N[:, None], after) * t.reached_NxK - t.score_NxK


def less_its_mean(t: Traces, x_NxK: np.ndarray) -> np.ndarray:
  """x less its mean over the episodes that have such a turn."""
  weights = t.probability_N[:, None] * t.reached_NxK
  return np.where(t.reached_NxK, x_NxK - (weights * x_NxK).sum(0) / weights.sum(0), 0.0)


def to_go(x_NxK: np.ndarray) -> np.ndarray:
  return np.cumsum(x_NxK[:, ::-1], 1)[:, ::-1]


def rows(t: Traces) -> dict[str, tuple[float, float]]:
  """By arm: cosine of the expected update with the policy gradient, and the size of its error over
  that of the gradient."""
  hostile = np.random.default_rng(1).random(t.score_NxK.shape)[:1] * np.ones((len(t.reward_N), 1))
  arms = {
    "uniform (RLOO)": credit(t, Uniform(), t.score_NxK),
    "potential 1, the environment's scores": credit(t, Potential(), t.score_NxK),
    "potential 1, any numbers by turn": credit(t, Potential(), hostile),
    "potential 0, the environment's scores": credit(t, Potential(discount=0.0), t.score_NxK),
    "return to go less its mean by turn": less_its_mean(t, to_go(turn_rewards(t))),
    "turn rewards less their means by turn, to go": to_go(less_its_mean(t, turn_rewards(t))),
  }
  truth = update(t, np.where(t.reached_NxK, t.reward_N[:, None], 0.0))
  found = {}
  for name, credit_NxK in arms.items():
    ours = update(t, np.where(t.reached_NxK, credit_NxK, 0.0))
    sizes = np.linalg.norm(ours), np.linalg.norm(truth)
    error = np.linalg.norm(ours - truth) / sizes[1]
    found[name] = float(ours @ truth / np.prod(sizes)), float(error)
  return found


def update(t: Traces, credit_NxK: np.ndarray) -> np.ndarray:
  """The expected update, by every logit."""
  return np.einsum("n,nk,nkd->d", t.probability_N, credit_NxK, t.gradient_NxKxD)


def main() -> None:
  print(f"{'credit of a turn':46}  cosine    error")
  for name, (cosine, error) in rows(traces()).items():
    print(f"{name:46}  {cosine:.6f}  {error:.6f}")


if __name__ == "__main__":
  main()
