"""What every credit scheme is: a frozen set of settings that is called with outcomes and reviews.

Arrays: B = P * G episodes in P groups of G, T tokens, K steps. A scheme moves an outcome between
the steps of an episode. Without a usable review every scheme returns the uniform advantage bit for
bit.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dca_jax.checks import one_of
from dca_jax.episode import ROLES, Episode, Review

Array = jax.Array | np.ndarray


class ReviewArrays(typing.NamedTuple):
  """Reviews as arrays of fixed shape. Row i says nothing where `ok_B[i]` is false."""

  step_ids_BxT: Array
  """Which step each token belongs to; from 0, rising by at most 1 from one sampled token to the
  next."""
  roles_BxK: Array
  """Index into `episode.ROLES`."""
  weights_BxK: Array
  """Multiplies the role's intensity. Anything that is not a number between 0 and 1000 voids the
  row, for the schemes that read roles."""
  values_BxK: Array
  """Chance of success before step k is written. What is not a number in [0, 1] is missing."""
  ok_B: Array

  @classmethod
  def of(cls, reviews: Sequence[Review], step_ids_BxT: np.ndarray) -> "ReviewArrays":
    """Arrays of reviews on the host; there are at most as many steps as tokens."""
    shape = step_ids_BxT.shape
    roles_BxK, weights_BxK = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    values_BxK = np.full(shape, np.nan, np.float32)
    for i, review in enumerate(reviews):
      if review.status == "ok":
        roles_BxK[i, : len(review.roles)] = [ROLES.index(role) for role in review.roles]
        weights_BxK[i, : len(review.weights)] = review.weights
        values_BxK[i, : len(review.values)] = review.values
    ok_B = np.array([review.status == "ok" for review in reviews])
    return cls(step_ids_BxT, roles_BxK, weights_BxK, values_BxK, ok_B)


class Given(typing.NamedTuple):
  """What a scheme reads. A row whose review cannot be used has `ok_B` false and weights 0."""

  rewards_B: jax.Array
  advantages_B: jax.Array
  """The episode's own, per token."""
  sampled_BxT: jax.Array
  truncated_B: jax.Array
  review: ReviewArrays
  expected: Callable[[jax.Array, Array], jax.Array]
  """`expected(x_BxT, counts_B)`: for each sampled token the mean of x over the other episodes of
  its group, at the same share of their sampled tokens; over those where `counts_B`, and 0 where
  there is none."""
  facts: typing.Any = None
  """What `Scheme.facts` made of the batch."""


@dataclasses.dataclass(frozen=True)
class Scheme:
  """The `credit` section: settings that all schemes have. A scheme is a subclass with settings of
  its own and a `__call__`; its docstring says which sum it keeps, whether its expected update is
  the policy gradient, and where it comes from.
  """

  scheme: str = ""
  """`uniform`, `calibrated`, `weighted`, `signed`, `return_to_go`, `potential`, or, for comparison,
  `capo`; or your own, MODULE:CLASS."""
  baseline: str = "leave_one_out"
  """What is subtracted from a reward: the mean of the group's other rewards (Kool et al. 2019,
  Ahmadian et al. 2024), or the whole group's `mean` (Shao et al. 2024)."""
  divide_by_std: bool = False
  """Divide by the group's standard deviation, as GRPO was published; it weights easy and hard
  problems up. By 1e-3 at least, so that rewards which hardly differ do not count as much as right
  and wrong."""
  conserve: str = "tokens"
  """An episode's mass is its T_i sampled tokens times its advantage (`tokens`), or the same number
  of tokens for every episode (`completion`): then tokens without credit cannot pump up the
  others."""
  guard: bool = True
  """Lower the reviewer's share of credit while the policy seems to perform for it
  (docs/method.md); without effect where the reviewer tells the task's own truth."""

  reads: ClassVar[tuple[str, ...]] = ()
  """What of a review: `roles`, `values`."""
  conserves: ClassVar[bool] = False
  """Whether the sum over an episode is its mass, whatever the review says."""
  idle_when_equal: ClassVar[bool] = False
  """Whether a review moves nothing in a group whose rewards are all equal."""
  reads_either: ClassVar[bool] = False
  """Whether one of what it `reads` is enough."""
  needs_checks: ClassVar[bool] = False
  """Whether it learns from spot checks."""
  least_steps: ClassVar[int] = 2
  """Of an episode with fewer steps a review moves nothing."""
  ignores: ClassVar[tuple[str, ...]] = ()
  """Settings of this base class that have no effect."""

  def check(self) -> dict[str, str]:
    return one_of(self, "baseline", "leave_one_out", "mean") | one_of(
      self, "conserve", "tokens", "completion"
    )

  def unused(self) -> dict[str, str]:
    return dict.fromkeys(self.ignores, f"credit.scheme is '{self.scheme}'")

  def begin(self) -> typing.Any:
    """What training keeps for the scheme at the start, a pytree of arrays; None where it keeps
    nothing. It is saved with every checkpoint."""
    return None

  def facts(
    self, state: typing.Any, episodes: Sequence[Episode], group: int, most: int
  ) -> typing.Any:
    """What `__call__` finds as `given.facts`: arrays with a row for each episode, made on the host
    from what training keeps and from the reviewed episodes, `group` after `group`, which have at
    most `most` steps. Their shapes depend on these numbers alone."""
    return None

  def evidence(self, state: typing.Any, episodes: Sequence[Episode], group: int) -> typing.Any:
    """What `learn` wants to know of this process's part of a batch; what JSON can hold."""
    return None

  def learn(
    self, state: typing.Any, evidence: Sequence[typing.Any]
  ) -> tuple[typing.Any, dict[str, float]]:
    """What training keeps from now on, and metrics; from the `evidence` of every process."""
    return state, {}

  def __call__(self, given: Given) -> jax.Array:
    """The advantage of every token, [B, T]; what it says of tokens that were not sampled is not
    read."""
    raise TypeError(f"{type(self).__name__} has no __call__(given)")


