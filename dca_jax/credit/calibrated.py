"""Calibrated credit: `weighted`, with the tables measured instead of given.

Steps fall into cells: what was said of a step, what can be seen of it without trusting anybody, how
sure the policy was of it, and how its episode ended. Spot checks measure what some steps did
(`rollout/spot.py`). A cell's share of the outcome begins as the even one that every step has under
`uniform`; as far as the checks of all cells say that shares differ, it moves to what its own checks
say. So a class of steps that does nothing ends with nothing, however it is applauded. Checks are
drawn before any review, and this batch's only count from the next one on.

B episodes in groups of G, K steps, C cells.
"""

import dataclasses
import re
import statistics
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
_CHANCES = (0.4, 0.8)
"""Of a step under the policy: of one that it was sure of hardly anything depends."""
ENDS = ("win", "loss", "truncated")
_WEIGHTS = (0.75, 1.5)  # Weights below, around and above 1.
_CHANGES = (-0.3, -0.1, -0.02, 0.02, 0.1, 0.3)  # Of a reviewer's value over a step.
SAID = len(ROLES) * (len(_WEIGHTS) + 1) + len(_CHANGES) + 1
_SHAPE = (SAID, len(SEEN), len(_CHANCES) + 1, len(ENDS))
CELLS = int(np.prod(_SHAPE))
_PRIOR = 8.0
"""So many checks' worth of the common variance stand in each cell's own."""
_USUAL = 1.5
"""How far shares may well lie from the even one, in multiples of it."""


class Evidence(NamedTuple):
  """What a run has measured; older batches count less."""

  sums: Any
  """[5, C]: of the checks' weights w, and of w a^2, w^2 a^2, w a y and w y^2 for measured effects
  y and even shares a."""
  slope: Any
  """[2]: sums of effect times fitted effect, and of fitted effect squared."""


@dataclasses.dataclass(frozen=True)
class Calibrated(Scheme):
  """A_t = A_i * (1 + lambda * (w_t - 1)), with w_t the share that the cell of the token's step has
  been measured to have, scaled so that the w_t sum to T_i.

  The share m of a cell is the slope of its measured effects over the even share A_i / K of the
  outcome, shrunk towards 1; below 0 it is 0. Without evidence all shares are 1, and this is
  `uniform`. Conserves sum_t A_t = T_i A_i. No token's sign flips. As biased as the steps of a cell
  are unlike: what the reviewer says of a class of steps that the cells can tell apart moves nothing
  in the end (docs/method.md). Shrinkage by how far the cells' shares differ, estimated by
  moments (DerSimonian and Laird 1986); measurements as in VinePPO (Kazemnejad et al. 2024).
  """

  scheme: str = "calibrated"
  lam: float = 1.0
  """Share of the mass that follows the fitted effects; the rest stays uniform."""
  cap: float = 12.0
  """Largest multiplier of a token; see `weighted`."""
  keep: float = 0.98
  """How much of the evidence is kept from one batch to the next."""
  doubt: float = 1.0
  """Standard errors by which the shares of cells must differ more than chance makes them before any
  of them moves."""

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
    return Evidence(np.zeros((5, CELLS), np.float32), np.zeros(2, np.float32))

  def facts(
    self, state: Evidence, episodes: Sequence[Episode], group: int, most: int
  ) -> np.ndarray:
    """Intensities [B, K]."""
    shares_BxK = np.zeros((len(episodes), most), np.float32)
    found = fit(state, self.doubt)
    for i, (_, cells) in enumerate(_known(episodes, group)):
      shares_BxK[i, : len(cells)] = found.of(cells)
    return shares_BxK

  def __call__(self, given: Given) -> jax.Array:
    intensity_BxT = jnp.zeros(given.sampled_BxT.shape)
    if given.facts is not None:
      intensity_BxT = jnp.take_along_axis(given.facts, given.review.step_ids_BxT, 1)
    kept_BxT = given.sampled_BxT & given.review.ok_B[:, None]
    return spread(self.lam, self.cap, given, jnp.where(kept_BxT, intensity_BxT, 0.0))

  def evidence(self, state: Evidence, episodes: Sequence[Episode], group: int) -> Any:
    shares = fit(state, self.doubt)
    checks, slope, weights = [], np.zeros(2), np.zeros((2, *_SHAPE))
    for episode, (own, cells) in zip(episodes, _known(episodes, group), strict=True):
      used = shares.of(cells)
      for k, (cell, share) in enumerate(zip(cells, used, strict=True)):
        if cell < 0:
          continue
        weights.reshape(2, -1)[:, cell] += 1, share / (used.mean() or 1)
        if k in episode.checks:
          found, even = episode.checks[k].effect, own / len(cells)
          checks.append([cell, even, found])
          slope += found * even * share, (even * share) ** 2
    return [checks, slope.tolist(), weights.tolist()]

  def learn(self, state: Evidence, evidence: Sequence[Any]) -> tuple[Evidence, dict[str, float]]:
    checks, slopes, weights = zip(*evidence, strict=True)
    k = self.keep
    sums = np.float64(state.sums) * np.array([[k], [k], [k**2], [k], [k]])
    for cell, even, found in (check for own in checks for check in own):
      sums[:, cell] += 1, even**2, even**2, even * found, found**2
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
  known = zip(_said(episode), seen_of(episode), chances_of(episode), strict=False)
  return [-1 if said < 0 else cell_number(said, seen, sure, end) for said, seen, sure in known]


