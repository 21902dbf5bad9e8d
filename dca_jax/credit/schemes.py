"""How an outcome is spread over the tokens of a completion.

Arrays: B = P * G completions in P groups of G, T tokens, K steps. A scheme moves an outcome between the steps of a
completion and never changes its sum. Without a review, or with one that calls every step alike, every scheme returns
`uniform` bit for bit.

Intensities are per token, so cutting one step into two of the same kind changes nothing.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np

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
    return {role: "must be between 0 and 1000" for role in ROLES if not 0 <= getattr(self, role) <= 1000}

  def array(self) -> np.ndarray:
    return np.array([getattr(self, role) for role in ROLES], np.float32)


@dataclasses.dataclass(frozen=True)
class CreditConfig:
  """The `credit` section."""

  scheme: str = "uniform"
  """`uniform`, `weighted` or `signed`."""
  baseline: str = "leave_one_out"
  """What is subtracted from a reward: the mean of the group's other rewards (Kool et al. 2019, Ahmadian et al. 2024),
  or the whole group's `mean` (Shao et al. 2024)."""
  divide_by_std: bool = False
  """Divide by the group's standard deviation, as GRPO was published; it weights easy and hard problems up."""
  conserve: str = "tokens"
  """A completion's mass is its T_i tokens times its advantage (`tokens`), or the same number of tokens for every
  completion (`completion`): then writing tokens without credit cannot pump up the others."""
  lam: float = 0.5
  """`weighted`: share of the mass that follows the review; the rest stays uniform. At 1, redundant steps are never
  blamed and the policy drifts to endless repetition."""
  beta: float = 0.3
  """`signed`: size of the addend."""
  cap: float = 12.0
  """Largest multiplier (`weighted`) or absolute addend (`signed`) of a token. Where a review would exceed it, all of
  its contrast is shrunk until it does not, so the sum stays."""
  credit: RoleTable = RoleTable(necessary=1.0, repair=1.0)
  """Which roles earn in a win."""
  blame: RoleTable = RoleTable(error=1.0)
  """Which roles pay in a loss. A table of its own: one table for both costs a factor of six in signal to noise."""
  blame_truncated: RoleTable = RoleTable(error=1.0, redundant=1.0, irrelevant=1.0)
  """Which roles pay when the completion ran out of tokens."""

  def check(self) -> dict[str, str]:
    bad = {}
    if self.scheme not in SCHEMES:
      bad["scheme"] = f"must be one of {', '.join(SCHEMES)}"
    if self.baseline not in ("leave_one_out", "mean"):
      bad["baseline"] = "must be 'leave_one_out' or 'mean'"
    if self.conserve not in ("tokens", "completion"):
      bad["conserve"] = "must be 'tokens' or 'completion'"
    if not 0 <= self.lam <= 1:
      bad["lam"] = "must be between 0 and 1"
    if self.beta < 0:
      bad["beta"] = "must not be negative"
    if self.cap < (1 if self.scheme == "weighted" else 0):
      bad["cap"] = "must be at least 1 for 'weighted' (1 is uniform) and at least 0 for 'signed'"
    return bad

  def unused(self) -> dict[str, str]:
    reads = {"uniform": (), "weighted": ("lam", "cap"), "signed": ("beta", "cap")}[self.scheme]
    keys = ["lam", "beta", "cap"] + (["credit", "blame", "blame_truncated"] if not reads else [])
    return {key: f"credit.scheme is '{self.scheme}'" for key in keys if key not in reads}


Array = jax.Array | np.ndarray


class Review(typing.NamedTuple):
  """Reviews as arrays of fixed shape. Row i says nothing where `ok_B[i]` is false."""

  step_ids_BxT: Array
  """Which step each token belongs to."""
  roles_BxK: Array
  """Index into `roles.ROLES`."""
  weights_BxK: Array
  """Multiplies the role's intensity. Anything that is not a number between 0 and 1000 voids the row."""
  ok_B: Array


def group_advantages(config: CreditConfig, rewards_PxG: jax.Array) -> jax.Array:
  """Reward minus baseline, [P, G]; exactly 0 in a group whose rewards are all equal."""
  total = rewards_PxG.sum(1, keepdims=True)
  group = rewards_PxG.shape[1]
  if config.baseline == "leave_one_out":
    advantages = rewards_PxG - (total - rewards_PxG) / (group - 1)
  else:
    advantages = rewards_PxG - total / group
  equal = (rewards_PxG == rewards_PxG[:, :1]).all(1, keepdims=True)
  if config.divide_by_std:
    advantages /= jnp.where(equal, 1.0, rewards_PxG.std(1, keepdims=True))
  return jnp.where(equal, 0.0, advantages)


