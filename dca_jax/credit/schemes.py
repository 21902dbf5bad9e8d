"""How an outcome is spread over the tokens of a completion.

Arrays: B = P * G completions in P groups of G, T tokens, K steps. A scheme moves an outcome between the steps of a
completion; its docstring says which sum it keeps (`capo`, a comparison arm, keeps none), whether its expected update is
the policy gradient, and where it comes from. Without a usable review every scheme returns `uniform` bit for bit;
`weighted` and `signed` also where a review calls every step alike.

Intensities are per token, so cutting one step into two of the same kind changes nothing.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dca_jax.checks import at_least, between, one_of
from dca_jax.roles import ROLES


@dataclasses.dataclass(frozen=True)
class RoleTable:
  """A non-negative intensity per token for each role."""

  necessary: float = 0.0
  redundant: float = 0.0
  irrelevant: float = 0.0
  error: float = 0.0
  inherits: float = 0.0
  repair: float = 0.0

  def check(self) -> dict[str, str]:
    return between(0, 1000, self, *ROLES)

  def array(self) -> np.ndarray:
    return np.array([getattr(self, role) for role in ROLES], np.float32)


@dataclasses.dataclass(frozen=True)
class CreditConfig:
  """The `credit` section."""

  scheme: str = "uniform"
  """`uniform`, `weighted`, `signed`, `return_to_go`, `potential`, or, for comparison, `capo`."""
  baseline: str = "leave_one_out"
  """What is subtracted from a reward: the mean of the group's other rewards (Kool et al. 2019, Ahmadian et al. 2024),
  or the whole group's `mean` (Shao et al. 2024)."""
  divide_by_std: bool = False
  """Divide by the group's standard deviation, as GRPO was published; it weights easy and hard
  problems up. By 1e-3 at least: rewards that hardly differ do not count as right and wrong do."""
  conserve: str = "tokens"
  """A completion's mass is its T_i tokens times its advantage (`tokens`), or the same number of tokens for every
  completion (`completion`): then, as far as `lam` goes, tokens without credit cannot pump up the others."""
  lam: float = 0.5
  """`weighted`: share of the mass that follows the review; the rest stays uniform. At 1, redundant steps are never
  blamed and the policy drifts to endless repetition."""
  beta: float = 0.3
  """`signed`: size of the addend."""
  cap: float = 12.0
  """Largest multiplier (`weighted`) or absolute addend (`signed`) of a token. Where a review would exceed it, all of
  its contrast is shrunk until it does not, so the sum stays."""
  discount: float = 1.0
  """`potential`: how much a step answers for later changes of the prefix value. At 1 it answers for the whole rest,
  which is unbiased whoever gives the values; at 0 for its own change alone, which is faster and trusts them; between,
  generalized advantage estimation with this lambda."""
  log_epsilon: float = 0.0
  """`potential`: 0 takes values as they are; above 0 they become log(1 + value / log_epsilon), scaled to end at 1, so
  that doubling a chance counts about as much wherever it begins, as long as it is well above log_epsilon."""
  penalty: float = 0.5
  """`capo`: what a token of a wrong step loses, in rewards; CAPO weights outcome to process 2 to 1."""
  credit: RoleTable = RoleTable(necessary=1.0, repair=1.0)
  """Which roles earn in a win."""
  blame: RoleTable = RoleTable(error=1.0)
  """Which roles pay in a loss. A table of its own: one table for both costs nearly all of the gain (docs/method.md)."""
  blame_truncated: RoleTable = RoleTable(error=1.0, redundant=1.0, irrelevant=1.0)
  """Which roles pay when the completion ran out of tokens."""

  def check(self) -> dict[str, str]:
    bad = one_of(self, "scheme", *SCHEMES) | one_of(self, "baseline", "leave_one_out", "mean")
    bad |= between(0, 1, self, "lam", "discount", "log_epsilon") | at_least(0, self, "beta", "penalty")
    bad |= one_of(self, "conserve", "tokens", "completion")
    if self.cap < (1 if self.scheme == "weighted" else 0):
      bad["cap"] = "must be at least 1 for 'weighted' (1 is uniform) and at least 0 for 'signed'"
    return bad

  def unused(self) -> dict[str, str]:
    shape, tables = ("divide_by_std", "conserve"), ("credit", "blame", "blame_truncated")
    keys = (*shape, *tables, "lam", "beta", "cap", "discount", "log_epsilon", "penalty")
    reads = {
      "uniform": shape,
      "weighted": (*shape, *tables, "lam", "cap"),
      "signed": (*shape, *tables, "beta", "cap"),
      "return_to_go": ("credit",),
      "potential": ("discount", "log_epsilon"),
      "capo": ("penalty", "blame", "blame_truncated"),
    }.get(self.scheme, keys)
    return {key: f"credit.scheme is '{self.scheme}'" for key in keys if key not in reads}


