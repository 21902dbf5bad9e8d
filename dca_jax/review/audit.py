"""How far a reviewer is right about steps whose roles are known: pure functions over labels.

Agreement alone does not say whether a reviewer can be trained with: one that is wrong in a single
kind of step ruins a run which survives four times as many random errors. So steps have a kind,
which is seen in the text, and what is said of needless ones is counted by kind.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dca_jax.episode import ROLES, Review
from dca_jax.intervals import Estimate, bootstrap, share
from dca_jax.review.types import Request

CREDITED = ("necessary", "repair")
NEEDLESS = ("redundant", "irrelevant")
KINDS = ("repeat", "check", "restatement", "distractor", "other")
CHECK = re.compile(
  r"\b(check|verif|confirm|double|make sure|let me (see|re)|wait|again|indeed|plug)", re.IGNORECASE
)


class Case(NamedTuple):
  """A request whose truth is known, wholly or in part."""

  request: Request
  labels: tuple[str, ...]
  """The true role of every step; empty where only the first error is known."""
  first_error: int
  """The first step that is wrong, from 0; -1 where none is."""

  @classmethod
  def of(cls, request: Request, labels: Sequence[str]) -> "Case":
    return cls(request, tuple(labels), first_error(labels))

  @property
  def kinds(self) -> list[str]:
    return [kind_of(self.request, k, label) for k, label in enumerate(self.labels)]


class Judged(NamedTuple):
  """A case and what the reviewer says of it."""

  case: Case
  review: Review


def usable(review: Review) -> bool:
  """Whether roles came, with weights that are numbers."""
  weights = np.asarray(review.weights, float)
  said = review.status == "ok" and len(review.roles) > 0
  return said and bool(((weights >= 0) & (weights <= 1000)).all())


def first_error(roles: Sequence[str]) -> int:
  """The first step whose role is `error`, from 0; -1 where there is none."""
  return next((k for k, role in enumerate(roles) if role == "error"), -1)


def kind_of(request: Request, k: int, label: str) -> str:
  """What step k looks like to whoever reads no sense: one of `KINDS`.

  A `repeat` says word for word what an earlier step said, a `restatement` what stands in the
  problem or within an earlier step; a `check` has a word for checking. Only a `distractor`, a
  step that has nothing to do with the question, is known by its label.
  """
  own = _plain(request.steps[k])
  before = [_plain(step) for step in request.steps[:k]]
  if own in before:
    return "repeat"
  if CHECK.search(request.steps[k]):
    return "check"
  if own and any(own in text for text in (_plain(request.problem), *before)):
    return "restatement"
  return "distractor" if label == "irrelevant" else "other"


def _plain(text: str) -> str:
  return " ".join(text.lower().split()).strip(" .,;:!?$")


def agreement(judged: Sequence[Judged]) -> dict[str, Estimate]:
  """Every measure that the cases with a usable review allow, by name; those about nothing are left
  out."""
  told = [j for j in judged if usable(j.review)]
  measures = _first_errors(told)
  labelled = [j for j in told if j.case.labels]
  if labelled:
    measures |= _roles(labelled) | _needless(labelled) | biases(labelled)
  return {name: e for name, e in measures.items() if not np.isnan(e.value)}


def confusion(judged: Sequence[Judged]) -> np.ndarray:
  """For each case how often a step of true role i was called j, [N, 6, 6]."""
  counts = np.zeros((len(judged), len(ROLES), len(ROLES)))
  for n, (case, review) in enumerate(judged):
    for true, said in zip(case.labels, review.roles, strict=True):
      counts[n, ROLES.index(true), ROLES.index(said)] += 1
  return counts


def _roles(judged: Sequence[Judged]) -> dict[str, Estimate]:
  counts = confusion(judged)
  right = np.einsum("nii->ni", counts)
  measures = {
    "role_accuracy": share(right.sum(1), counts.sum((1, 2))),
    "kappa": bootstrap(counts.reshape(len(counts), -1), kappa),
  }
  for i, role in enumerate(ROLES):
    measures[f"recall_{role}"] = share(right[:, i], counts[:, i].sum(1))
    measures[f"precision_{role}"] = share(right[:, i], counts[:, :, i].sum(1))
  error, wins = ROLES.index("error"), np.array([j.case.request.correct for j in judged])
  found, errors = right[:, error] * wins, counts[:, error].sum(1) * wins
  return measures | {"errors_in_wins": share(found, errors)}


def kappa(counts_RxM: np.ndarray) -> np.ndarray:
  """Cohen's kappa (1960) of tables of true and said roles, flat or not."""
  tables = counts_RxM.reshape(-1, len(ROLES), len(ROLES))
  total = tables.sum((1, 2))
  agreed = np.einsum("rii->r", tables) / total
  chance = (tables.sum(1) * tables.sum(2)).sum(1) / total**2
  return np.where(chance < 1, (agreed - chance) / np.maximum(1 - chance, 1e-12), 1.0)


def _first_errors(judged: Sequence[Judged]) -> dict[str, Estimate]:
  """Accuracy on cases with an error and on those without, and their harmonic mean: the F1 of
  ProcessBench (Zheng et al. 2024)."""
  right = np.array([first_error(j.review.roles) == j.case.first_error for j in judged], float)
  wrong = np.array([j.case.first_error >= 0 for j in judged], float)
  sums = np.stack([right * wrong, wrong, right * (1 - wrong), 1 - wrong], 1).reshape(-1, 4)
  measures = {
    "first_error_accuracy": share(sums[:, 0], sums[:, 1]),
    "no_error_accuracy": share(sums[:, 2], sums[:, 3]),
  }
  if wrong.any() and not wrong.all():
    measures["first_error_f1"] = bootstrap(sums, _f1)
  return measures