def token_advantages(
  config: CreditConfig,
  rewards_PxG: jax.Array,
  lengths_B: jax.Array,
  truncated_B: jax.Array,
  review: Review,
) -> jax.Array:
  """The advantage of every token, [B, T] in float32; 0 beyond a completion's length.

  For each completion the sum over its tokens is T_i * A_i, or T * A_i with `conserve="completion"`, to within float32
  rounding (relative error below 1e-6), whatever the review says.
  """
  t = review.step_ids_BxT.shape[1]
  mask_BxT = jnp.arange(t) < lengths_B[:, None]
  advantages_B = group_advantages(config, rewards_PxG).reshape(-1)
  if config.conserve == "completion":
    advantages_B = advantages_B * (t / jnp.maximum(lengths_B, 1))
  return jnp.where(mask_BxT, SCHEMES[config.scheme](config, advantages_B, mask_BxT, truncated_B, review), 0.0)


def uniform(config, advantages_B, mask_BxT, truncated_B, review) -> jax.Array:
  """A_t = A_i: GRPO without division by the standard deviation, which is RLOO. Unbiased."""
  del config, truncated_B, review
  return jnp.broadcast_to(advantages_B[:, None], mask_BxT.shape)


def weighted(config, advantages_B, mask_BxT, truncated_B, review) -> jax.Array:
  """A_t = A_i * (1 + lambda * (w_t - 1)), with w_t the token's intensity scaled so that the w_t sum to T_i.

  Conserves sum_t A_t = T_i A_i. No token's sign flips. Biased: a step is reinforced by what the reviewer thinks of it,
  which is the expected update of another, review-dependent objective unless the weights depend on the prefix alone.
  """
  intensity_BxT = jnp.where(
    (advantages_B >= 0)[:, None],
    _intensity(config.credit.array(), mask_BxT, review),
    _blame(config, mask_BxT, truncated_B, review),
  )
  peak_B = intensity_BxT.max(1)
  says_nothing_B = _all_equal(intensity_BxT, mask_BxT) | (peak_B < 1e-6)
  intensity_BxT /= jnp.where(says_nothing_B, 1.0, peak_B)[:, None]
  mean_B = jnp.where(says_nothing_B, 1.0, intensity_BxT.sum(1) / jnp.maximum(mask_BxT.sum(1), 1))
  excess_BxT = jnp.where(says_nothing_B[:, None], 0.0, intensity_BxT / mean_B[:, None] - 1.0)
  most_B = jnp.where(mask_BxT, excess_BxT, 0.0).max(1)
  contrast_B = jnp.minimum(config.lam, (config.cap - 1) / jnp.where(most_B > 0, most_B, 1.0))
  return advantages_B[:, None] * (1.0 + contrast_B[:, None] * excess_BxT)


def signed(config, advantages_B, mask_BxT, truncated_B, review) -> jax.Array:
  """A_t = A_i + beta * d_t, with d_t credit minus blame of the token's role, less its mean over the completion.

  Conserves sum_t A_t = T_i A_i, because the d_t sum to 0. Biased by beta * E[d | step]. It also moves completions of
  groups in which all fail or all succeed; there the reviewer is the only teacher.
  """
  score_BxT = _intensity(config.credit.array(), mask_BxT, review) - _blame(config, mask_BxT, truncated_B, review)
  says_nothing_B = _all_equal(score_BxT, mask_BxT)
  d_BxT = _centred(score_BxT, mask_BxT & ~says_nothing_B[:, None])
  d_BxT = _centred(d_BxT, mask_BxT)  # Again: scores can lie closer together than their mean is exact.
  most_B = jnp.abs(d_BxT).max(1)
  beta_B = jnp.minimum(config.beta, config.cap / jnp.where(most_B > 0, most_B, 1.0))
  return advantages_B[:, None] + beta_B[:, None] * d_BxT


SCHEMES = {"uniform": uniform, "weighted": weighted, "signed": signed}


def _intensity(table_R, mask_BxT, review: Review) -> jax.Array:
  """Intensity of every token; a row whose review is missing or unusable gets 0 everywhere."""
  sane_BxK = (review.weights_BxK >= 0) & (review.weights_BxK <= 1000)  # false for NaN too
  sane_BxT = jnp.take_along_axis(sane_BxK, review.step_ids_BxT, 1)
  usable_B = review.ok_B & jnp.where(mask_BxT, sane_BxT, True).all(1)
  c_BxK = jnp.asarray(table_R)[review.roles_BxK] * jnp.where(sane_BxK, review.weights_BxK, 0.0)
  c_BxT = jnp.where(mask_BxT, jnp.take_along_axis(c_BxK, review.step_ids_BxT, 1), 0.0)
  return jnp.where(usable_B[:, None], c_BxT, 0.0)


def _blame(config, mask_BxT, truncated_B, review) -> jax.Array:
  return jnp.where(
    truncated_B[:, None],
    _intensity(config.blame_truncated.array(), mask_BxT, review),
    _intensity(config.blame.array(), mask_BxT, review),
  )


def _centred(x_BxT, mask_BxT) -> jax.Array:
  mean_B = x_BxT.sum(1, where=mask_BxT) / jnp.maximum(mask_BxT.sum(1), 1)
  return jnp.where(mask_BxT, x_BxT - mean_B[:, None], 0.0)


def _all_equal(x_BxT, mask_BxT) -> jax.Array:
  return jnp.where(mask_BxT, x_BxT, -jnp.inf).max(1) == jnp.where(mask_BxT, x_BxT, jnp.inf).min(1)