Array = jax.Array | np.ndarray


class Review(typing.NamedTuple):
  """Reviews as arrays of fixed shape. Row i says nothing where `ok_B[i]` is false."""

  step_ids_BxT: Array
  """Which step each token belongs to; from 0, rising by at most 1 a token."""
  roles_BxK: Array
  """Index into `roles.ROLES`."""
  weights_BxK: Array
  """Multiplies the role's intensity. Anything that is not a number between 0 and 1000 voids the row, for the schemes
  that read weights."""
  values_BxK: Array
  """Chance of success before step k is written; read by `potential`. What is not a number in [0, 1] is missing."""
  ok_B: Array


class Given(typing.NamedTuple):
  """What a scheme reads. Weights are sane here; a row whose review cannot be used has ok_B false and weights 0."""

  rewards_B: jax.Array
  advantages_B: jax.Array
  """The completion's own, per token."""
  mask_BxT: jax.Array
  truncated_B: jax.Array
  review: Review
  expected: Callable[[jax.Array, Array], jax.Array]
  """`expected(x_BxT, counts_B)`: for each token the mean of x over the other completions of its group, at the same
  share of their lengths; over those where `counts_B`, and 0 where there is none."""


def group_advantages(config: CreditConfig, rewards_PxG: jax.Array) -> jax.Array:
  """Reward minus baseline, [P, G]; exactly 0 in a group whose rewards are all equal."""
  total, group = rewards_PxG.sum(1, keepdims=True), rewards_PxG.shape[1]
  others = config.baseline == "leave_one_out"
  advantages = rewards_PxG - ((total - rewards_PxG) / (group - 1) if others else total / group)
  equal = (rewards_PxG == rewards_PxG[:, :1]).all(1, keepdims=True)
  if config.divide_by_std:
    advantages /= jnp.maximum(rewards_PxG.std(1, keepdims=True), 1e-3)
  return jnp.where(equal, 0.0, advantages)


def token_advantages(
  config: CreditConfig, rewards_PxG: jax.Array, lengths_B: jax.Array, truncated_B: jax.Array, review: Review
) -> jax.Array:
  """The advantage of every token, [B, T] in float32; 0 beyond a completion's length.

  With `uniform`, `weighted` and `signed` the sum over a completion is T_i * A_i, or T * A_i with
  `conserve="completion"`, to within float32 rounding, whatever the review says.
  """
  t = review.step_ids_BxT.shape[1]
  mask_BxT = jnp.arange(t) < lengths_B[:, None]
  advantages_B = group_advantages(config, rewards_PxG).reshape(-1)
  if config.conserve == "completion":
    advantages_B = advantages_B * (t / jnp.maximum(lengths_B, 1))
  review = _sanitised(config, mask_BxT, review)
  expected = functools.partial(_others_mean, config, rewards_PxG.shape[1], lengths_B)
  given = Given(rewards_PxG.reshape(-1), advantages_B, mask_BxT, truncated_B, review, expected)
  said_BxT = jnp.where(review.ok_B[:, None], SCHEMES[config.scheme](config, given), advantages_B[:, None])
  return jnp.where(mask_BxT, said_BxT, 0.0)