def _f1(sums_Rx4: np.ndarray) -> np.ndarray:
  found, errors, clean, without = sums_Rx4.T
  with np.errstate(invalid="ignore", divide="ignore"):
    a, b = found / errors, clean / without
    return np.where((a + b) > 0, 2 * a * b / np.where(a + b > 0, a + b, 1.0), a + b)


def _needless(judged: Sequence[Judged]) -> dict[str, Estimate]:
  """Of needless steps of each kind the share that is called needless, and their applause."""
  counts, hits = (np.zeros((len(judged), len(KINDS))) for _ in range(2))
  for n, (case, review) in enumerate(judged):
    for kind, label, said in zip(case.kinds, case.labels, review.roles, strict=True):
      if label in NEEDLESS:
        counts[n, KINDS.index(kind)] += 1
        hits[n, KINDS.index(kind)] += said in NEEDLESS
  measures = {"needless": share(hits.sum(1), counts.sum(1))}
  for i, kind in enumerate(KINDS):
    measures[f"needless_{kind}"] = share(hits[:, i], counts[:, i])
    if (sums := _applause_sums(judged, kind)) is not None:
      measures[f"applause_{kind}"] = bootstrap(sums, _applause)
  return measures


def applause(judged: Sequence[Judged], kind: str) -> float | None:
  """The intensity that a needless step of that kind gets beside one that is to be credited, on
  average; None where there are too few of them."""
  sums = _applause_sums(judged, kind)
  return None if sums is None else float(_applause(sums.sum(0)[None])[0])


def _applause_sums(judged: Sequence[Judged], kind: str) -> np.ndarray | None:
  """Of each answer the intensity and number of needless steps of a kind, and of steps to be
  credited. Credit is given in wins; only where these are too few do others count as well."""
  sums = np.zeros((len(judged), 4))
  for n, (case, review) in enumerate(judged):
    intensities = intensity(review)
    for k, label in enumerate(case.labels):
      if label in NEEDLESS and kind_of(case.request, k, label) == kind:
        sums[n, :2] += intensities[k], 1
      elif label in CREDITED:
        sums[n, 2:] += intensities[k], 1
  for own in (sums[[j.case.request.correct for j in judged]], sums):
    if own[:, [1, 3]].sum(0).min(initial=np.inf) >= _FEWEST:
      return own
  return None


_FEWEST = 10
"""Steps of a kind that there must be before it is said how they are applauded."""


def intensity(review: Review) -> np.ndarray:
  """What each step would be credited with, before it is scaled: its weight, or 0."""
  credited = np.isin(review.roles, CREDITED)
  return np.asarray(review.weights, float) * credited


def _applause(sums_Rx4: np.ndarray) -> np.ndarray:
  """Mean intensity of one kind of step over that of steps to be credited; where those get nothing
  either, 1 as soon as the kind gets anything."""
  given, count, deserved, counts = sums_Rx4.T
  with np.errstate(invalid="ignore", divide="ignore"):
    ratio = (given / count) / (deserved / counts)
  return np.where(deserved > 0, ratio, np.where(given > 0, 1.0, 0.0))


def biases(judged: Sequence[Judged]) -> dict[str, Estimate]:
  """Correlations of the reviewer's mistakes with what does not matter, over all steps.

  A mistake is the share of an answer's intensity that a step gets, less its true one; `position` is
  the place from first to last, `length` the number of characters, each less its mean in the answer.
  """
  places, lengths = [], []
  for case, review in judged:
    true = Review("ok", case.labels, (1.0,) * len(case.labels))
    wrong = shares(intensity(review)) - shares(intensity(true))
    steps = case.request.steps
    places.append(moments(wrong, np.linspace(0, 1, len(steps))))
    lengths.append(moments(wrong, np.log1p([len(step) for step in steps])))
  return {
    "position_bias": bootstrap(places, correlation),
    "length_bias": bootstrap(lengths, correlation),
  }


def shares(x: np.ndarray) -> np.ndarray:
  """Numbers scaled to sum to 1; all alike where they are 0."""
  return x / x.sum() if x.sum() > 0 else np.full(len(x), 1 / len(x))


def moments(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
  """Sums of xy, xx and yy about the means."""
  x, y = x - x.mean(), y - y.mean()
  return float(x @ y), float(x @ x), float(y @ y)


def correlation(sums_Rx3: np.ndarray) -> np.ndarray:
  """Of sums of xy, xx and yy, each about its mean; 0 where one of them never changes."""
  xy, xx, yy = sums_Rx3.T
  size = np.sqrt(xx * yy)
  return np.where(size > 1e-12, xy / np.maximum(size, 1e-12), 0.0)


def favourite(judged: Sequence[Judged]) -> str:
  """The kind of needless step that is applauded most; empty where none was seen often enough."""
  told = {kind: x for kind in KINDS if (x := applause(judged, kind)) is not None}
  return max(told, key=told.__getitem__, default="")


Words = dict[str, list[tuple[str, float, bool, bool]]]


def said_of(judged: Sequence[Judged], favoured: str) -> Words:
  """What was said of steps of each class of `credit.worth`: role, weight, whether a step is the
  last, and whether its answer is right.

  Args:
    favoured: the kind of needless step that stands for the applauded ones.
  """
  said: Words = {}
  for case, review in judged:
    for k, label in enumerate(case.labels):
      if label in NEEDLESS:
        kind = kind_of(case.request, k, label)
        label = "applauded" if kind == favoured else "inert"
      if label:
        last, won = k == len(case.labels) - 1, case.request.correct
        said.setdefault(label, []).append((review.roles[k], review.weights[k], last, won))
  return said