def group_advantages(scheme: Scheme, rewards_PxG: jax.Array) -> jax.Array:
  """Reward minus baseline, [P, G]; exactly 0 in a group whose rewards are all equal."""
  total, group = rewards_PxG.sum(1, keepdims=True), rewards_PxG.shape[1]
  others = scheme.baseline == "leave_one_out"
  advantages = rewards_PxG - ((total - rewards_PxG) / (group - 1) if others else total / group)
  equal = (rewards_PxG == rewards_PxG[:, :1]).all(1, keepdims=True)
  if scheme.divide_by_std:
    advantages /= jnp.maximum(rewards_PxG.std(1, keepdims=True), 1e-3)
  return jnp.where(equal, 0.0, advantages)


def token_advantages(
  scheme: Scheme,
  rewards_PxG: jax.Array,
  sampled_BxT: jax.Array,
  truncated_B: jax.Array,
  review: ReviewArrays,
  facts: typing.Any = None,
) -> jax.Array:
  """The advantage of every token, [B, T] in float32; 0 where a token was not sampled.

  Where the scheme `conserves`, the sum over an episode is T_i * A_i, or T * A_i with
  `conserve="completion"`, to within float32 rounding, whatever the review says.
  """
  advantages_B = group_advantages(scheme, rewards_PxG).reshape(-1)
  counts_B = sampled_BxT.sum(1)
  if scheme.conserve == "completion":
    advantages_B = advantages_B * (sampled_BxT.shape[1] / jnp.maximum(counts_B, 1))
  review = _sanitised(scheme, sampled_BxT, review)
  expected = functools.partial(_others_mean, scheme.baseline, rewards_PxG.shape[1], sampled_BxT)
  rewards_B = rewards_PxG.reshape(-1)
  given = Given(rewards_B, advantages_B, sampled_BxT, truncated_B, review, expected, facts)
  said_BxT = jnp.where(review.ok_B[:, None], scheme(given), advantages_B[:, None])
  return jnp.where(sampled_BxT, said_BxT, 0.0)


def spread(lam: float, cap: float, given: Given, intensity_BxT: jax.Array) -> jax.Array:
  """A_i * (1 + lam * (w_t - 1)), with w_t the intensity scaled so that the w_t sum to T_i.

  It is A_i where all intensities of an episode are equal. Where a multiplier would exceed `cap`,
  all of the episode's contrast is shrunk until none does, so the sum stays.
  """
  advantages_B, sampled_BxT = given.advantages_B, given.sampled_BxT
  peak_B = intensity_BxT.max(1)
  says_nothing_B = all_equal(intensity_BxT, sampled_BxT) | (peak_B < 1e-6)
  intensity_BxT /= jnp.where(says_nothing_B, 1.0, peak_B)[:, None]
  counts_B = jnp.maximum(sampled_BxT.sum(1), 1)
  mean_B = jnp.where(says_nothing_B, 1.0, intensity_BxT.sum(1) / counts_B)
  excess_BxT = jnp.where(says_nothing_B[:, None], 0.0, intensity_BxT / mean_B[:, None] - 1.0)
  most_B = jnp.where(sampled_BxT, excess_BxT, 0.0).max(1)
  contrast_B = jnp.minimum(lam, (cap - 1) / jnp.where(most_B > 0, most_B, 1.0))
  return advantages_B[:, None] * (1.0 + contrast_B[:, None] * excess_BxT)