def uniform(config: CreditConfig, given: Given) -> jax.Array:
  """A_t = A_i: GRPO without division by the standard deviation, which is RLOO (Ahmadian et al. 2024).

  Conserves sum_t A_t = T_i A_i. Unbiased.
  """
  return jnp.broadcast_to(given.advantages_B[:, None], given.mask_BxT.shape)


def weighted(config: CreditConfig, given: Given) -> jax.Array:
  """A_t = A_i * (1 + lambda * (w_t - 1)), with w_t the token's intensity scaled so that the w_t sum to T_i.

  Conserves sum_t A_t = T_i A_i. No token's sign flips. Biased: a step is reinforced by what the reviewer thinks of it,
  and by whether the answer was ahead already, so a step that does nothing but pleases the reviewer is reinforced.
  Mass-preserving reweighting as in OAR (arXiv 2601.07408), the weights read from a review, with a table for losses.
  """
  advantages_B, mask_BxT = given.advantages_B, given.mask_BxT
  intensity_BxT = jnp.where(
    (advantages_B >= 0)[:, None], _intensity(config.credit, mask_BxT, given.review), _blame(config, given)
  )
  peak_B = intensity_BxT.max(1)
  says_nothing_B = _all_equal(intensity_BxT, mask_BxT) | (peak_B < 1e-6)
  intensity_BxT /= jnp.where(says_nothing_B, 1.0, peak_B)[:, None]
  mean_B = jnp.where(says_nothing_B, 1.0, intensity_BxT.sum(1) / jnp.maximum(mask_BxT.sum(1), 1))
  excess_BxT = jnp.where(says_nothing_B[:, None], 0.0, intensity_BxT / mean_B[:, None] - 1.0)
  most_B = jnp.where(mask_BxT, excess_BxT, 0.0).max(1)
  contrast_B = jnp.minimum(config.lam, (config.cap - 1) / jnp.where(most_B > 0, most_B, 1.0))
  return advantages_B[:, None] * (1.0 + contrast_B[:, None] * excess_BxT)


def signed(config: CreditConfig, given: Given) -> jax.Array:
  """A_t = A_i + beta * d_t, with d_t credit minus blame of the token's role, less its mean over the completion.

  Conserves sum_t A_t = T_i A_i, because the d_t sum to 0. Biased by beta * E[d | step]. It also moves completions of
  groups in which all fail or all succeed; there the reviewer is the only teacher. Bounded role bonuses as in TRIAGE
  (arXiv 2606.32017), centred so that their sum is none.
  """
  mask_BxT = given.mask_BxT
  score_BxT = _intensity(config.credit, mask_BxT, given.review) - _blame(config, given)
  says_nothing_B = _all_equal(score_BxT, mask_BxT)
  d_BxT = _centred(score_BxT, mask_BxT & ~says_nothing_B[:, None])
  d_BxT = _centred(d_BxT, mask_BxT)  # Again: scores can lie closer together than their mean is exact.
  most_B = jnp.abs(d_BxT).max(1)
  beta_B = jnp.minimum(config.beta, config.cap / jnp.where(most_B > 0, most_B, 1.0))
  return given.advantages_B[:, None] + beta_B[:, None] * d_BxT


