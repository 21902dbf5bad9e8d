"""Calibrated credit: `weighted`, with the tables measured instead of given.

Steps fall into cells: what was said of a step, what can be seen of it without trusting anybody, and
how its episode ended. Spot checks measure what some steps did (`rollout/spot.py`). A cell's effect
begins as the even share of the outcome that every step has under `uniform`; as far as checks say
otherwise, beyond what their error leaves in doubt, it moves to what they say. So a class of steps
that does nothing ends with nothing, however it is applauded. Checks are drawn before any review,
and this batch's only count from the next one on.

B episodes in groups of G, K steps, C cells.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dca_jax.checks import at_least, between, positive
from dca_jax.credit.scheme import Given, Scheme, spread
from dca_jax.episode import ROLES, Episode, Review

_CHECKING = re.compile(r"\b(check|verif|wait|again|confirm|make sure)", re.IGNORECASE)
SEEN = ("plain", "repeat", "check", "long")
"""What can be seen of a step: it says again what an earlier one said, it has a word for checking,
or it has more than twice the tokens of the episode's median step."""
ENDS = ("win", "loss", "truncated")
_WEIGHTS = (0.75, 1.5)  # Weights below, around and above 1.
_CHANGES = (-0.3, -0.1, -0.02, 0.02, 0.1, 0.3)  # Of a reviewer's value over a step.
SAID = len(ROLES) * (len(_WEIGHTS) + 1) + len(_CHANGES) + 1
_SHAPE = (SAID, len(SEEN), len(ENDS))
CELLS = int(np.prod(_SHAPE))
_PRIOR = 8.0
"""So many checks' worth of the common variance stand in each cell's own."""


class Evidence(NamedTuple):
  """What a run has measured; older batches count less."""

  sums: Any
  """[4, C]: of the checks' weights, of those squared, of the effects beyond the even share, of
  those squared."""
  slope: Any
  """[2]: sums of effect times fitted effect, and of fitted effect squared."""


@dataclasses.dataclass(frozen=True)
class Calibrated(Scheme):
  """A_t = A_i * (1 + lambda * (w_t - 1)), with w_t the fitted effect of the token's step, scaled so
  that the w_t sum to T_i.

  The fitted effect of step k of K is u_k = A_i / K + g, with g the mean of (measured effect -
  A_i / K) over the checks of its cell, shrunk; where u_k has not the sign of A_i it is 0. Without
  evidence all u_k are alike, and this is `uniform`. Conserves sum_t A_t = T_i A_i. No token's sign
  flips. As biased as the steps of a cell are unlike: what the reviewer says of a class of steps
  that the cells can tell apart moves nothing in the end (docs/method.md). Shrinkage by the
  non-negative garrote (Breiman 1995), measurements as in VinePPO (Kazemnejad et al. 2024).
  """

  scheme: str = "calibrated"
  lam: float = 1.0
  """Share of the mass that follows the fitted effects; the rest stays uniform."""
  cap: float = 12.0
  """Largest multiplier of a token; see `weighted`."""
  keep: float = 0.97
  """How much of the evidence is kept from one batch to the next."""
  doubt: float = 1.5
  """Standard errors that a mean must be away from the even share to count at all; one that is
  further away counts in part, and in full in the limit."""

  reads: ClassVar[tuple[str, ...]] = ("roles", "values")
  reads_either: ClassVar[bool] = True
  needs_checks: ClassVar[bool] = True
  conserves: ClassVar[bool] = True
  idle_when_equal: ClassVar[bool] = True

  def check(self) -> dict[str, str]:
    bad = super().check() | between(0, 1, self, "lam") | at_least(0, self, "doubt")
    bad |= positive(self, "keep", most=1)
    return bad | ({"cap": "must be at least 1, which is uniform"} if self.cap < 1 else {})

  def begin(self) -> Evidence:
    return Evidence(np.zeros((4, CELLS), np.float32), np.zeros(2, np.float32))

  def facts(
    self, state: Evidence, episodes: Sequence[Episode], group: int, most: int
  ) -> np.ndarray:
    """Intensities [B, K]."""
    intensity_BxK = np.zeros((len(episodes), most), np.float32)
    gains = fit(state, self.doubt).gains
    for i, (own, cells) in enumerate(_known(episodes, group)):
      intensity_BxK[i, : len(cells)] = np.abs(fitted(gains, own, cells))
    return intensity_BxK

  def __call__(self, given: Given) -> jax.Array:
    intensity_BxT = jnp.zeros(given.sampled_BxT.shape)
    if given.facts is not None:
      intensity_BxT = jnp.take_along_axis(given.facts, given.review.step_ids_BxT, 1)
    kept_BxT = given.sampled_BxT & given.review.ok_B[:, None]
    return spread(self.lam, self.cap, given, jnp.where(kept_BxT, intensity_BxT, 0.0))

  def evidence(self, state: Evidence, episodes: Sequence[Episode], group: int) -> Any:
    gains = fit(state, self.doubt).gains
    checks, slope, weights = [], np.zeros(2), np.zeros((2, *_SHAPE))
    for episode, (own, cells) in zip(episodes, _known(episodes, group), strict=True):
      effects = fitted(gains, own, cells)
      for k, (cell, effect) in enumerate(zip(cells, effects, strict=True)):
        if cell < 0:
          continue
        word, seen, end = np.unravel_index(cell, _SHAPE)
        weights[:, word, seen, end] += 1, effect / (effects.mean() or 1)
        if k in episode.checks:
          found = episode.checks[k].effect
          checks.append([cell, found - own / len(cells)])
          slope += found * effect, effect**2
    return [checks, slope.tolist(), weights.tolist()]

  def learn(self, state: Evidence, evidence: Sequence[Any]) -> tuple[Evidence, dict[str, float]]:
    checks, slopes, weights = zip(*evidence, strict=True)
    sums = (
      np.float64(state.sums) * np.array([self.keep, self.keep**2, self.keep, self.keep])[:, None]
    )
    for cell, effect in (check for own in checks for check in own):
      sums[:, cell] += 1, 1, effect, effect**2
    slope = self.keep * np.float64(state.slope) + np.sum(slopes, 0)
    new = Evidence(np.float32(sums), np.float32(slope))
    return new, _report(new, self.doubt, np.sum(weights, 0))