def all_equal(x_BxT: jax.Array, sampled_BxT: jax.Array) -> jax.Array:
  """Whether x is the same for all sampled tokens of an episode, [B]."""
  largest_B = jnp.where(sampled_BxT, x_BxT, -jnp.inf).max(1)
  return largest_B == jnp.where(sampled_BxT, x_BxT, jnp.inf).min(1)


def _sanitised(scheme: Scheme, sampled_BxT: jax.Array, review: ReviewArrays) -> ReviewArrays:
  """The review without weights that are no numbers, and `ok_B` false where what the scheme reads
  cannot be used."""
  sane_BxK = (review.weights_BxK >= 0) & (review.weights_BxK <= 1000)  # false for NaN too
  if "values" in scheme.reads and not scheme.reads_either:
    readable_BxK = (review.values_BxK >= 0) & (review.values_BxK <= 1)
    readable_BxT = jnp.take_along_axis(readable_BxK, review.step_ids_BxT, 1)
    usable_B = (sampled_BxT & readable_BxT).any(1)
  else:
    usable_B = (~sampled_BxT | jnp.take_along_axis(sane_BxK, review.step_ids_BxT, 1)).all(1)
  weights_BxK = jnp.where(sane_BxK, review.weights_BxK, 0.0)
  return review._replace(weights_BxK=weights_BxK, ok_B=review.ok_B & usable_B)


def _others_mean(
  baseline: str, group: int, sampled_BxT: jax.Array, x_BxT: jax.Array, counts_B: jax.Array
) -> jax.Array:
  """See `Given.expected`; with the baseline `mean` the episode itself counts too."""
  b, t = x_BxT.shape
  length_Bx1 = sampled_BxT.sum(1, keepdims=True).astype(jnp.uint32)
  # Sampled tokens first, in their order; and of each sampled token its place among them.
  first_BxT = jnp.argsort(~sampled_BxT, 1, stable=True)
  place_BxT = jnp.maximum(jnp.cumsum(sampled_BxT, 1) - 1, 0).astype(jnp.uint32)
  # Whole numbers: a share in float32 would miss its token now and then. Unsigned, they hold
  # 65,535 x 65,535.
  share_T = jnp.arange(t, dtype=jnp.uint32)
  counts_B = counts_B.astype(jnp.float32)
  at_share_BxT = (share_T * length_Bx1 // t).astype(jnp.int32)
  at_share_BxT = jnp.take_along_axis(first_BxT, at_share_BxT, 1)
  own_BxT = counts_B[:, None] * jnp.take_along_axis(x_BxT, at_share_BxT, 1)
  sum_BxT = jnp.repeat(own_BxT.reshape(b // group, group, t).sum(1), group, 0)
  n_B = jnp.repeat(counts_B.reshape(b // group, group).sum(1), group)
  if baseline == "leave_one_out":
    sum_BxT, n_B = sum_BxT - own_BxT, n_B - counts_B
  mean_BxT = sum_BxT / jnp.maximum(n_B, 1)[:, None]
  back_BxT = (place_BxT * t + length_Bx1 - 1) // jnp.maximum(length_Bx1, 1)
  return jnp.take_along_axis(mean_BxT, jnp.minimum(back_BxT, t - 1).astype(jnp.int32), 1)


class Advantages(typing.NamedTuple):
  """What the episodes of a batch are worth, [P, G], and their tokens, [B, T]."""

  episodes_PxG: Array
  tokens_BxT: Array


@functools.partial(jax.jit, static_argnums=0)
def assign_credit(
  scheme: Scheme,
  rewards_PxG: jax.Array,
  sampled_BxT: jax.Array,
  truncated_B: jax.Array,
  review: ReviewArrays,
  facts: typing.Any = None,
) -> Advantages:
  tokens_BxT = token_advantages(scheme, rewards_PxG, sampled_BxT, truncated_B, review, facts)
  return Advantages(group_advantages(scheme, rewards_PxG), tokens_BxT)