def return_to_go(config: CreditConfig, given: Given) -> jax.Array:
  """A_t = sum of the redistributed rewards r_u of tokens u >= t, less the group's mean of that at the same place.

  r_t = R_i c_t / sum_u c_u with c the credit table's intensities: a failure has nothing to redistribute. Conserves
  sum_t r_t = R_i. Biased: what the past was paid depends on the rest of the answer, so a step is reinforced for making
  the steps before it look less decisive. RUDDER's redistribution (Arjona-Medina et al. 2019) with a reviewer in the
  place of the return predictor.
  """
  c_BxT = _intensity(config.credit, given.mask_BxT, given.review)
  says_nothing_B = c_BxT.max(1) < 1e-6
  c_BxT = jnp.where(says_nothing_B[:, None], given.mask_BxT, c_BxT / jnp.maximum(c_BxT.max(1), 1e-6)[:, None])
  spent_BxT = (jnp.cumsum(c_BxT, 1) - c_BxT) / jnp.maximum(c_BxT.sum(1), 1e-6)[:, None]
  to_go_BxT = given.rewards_B[:, None] * (1.0 - spent_BxT)
  centred_BxT = to_go_BxT - given.expected(to_go_BxT, jnp.ones_like(given.review.ok_B))
  return jnp.where((says_nothing_B & (given.rewards_B > 0))[:, None], given.advantages_B[:, None], centred_BxT)


def potential(config: CreditConfig, given: Given) -> jax.Array:
  """A_t = G_k - Phi_k, with G_k = (1 - discount) Phi_k+1 + discount G_k+1, for a token of step k.

  Phi_k is the value of the prefix before step k, and R_i after the last; the changes Phi_k+1 - Phi_k telescope to
  R_i - Phi_1. At discount 1 a step gets R_i - Phi_k: a baseline that knows only the prefix, so unbiased whoever gives
  the values, and a step that changes nothing gains nothing by pleasing the reviewer. At discount 0 a step gets its own
  change, unbiased only where the values are right. Potential-based shaping (Ng et al. 1999), generalized advantage
  estimation (Schulman et al. 2016, eq. 16) over steps; with Monte-Carlo values and discount 0, VinePPO (Kazemnejad et
  al. 2024).

  All of this needs values that do not see the rest of the answer. A missing value is the one before it, and before the
  first the group's baseline, so that a value that fails for what its prefix says does no harm either.
  """
  rewards_B, (ids_BxT, _, _, values_BxK, _) = given.rewards_B, given.review
  k = values_BxK.shape[1]
  known_BxK = (values_BxK >= 0) & (values_BxK <= 1)
  last_known_BxK = jax.lax.cummax(jnp.where(known_BxK, jnp.arange(k), -1), 1)
  baseline_B = jnp.clip(rewards_B - given.advantages_B, 0.0, 1.0)
  filled_BxK = jnp.take_along_axis(values_BxK, jnp.maximum(last_known_BxK, 0), 1)
  if config.log_epsilon:
    filled_BxK = jnp.log1p(filled_BxK / config.log_epsilon) / np.log1p(1 / config.log_epsilon)
  # The baseline stays as it is also under the logarithm: what fills a gap must not depend on what is known later.
  phi_BxK = jnp.where(last_known_BxK >= 0, filled_BxK, baseline_B[:, None])

  steps_B = jnp.where(given.mask_BxT, ids_BxT, 0).max(1) + 1
  is_last_BxK = jnp.arange(k) >= steps_B[:, None] - 1
  next_BxK = jnp.roll(phi_BxK, -1, 1)

  def back(later_B, x):
    next_B, is_last_B = x
    g_B = jnp.where(is_last_B, rewards_B, (1 - config.discount) * next_B + config.discount * later_B)
    return g_B, g_B

  _, g_KxB = jax.lax.scan(back, rewards_B, (next_BxK.T, is_last_BxK.T), reverse=True)
  return jnp.take_along_axis(g_KxB.T - phi_BxK, ids_BxT, 1)


def capo(config: CreditConfig, given: Given) -> jax.Array:
  """A_t = A_i - penalty * (blame_t - the mean blame of a token in the group's other completions).

  Conserves nothing: marking more steps as wrong lowers the completion's sum. Biased. The reward of CAPO (arXiv
  2508.02298), outcome minus a penalty on wrong steps, centred by the group; a comparison arm.
  """
  blame_BxT = _blame(config, given)
  mean_B = blame_BxT.sum(1) / jnp.maximum(given.mask_BxT.sum(1), 1)
  others_BxT = given.expected(jnp.broadcast_to(mean_B[:, None], blame_BxT.shape), given.review.ok_B)
  return given.advantages_B[:, None] - config.penalty * (blame_BxT - others_BxT)


