"""The guard: takes credit away from a reviewer that the policy has begun to perform for.

To first order an update by outcomes alone changes the mean of any count c of an answer by a
positive number times the covariance of c and the reward within groups (Price 1970; for natural
policy gradients it is exact). So a count that rises although, within groups, answers with more of
it do not win more often, rises for another reason. The guard adds up such rises of what credit can
corrupt, and every fall of the reward, and halves the reviewer's share for as long as one of them
is beyond chance and large. It is a seat belt and no method: it sees what it counts, and only when
it has begun.

P groups, W things watched.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dca_jax.credit.calibrated import SEEN, seen_of
from dca_jax.credit.scheme import Given, Scheme
from dca_jax.episode import Episode

WATCHED = ("repeats", "checks", "length", "truncated", "reward")
"""Of the last what is missing to 1 is counted, so that more is worse of each."""
_LEAST = np.array([0.5, 0.5, 1.0, 0.2, 0.2])
"""What the answers of the first batch are taken to differ by at least."""
_SMOOTH, _KEEP = 0.3, 0.99  # Of a batch in the running means; of a rise from step to step.
_LARGE, _SURE = np.array([0.25] * 4 + [0.1]), 3.0
"""A rise counts beyond so many spreads of an answer and standard errors of a running mean."""
_RISE = 0.02


class State(NamedTuple):
  """What the guard keeps; arrays of one number or [W]."""

  share: Any
  """Of the reviewer, from 0 to 1; the rest of credit is uniform."""
  means: Any
  """Running means of what is watched."""
  errors: Any
  """Variances of the means of single batches, over groups."""
  spreads: Any
  """Standard deviations over the answers of the first batch; 0 before it."""
  rises: Any
  """How far each has risen without being paid for by the outcome."""
  paid: Any
  """[2, W]: sums over groups of the covariance with the reward, and of its square; older batches
  count less."""


@dataclasses.dataclass(frozen=True)
class Guarded(Scheme):
  """`inner`, of whose credit only the guard's share holds; A_t = A_i in the rest."""

  inner: Scheme = Scheme()

  def __post_init__(self) -> None:
    for name in Scheme.__annotations__:
      object.__setattr__(self, name, getattr(self.inner, name))

  def begin(self) -> tuple[State, Any]:
    each = np.zeros(len(WATCHED), np.float32)
    state = State(np.float32(1), each, each, each, each, np.stack([each, each]))
    return state, self.inner.begin()

  def facts(self, state: Any, episodes: Sequence[Episode], group: int, most: int) -> Any:
    own, inner = state
    shares_B = np.full(len(episodes), own.share, np.float32)
    return shares_B, self.inner.facts(inner, episodes, group, most)

  def __call__(self, given: Given) -> jax.Array:
    shares_B, inner = given.facts
    said_BxT = self.inner(given._replace(facts=inner))
    shares_Bx1 = shares_B[:, None]
    return given.advantages_B[:, None] * (1 - shares_Bx1) + said_BxT * shares_Bx1

  def evidence(self, state: Any, episodes: Sequence[Episode], group: int) -> Any:
    return counted(episodes, group), self.inner.evidence(state[1], episodes, group)

  def learn(self, state: Any, evidence: Sequence[Any]) -> tuple[Any, dict[str, float]]:
    counts, inner = zip(*evidence, strict=True)
    own, metrics = watch(state[0], counts)
    kept, more = self.inner.learn(state[1], inner)
    return (own, kept), metrics | more


def counted(episodes: Sequence[Episode], group: int) -> list[Any]:
  """What is watched in each group of a batch: mean, covariance with the reward and variance,
  [P, 3, W]."""
  seen = [seen_of(episode) for episode in episodes]
  counts_BxW = np.array(
    [
      [
        kinds.count(SEEN.index("repeat")),
        kinds.count(SEEN.index("check")),
        sum(step.end - step.start for step in episode.steps),
        episode.outcome.truncated,
        1 - episode.outcome.reward,
      ]
      for kinds, episode in zip(seen, episodes, strict=True)
    ],
    float,
  )
  counts_PxGxW = counts_BxW.reshape(-1, group, len(WATCHED))
  means_PxW = counts_PxGxW.mean(1)
  own = counts_PxGxW - means_PxW[:, None]
  covariances_PxW = (own * -own[..., -1:]).mean(1)
  return np.stack([means_PxW, covariances_PxW, (own**2).mean(1)], 1).tolist()


def watch(state: State, counts: Sequence[Any]) -> tuple[State, dict[str, float]]:
  """The state after a batch, of which every process has told what it `counted`."""
  means_PxW, covariances_PxW, variances_PxW = np.concatenate(counts).swapaxes(0, 1)
  now, among = means_PxW.mean(0), means_PxW.var(0)
  first = not state.spreads.any()
  step = 1.0 if first else _SMOOTH
  means = state.means + step * (now - state.means)
  errors = state.errors + step * (among / max(1, len(means_PxW) - 1) - state.errors)
  spreads = np.maximum(np.sqrt(variances_PxW.mean(0) + among), _LEAST) if first else state.spreads
  sums = [covariances_PxW.sum(0), (covariances_PxW**2).sum(0)]
  paid = np.array([[0.9], [0.81]]) * state.paid + sums

  change = np.zeros(len(WATCHED)) if first else means - state.means
  change = np.where(paid[0] > 2 * np.sqrt(paid[1]), np.minimum(change, 0.0), change)
  rises = np.maximum(0.0, _KEEP * state.rises + change)
  chance = np.sqrt(errors * _SMOOTH / (2 - _SMOOTH))
  over = rises / (_LARGE * spreads + _SURE * chance)
  worst, share = int(np.argmax(over)), float(state.share)
  if over[worst] > 1:
    share = share / (1 + over[worst]) if share > _RISE else 0.0
  elif over[worst] < 0.5:
    share = min(1.0, share + _RISE)
  metrics = {f"guard/{name}": float(x) for name, x in zip(WATCHED, over, strict=True)}
  metrics |= {"guard/share": share, "guard/reason": float(worst + 1 if over[worst] > 1 else 0)}
  new = State(share, means, errors, spreads, rises, paid)
  return State(*(np.float32(x) for x in new)), metrics
