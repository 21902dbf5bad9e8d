"""The built-in schemes.

Intensities are per token, so cutting one step into two of the same kind changes nothing. `weighted`
and `signed` are uniform also where a review calls every step alike.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dca_jax.checks import at_least, between
from dca_jax.credit.calibrated import Calibrated
from dca_jax.credit.scheme import Given, ReviewArrays, Scheme, all_equal, spread
from dca_jax.episode import ROLES


@dataclasses.dataclass(frozen=True)
class RoleTable:
  """A non-negative intensity per token for each role."""

  necessary: float = 0.0
  """Intensity of a token of a step that is right and that the result depends on."""
  redundant: float = 0.0
  """Intensity of a token of a right step that repeats what is known, or that the result does not
  depend on."""
  irrelevant: float = 0.0
  """Intensity of a token of a step that has nothing to do with what is asked."""
  error: float = 0.0
  """Intensity of a token of a step that is wrong although what it builds on is right."""
  inherits: float = 0.0
  """Intensity of a token of a step that follows correctly from an earlier error."""
  repair: float = 0.0
  """Intensity of a token of a step that corrects an earlier error."""

  def check(self) -> dict[str, str]:
    return between(0, 1000, self, *ROLES)

  def array(self) -> np.ndarray:
    return np.array([getattr(self, role) for role in ROLES], np.float32)


_CREDIT = RoleTable(necessary=1.0, repair=1.0)
_BLAME = RoleTable(error=1.0)
_BLAME_TRUNCATED = RoleTable(error=1.0, redundant=1.0, irrelevant=1.0)


@dataclasses.dataclass(frozen=True)
class Uniform(Scheme):
  """A_t = A_i: GRPO without division by the standard deviation,
  which is RLOO (Ahmadian et al. 2024).

  Conserves sum_t A_t = T_i A_i. Unbiased.
  """

  scheme: str = "uniform"

  conserves: ClassVar[bool] = True
  idle_when_equal: ClassVar[bool] = True

  def __call__(self, given: Given) -> jax.Array:
    return jnp.broadcast_to(given.advantages_B[:, None], given.sampled_BxT.shape)


@dataclasses.dataclass(frozen=True)
class Weighted(Scheme):
  """A_t = A_i * (1 + lambda * (w_t - 1)), with w_t the token's intensity scaled so that the w_t sum
  to T_i.

  Conserves sum_t A_t = T_i A_i. No token's sign flips. Biased: a step is reinforced by what the
  reviewer thinks of it, and by whether the answer was ahead already, so a step that does nothing
  but pleases the reviewer is reinforced. Mass-preserving reweighting as in OAR (arXiv 2601.07408),
  the weights read from a review, with a table for losses.
  """

  scheme: str = "weighted"
  lam: float = 0.5
  """Share of the mass that follows the review; the rest stays uniform. At 1, redundant steps are
  never blamed and the policy drifts to endless repetition."""
  cap: float = 12.0
  """Largest multiplier of a token. Where a review would exceed it, all of its contrast is shrunk
  until it does not, so the sum stays."""
  credit: RoleTable = _CREDIT
  """Which roles earn in a win."""
  blame: RoleTable = _BLAME
  """Which roles pay in a loss. A table of its own: one table for both costs nearly all of the gain
  (docs/method.md)."""
  blame_truncated: RoleTable = _BLAME_TRUNCATED
  """Which roles pay when the episode ran out of tokens."""

  reads: ClassVar[tuple[str, ...]] = ("roles",)
  conserves: ClassVar[bool] = True
  idle_when_equal: ClassVar[bool] = True

  def check(self) -> dict[str, str]:
    bad = super().check() | between(0, 1, self, "lam")
    return bad | ({"cap": "must be at least 1, which is uniform"} if self.cap < 1 else {})

  def __call__(self, given: Given) -> jax.Array:
    credit_BxT = _intensity(self.credit, given)
    blame_BxT = _blame(self.blame, self.blame_truncated, given)
    won_Bx1 = (given.advantages_B >= 0)[:, None]
    return spread(self.lam, self.cap, given, jnp.where(won_Bx1, credit_BxT, blame_BxT))


@dataclasses.dataclass(frozen=True)
class Signed(Scheme):
  """A_t = A_i + beta * d_t, with d_t credit minus blame of the token's role, less its mean over the
  episode.

  Conserves sum_t A_t = T_i A_i, because the d_t sum to 0. Biased by beta * E[d | step]. It also
  moves episodes of groups in which all fail or all succeed; there the reviewer is the only teacher.
  A step that ends an answer is never blamed.
  Bounded role bonuses as in TRIAGE (arXiv 2606.32017), centred so that their sum is none.
  """

  scheme: str = "signed"
  beta: float = 0.3
  """Size of the addend."""
  cap: float = 12.0
  """Largest absolute addend of a token. Where a review would exceed it, all of its contrast is
  shrunk until it does not, so the sum stays."""
  credit: RoleTable = _CREDIT
  """Which roles earn."""
  blame: RoleTable = _BLAME
  """Which roles pay."""
  blame_truncated: RoleTable = _BLAME_TRUNCATED
  """Which roles pay when the episode ran out of tokens."""

  reads: ClassVar[tuple[str, ...]] = ("roles",)
  conserves: ClassVar[bool] = True

  def check(self) -> dict[str, str]:
    return super().check() | at_least(0, self, "beta", "cap")

  def __call__(self, given: Given) -> jax.Array:
    sampled_BxT = given.sampled_BxT
    blame_BxT = _sparing_ends(_blame(self.blame, self.blame_truncated, given), given)
    score_BxT = _intensity(self.credit, given) - blame_BxT
    says_nothing_B = all_equal(score_BxT, sampled_BxT)
    d_BxT = _centred(score_BxT, sampled_BxT & ~says_nothing_B[:, None])
    # Again: scores can lie closer together than their mean is exact.
    d_BxT = _centred(d_BxT, sampled_BxT)
    most_B = jnp.abs(d_BxT).max(1)
    beta_B = jnp.minimum(self.beta, self.cap / jnp.where(most_B > 0, most_B, 1.0))
    return given.advantages_B[:, None] + beta_B[:, None] * d_BxT


@dataclasses.dataclass(frozen=True)
class ReturnToGo(Scheme):
  """A_t = sum of the redistributed rewards r_u of tokens u >= t, less the group's mean of that at
  the same place.

  r_t = R_i c_t / sum_u c_u with c the credit table's intensities: a failure has nothing to
  redistribute. Conserves sum_t r_t = R_i. Biased: what the past was paid depends on the rest of the
  answer, so a step is reinforced for making the steps before it look less decisive. RUDDER's
  redistribution (Arjona-Medina et al. 2019) with a reviewer in the place of the return predictor.
  """

  scheme: str = "return_to_go"
  credit: RoleTable = _CREDIT
  """Which roles earn."""

  reads: ClassVar[tuple[str, ...]] = ("roles",)
  ignores: ClassVar[tuple[str, ...]] = ("divide_by_std", "conserve")

  def __call__(self, given: Given) -> jax.Array:
    c_BxT = _intensity(self.credit, given)
    most_B = c_BxT.max(1)
    says_nothing_B = most_B < 1e-6
    shares_BxT = c_BxT / jnp.maximum(most_B, 1e-6)[:, None]
    c_BxT = jnp.where(says_nothing_B[:, None], given.sampled_BxT, shares_BxT)
    spent_BxT = (jnp.cumsum(c_BxT, 1) - c_BxT) / jnp.maximum(c_BxT.sum(1), 1e-6)[:, None]
    to_go_BxT = given.rewards_B[:, None] * (1.0 - spent_BxT)
    centred_BxT = to_go_BxT - given.expected(to_go_BxT, jnp.ones_like(given.review.ok_B))
    plain_B = says_nothing_B & (given.rewards_B > 0)
    return jnp.where(plain_B[:, None], given.advantages_B[:, None], centred_BxT)


@dataclasses.dataclass(frozen=True)
class Potential(Scheme):
  """A_t = G_k - Phi_k, with G_k = (1 - discount) Phi_k+1 + discount G_k+1, for a token of step k.

  Phi_k is the value of the prefix before step k, and R_i after the last; the changes
  Phi_k+1 - Phi_k telescope to R_i - Phi_1. At discount 1 a step gets R_i - Phi_k: a baseline that
  knows only the prefix, so unbiased whoever gives the values, and a step that changes nothing gains
  nothing by pleasing the reviewer. At discount 0 a step gets its own change, unbiased only where
  the values are right. Potential-based shaping (Ng et al. 1999), generalized advantage estimation
  (Schulman et al. 2016, eq. 16) over steps; with Monte-Carlo values and discount 0, VinePPO
  (Kazemnejad et al. 2024).

  All of this needs values that do not see the rest of the answer. A missing value is the one before
  it, and before the first the group's baseline, so that a value that fails for what its prefix says
  does no harm either.
  """

  scheme: str = "potential"
  discount: float = 1.0
  """How much a step answers for later changes of the prefix value. At 1 it answers for the whole
  rest, which is unbiased whoever gives the values; at 0 for its own change alone, which is faster
  and trusts them; between, generalized advantage estimation with this lambda."""
  log_epsilon: float = 0.0
  """0 takes values as they are; above 0 they become log(1 + value / log_epsilon), scaled to end at
  1, so that doubling a chance counts about as much wherever it begins, as long as it is well above
  log_epsilon."""

  reads: ClassVar[tuple[str, ...]] = ("values",)
  least_steps: ClassVar[int] = 1
  ignores: ClassVar[tuple[str, ...]] = ("divide_by_std", "conserve")

  def check(self) -> dict[str, str]:
    return super().check() | between(0, 1, self, "discount", "log_epsilon")

  def __call__(self, given: Given) -> jax.Array:
    rewards_B, (ids_BxT, _, _, values_BxK, _) = given.rewards_B, given.review
    k = values_BxK.shape[1]
    known_BxK = (values_BxK >= 0) & (values_BxK <= 1)
    last_known_BxK = jax.lax.cummax(jnp.where(known_BxK, jnp.arange(k), -1), 1)
    baseline_B = jnp.clip(rewards_B - given.advantages_B, 0.0, 1.0)
    filled_BxK = jnp.take_along_axis(values_BxK, jnp.maximum(last_known_BxK, 0), 1)
    if self.log_epsilon:
      filled_BxK = jnp.log1p(filled_BxK / self.log_epsilon) / np.log1p(1 / self.log_epsilon)
    # The baseline stays as it is also under the logarithm: what fills a gap must not depend on what
    # is known later.
    phi_BxK = jnp.where(last_known_BxK >= 0, filled_BxK, baseline_B[:, None])

    steps_B = jnp.where(given.sampled_BxT, ids_BxT, 0).max(1) + 1
    is_last_BxK = jnp.arange(k) >= steps_B[:, None] - 1
    next_BxK = jnp.roll(phi_BxK, -1, 1)

    def back(later_B: Any, x: Any) -> tuple[Any, Any]:
      next_B, is_last_B = x
      ahead_B = (1 - self.discount) * next_B + self.discount * later_B
      g_B = jnp.where(is_last_B, rewards_B, ahead_B)
      return g_B, g_B

    _, g_KxB = jax.lax.scan(back, rewards_B, (next_BxK.T, is_last_BxK.T), reverse=True)
    return jnp.take_along_axis(g_KxB.T - phi_BxK, ids_BxT, 1)


@dataclasses.dataclass(frozen=True)
class Capo(Scheme):
  """A_t = A_i - penalty * (blame_t - the mean blame of a token in the group's other episodes).

  Conserves nothing: marking more steps as wrong lowers the episode's sum. Biased. The reward of
  CAPO (arXiv 2508.02298), outcome minus a penalty on wrong steps, centred by the group; a
  comparison arm. As in `signed`, a step that ends an answer is never blamed.
  """

  scheme: str = "capo"
  penalty: float = 0.5
  """What a token of a wrong step loses, in rewards; CAPO weights outcome to process 2 to 1."""
  blame: RoleTable = _BLAME
  """Which roles pay."""
  blame_truncated: RoleTable = _BLAME_TRUNCATED
  """Which roles pay when the episode ran out of tokens."""

  reads: ClassVar[tuple[str, ...]] = ("roles",)
  least_steps: ClassVar[int] = 1
  ignores: ClassVar[tuple[str, ...]] = ("divide_by_std", "conserve")

  def check(self) -> dict[str, str]:
    return super().check() | at_least(0, self, "penalty")

  def __call__(self, given: Given) -> jax.Array:
    blame_BxT = _sparing_ends(_blame(self.blame, self.blame_truncated, given), given)
    mean_B = blame_BxT.sum(1) / jnp.maximum(given.sampled_BxT.sum(1), 1)
    means_BxT = jnp.broadcast_to(mean_B[:, None], blame_BxT.shape)
    others_BxT = given.expected(means_BxT, given.review.ok_B)
    return given.advantages_B[:, None] - self.penalty * (blame_BxT - others_BxT)


SCHEMES: dict[str, type[Scheme]] = {
  cls.scheme: cls for cls in (Uniform, Calibrated, Weighted, Signed, ReturnToGo, Potential, Capo)
}


def _intensity(table: RoleTable, given: Given) -> jax.Array:
  """Intensity of every token; a row whose review is missing or unusable gets 0 everywhere."""
  review: ReviewArrays = given.review
  c_BxK = jnp.asarray(table.array())[review.roles_BxK] * review.weights_BxK
  c_BxT = jnp.take_along_axis(c_BxK, review.step_ids_BxT, 1)
  return jnp.where(given.sampled_BxT & review.ok_B[:, None], c_BxT, 0.0)


def _blame(blame: RoleTable, blame_truncated: RoleTable, given: Given) -> jax.Array:
  full_BxT, ended_BxT = _intensity(blame_truncated, given), _intensity(blame, given)
  return jnp.where(given.truncated_B[:, None], full_BxT, ended_BxT)


def _sparing_ends(blame_BxT: jax.Array, given: Given) -> jax.Array:
  """Blame, but none of the tokens with which an answer ends, as far back as they are blamed alike:
  to blame the end would say that the answer should have gone on, and where all of a group fail
  nothing would ever restore it."""
  sampled_BxT = given.sampled_BxT
  t = sampled_BxT.shape[1]
  last_Bx1 = jnp.where(sampled_BxT, jnp.arange(t), 0).max(1, keepdims=True)
  alike_BxT = (blame_BxT == jnp.take_along_axis(blame_BxT, last_Bx1, 1)) | ~sampled_BxT
  end_BxT = jnp.cumprod(alike_BxT[:, ::-1], 1)[:, ::-1].astype(bool)
  return jnp.where(end_BxT & ~given.truncated_B[:, None], 0.0, blame_BxT)


def _centred(x_BxT: jax.Array, sampled_BxT: jax.Array) -> jax.Array:
  mean_B = x_BxT.sum(1, where=sampled_BxT) / jnp.maximum(sampled_BxT.sum(1), 1)
  return jnp.where(sampled_BxT, x_BxT - mean_B[:, None], 0.0)