SCHEMES = {scheme.__name__: scheme for scheme in (uniform, weighted, signed, return_to_go, potential, capo)}


def _sanitised(config: CreditConfig, mask_BxT, review: Review) -> Review:
  """The review without weights that are no numbers, and `ok_B` false where what the scheme reads cannot be used."""
  sane_BxK = (review.weights_BxK >= 0) & (review.weights_BxK <= 1000)  # false for NaN too
  if config.scheme == "potential":
    readable_BxK = (review.values_BxK >= 0) & (review.values_BxK <= 1)
    usable_B = (mask_BxT & jnp.take_along_axis(readable_BxK, review.step_ids_BxT, 1)).any(1)
  else:
    usable_B = (~mask_BxT | jnp.take_along_axis(sane_BxK, review.step_ids_BxT, 1)).all(1)
  return review._replace(weights_BxK=jnp.where(sane_BxK, review.weights_BxK, 0.0), ok_B=review.ok_B & usable_B)


def _intensity(table: RoleTable, mask_BxT, review: Review) -> jax.Array:
  """Intensity of every token; a row whose review is missing or unusable gets 0 everywhere."""
  c_BxK = jnp.asarray(table.array())[review.roles_BxK] * review.weights_BxK
  c_BxT = jnp.take_along_axis(c_BxK, review.step_ids_BxT, 1)
  return jnp.where(mask_BxT & review.ok_B[:, None], c_BxT, 0.0)


def _blame(config: CreditConfig, given: Given) -> jax.Array:
  full, ended = (_intensity(t, given.mask_BxT, given.review) for t in (config.blame_truncated, config.blame))
  return jnp.where(given.truncated_B[:, None], full, ended)


def _others_mean(config: CreditConfig, group: int, lengths_B, x_BxT, counts_B) -> jax.Array:
  """See `Given.expected`; with `baseline="mean"` the completion itself counts too."""
  b, t = x_BxT.shape
  # Whole numbers: a share in float32 would miss its token now and then. Unsigned, they hold 65,535 x 65,535.
  place_T, length_Bx1 = jnp.arange(t, dtype=jnp.uint32), jnp.asarray(lengths_B, jnp.uint32)[:, None]
  counts_B = counts_B.astype(jnp.float32)
  at_share_BxT = (place_T * length_Bx1 // t).astype(jnp.int32)
  own_BxT = counts_B[:, None] * jnp.take_along_axis(x_BxT, at_share_BxT, 1)
  sum_BxT = jnp.repeat(own_BxT.reshape(b // group, group, t).sum(1), group, 0)
  n_B = jnp.repeat(counts_B.reshape(b // group, group).sum(1), group)
  if config.baseline == "leave_one_out":
    sum_BxT, n_B = sum_BxT - own_BxT, n_B - counts_B
  mean_BxT = sum_BxT / jnp.maximum(n_B, 1)[:, None]
  back_BxT = (place_T * t + length_Bx1 - 1) // length_Bx1
  return jnp.take_along_axis(mean_BxT, jnp.minimum(back_BxT, t - 1).astype(jnp.int32), 1)


def _centred(x_BxT, mask_BxT) -> jax.Array:
  mean_B = x_BxT.sum(1, where=mask_BxT) / jnp.maximum(mask_BxT.sum(1), 1)
  return jnp.where(mask_BxT, x_BxT - mean_B[:, None], 0.0)


def _all_equal(x_BxT, mask_BxT) -> jax.Array:
  return jnp.where(mask_BxT, x_BxT, -jnp.inf).max(1) == jnp.where(mask_BxT, x_BxT, jnp.inf).min(1)