def _known(episodes: Sequence[Episode], group: int) -> list[tuple[float, list[int]]]:
  """Of each episode its advantage and the cells of its steps, -1 where nothing usable was said of
  one; no cells where there is no usable review or nothing to move."""
  rewards_PxG = np.array([e.outcome.reward for e in episodes]).reshape(-1, group)
  others_PxG = (rewards_PxG.sum(1, keepdims=True) - rewards_PxG) / max(1, group - 1)
  equal_Px1 = (rewards_PxG == rewards_PxG[:, :1]).all(1, keepdims=True)
  advantages_B = np.where(equal_Px1, 0.0, rewards_PxG - others_PxG).reshape(-1)
  return [
    (own, _cells(episode, own) if own else [])
    for episode, own in zip(episodes, advantages_B.tolist(), strict=True)
  ]


def _cells(episode: Episode, advantage: float) -> list[int]:
  end = 0 if advantage > 0 else 2 if episode.outcome.truncated else 1
  pairs = zip(_said(episode), seen_of(episode), strict=False)
  return [-1 if word < 0 else cell_number(word, seen, end) for word, seen in pairs]


def cell_number(word: int, seen: int, end: int) -> int:
  """The number of a cell: of what was said (`word_of`), and of places in `SEEN` and `ENDS`."""
  return int(np.ravel_multi_index((word, seen, end), _SHAPE))


def seen_of(episode: Episode) -> list[int]:
  """What can be seen of each step, as places in `SEEN`."""
  lengths = [step.end - step.start for step in episode.steps]
  usual, before, seen = float(np.median(lengths or [0])), set(), []
  for step, length in zip(episode.steps, lengths, strict=True):
    text = "".join(step.text.split()).casefold()
    kinds = (text in before, bool(_CHECKING.search(step.text)), length > 2 * usual)
    seen.append(next((k for k, holds in enumerate(kinds, 1) if holds), 0))
    before.add(text)
  return seen