def cell_number(word: int, seen: int, chance: float, end: int) -> int:
  """The number of a cell: of what was said (`word_of`), of a step's chance under the policy, and of
  places in `SEEN` and `ENDS`."""
  return int(np.ravel_multi_index((word, seen, np.searchsorted(_CHANCES, chance), end), _SHAPE))


def chances_of(episode: Episode) -> list[float]:
  """How likely each step was, to the policy that took it; no text can lie about that."""
  logprobs = np.concatenate([np.where(s.sampled, s.logprobs, 0.0) for s in episode.segments])
  return [float(np.exp(logprobs[step.start : step.end].sum())) for step in episode.steps]


def seen_of(episode: Episode) -> list[int]:
  """What can be seen of each step, as places in `SEEN`."""
  lengths = [step.end - step.start for step in episode.steps]
  usual, before, seen = statistics.median(lengths or [0]), set(), []
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


class Fit(NamedTuple):
  """What the evidence says of each cell, [C], in multiples of the even share."""

  shares: np.ndarray
  """Shrunk towards 1, and not below 0."""
  slopes: np.ndarray
  """The same as measured."""
  errors: np.ndarray
  """Standard errors of that; infinite where nothing was measured."""

  def of(self, cells: Any) -> np.ndarray:
    """The shares of steps; of a step without a cell the even one."""
    numbers = np.asarray(cells, int)
    return np.where(numbers >= 0, self.shares[numbers], 1.0)


def fit(state: Evidence, doubt: float) -> Fit:
  """Each cell's share, shrunk towards the even one. What cells lend each other is only how far
  single measurements scatter, and, among those of one end, how far shares do."""
  n, a2, w2a2, ay, y2 = np.asarray(state.sums, np.float64)
  known = a2 > 0
  a2 = np.where(known, a2, 1.0)
  slopes = np.where(known, ay / a2, 1.0)
  residual = np.maximum(y2 - slopes * ay, 0.0)
  # Where little is known yet, as wide as a difference of two fair coins.
  common = (residual.sum() + _PRIOR * 0.5) / (np.maximum(n - 1, 0).sum() + _PRIOR)
  variance = (residual + _PRIOR * common) / (n + _PRIOR)
  # Of a few coins all may fall alike, so the error of n of them counts sqrt(1 + 4 / n) times.
  errors2 = np.where(known, variance * (1 + 4 / np.maximum(n, 1e-6)) * w2a2 / a2**2, np.inf)
  excess = slopes - 1
  kept = np.zeros(CELLS)
  for end in range(len(ENDS)):
    own = known & (np.arange(CELLS) % len(ENDS) == end)
    trust = 1 / (errors2[own] + _USUAL**2) ** 2
    beyond = trust @ (excess[own] ** 2 - errors2[own])
    beyond -= doubt * np.sqrt(2 * (trust**2 @ errors2[own] ** 2))
    spread2 = max(0.0, beyond) / max(trust.sum(), 1e-12)
    kept[own] = spread2 / (spread2 + errors2[own])
  return Fit(np.maximum(1 + kept * excess, 0.0), slopes, np.sqrt(errors2))


def _report(new: Evidence, doubt: float, used: np.ndarray) -> dict[str, float]:
  """Metrics; `used` holds the number of this batch's steps by what was said, what was seen and the
  end, and the sum of the multipliers that they got."""
  shares, slopes, errors = fit(new, doubt)
  checks = np.float64(new.sums[0])
  moved, measured = (checks * np.abs(x - 1) for x in (shares, np.maximum(slopes, 0.0)))
  metrics = {
    "calibration/checks": float(checks.sum()),
    "calibration/slope": float(new.slope[0] / new.slope[1]) if new.slope[1] else 0.0,
    "calibration/error": float(
      (checks * np.where(checks > 0, errors, 0)).sum() / max(checks.sum(), 1e-9)
    ),
    "calibration/survived": float(moved.sum() / max(measured.sum(), 1e-9)),
  }
  kinds = len(ROLES) * (len(_WEIGHTS) + 1)
  shape = 2, len(ROLES), -1, *_SHAPE[1:]
  counts, totals = used[:, :kinds].reshape(shape).sum((2, 4))
  for role, seen, end in np.argwhere(counts):
    suffix = "" if not seen else f"_{SEEN[seen]}"
    mean = totals[role, seen, end] / counts[role, seen, end]
    metrics[f"weight/{ROLES[role]}{suffix}_{ENDS[end]}"] = float(mean)
  return metrics