def word_of(role: int, weight: float) -> int:
  """The number of what a review says of a step: its role, with a low, usual or high weight."""
  return role * (len(_WEIGHTS) + 1) + int(np.searchsorted(_WEIGHTS, weight))


def _said(episode: Episode) -> list[int]:
  """What the review says of each step, as a number, -1 for nothing; empty if it cannot be used."""
  review: Review = episode.review
  if review.status != "ok" or not all(0 <= weight <= 1000 for weight in review.weights):
    return []
  if review.roles:
    said = zip(review.roles, review.weights, strict=True)
    return [word_of(ROLES.index(role), weight) for role, weight in said]
  values = np.array([*review.values, episode.outcome.reward])
  changes = np.diff(np.where((values >= 0) & (values <= 1), values, np.nan))
  first = len(ROLES) * (len(_WEIGHTS) + 1)
  return [
    -1 if np.isnan(change) else first + int(np.searchsorted(_CHANGES, change)) for change in changes
  ]


def fitted(gains: np.ndarray, advantage: Any, cells: Any) -> np.ndarray:
  """The fitted effects of an episode's steps, or of the episodes of several rows; none has another
  sign than its advantage."""
  numbers = np.asarray(cells, int)
  own = np.where(numbers >= 0, gains[numbers], 0.0)
  effects = advantage / max(1, numbers.shape[-1]) + own
  return np.where(effects * advantage > 0, effects, 0.0)


class Fit(NamedTuple):
  """What the evidence says of each cell, [C]."""

  gains: np.ndarray
  """How much more than the even share its steps did, shrunk."""
  means: np.ndarray
  """The same as measured."""
  errors: np.ndarray
  """Standard errors of that; infinite where nothing was measured."""


def fit(state: Evidence, doubt: float) -> Fit:
  """Each cell's mean, shrunk towards the even share; none lends another one anything, but for an
  estimate of how far single measurements scatter."""
  n, n2, total, squares = np.asarray(state.sums, np.float64)
  known = np.maximum(n, 1e-6)
  means = np.where(n > 0, total / known, 0.0)
  residual = np.maximum(squares - total * means, 0.0)
  # Where little is known yet, as wide as a difference of two fair coins.
  common = (residual.sum() + _PRIOR * 0.5) / (np.maximum(n - 1, 0).sum() + _PRIOR)
  variance = (residual + _PRIOR * common) / (n + _PRIOR)
  # Of a few coins all may fall alike, so the error of a mean of n counts sqrt(1 + 4 / n) times.
  errors2 = np.where(n > 0, variance * (1 + 4 / known) * n2 / known**2, np.inf)
  kept = 1 - doubt**2 * errors2 / np.maximum(means**2, 1e-12)
  gains = np.where(kept > 0, means * np.maximum(kept, 0.0), 0.0)
  return Fit(gains, means, np.sqrt(errors2))


def _report(new: Evidence, doubt: float, used: np.ndarray) -> dict[str, float]:
  """Metrics; `used` holds the number of this batch's steps by what was said, what was seen and the
  end, and the sum of the multipliers that they got."""
  gains, means, errors = fit(new, doubt)
  checks = np.float64(new.sums[0])
  known = checks * np.isfinite(errors)
  metrics = {
    "calibration/checks": float(checks.sum()),
    "calibration/slope": float(new.slope[0] / new.slope[1]) if new.slope[1] else 0.0,
    "calibration/error": float(
      (known * np.where(known > 0, errors, 0)).sum() / max(known.sum(), 1e-9)
    ),
    "calibration/survived": float(
      (checks * np.abs(gains)).sum() / max((checks * np.abs(means)).sum(), 1e-9)
    ),
  }
  kinds = len(ROLES) * (len(_WEIGHTS) + 1)
  counts, totals = used[:, :kinds].reshape(2, len(ROLES), -1, len(SEEN), len(ENDS)).sum(2)
  for role, seen, end in np.argwhere(counts):
    suffix = "" if not seen else f"_{SEEN[seen]}"
    mean = totals[role, seen, end] / counts[role, seen, end]
    metrics[f"weight/{ROLES[role]}{suffix}_{ENDS[end]}"] = float(mean)
  return metrics
