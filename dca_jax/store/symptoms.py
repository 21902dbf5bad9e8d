"""What in a run's metrics says that it does not learn, in sentences with the likely cause."""

import collections
import math
import statistics
from collections.abc import Iterator

from dca_jax.credit.guard import WATCHED

_SHORT, _LONG = 5, 20  # Steps in a row before it is said: without a doubt, perhaps by chance.


class Watch:
  """Reads the rows of metrics.jsonl in order; says each thing once in a run.

  It knows nothing but the rows, so a run that goes on reads the old ones first and does not say
  again what they said.
  """

  def __init__(self) -> None:
    self._recent: collections.deque[dict[str, float]] = collections.deque(maxlen=_LONG)
    self._first: list[float] = []
    self._begun: dict[str, float] = {}
    self._said: set[str] = set()

  def read(self, row: dict[str, float]) -> list[str]:
    """What this row adds, as sentences."""
    new = {kind: said for kind, said in self._seen(row) if kind not in self._said}
    self._said |= new.keys()
    return [f"step {row['step']:.0f}: {said}" for said in new.values()]

  def _seen(self, row: dict[str, float]) -> Iterator[tuple[str, str]]:
    if shared := row.get("data/heldout_in_training"):
      yield "leak", f"{shared:.0%} of the evaluated problems are training problems too; {_LEAK}"
    if "eval/sampled_low" in row:
      self._begun = self._begun or row
      if row["eval/sampled_high"] < self._begun["eval/sampled_low"]:
        now, start = row["eval/sampled"], self._begun["eval/sampled"]
        fell = f"of held-out samples {now:.3f} are right, and {start:.3f} were at step"
        yield "heldout", f"{fell} {self._begun['step']:.0f}; {_FALLING}"
    if "train/accuracy" not in row or (self._recent and row["step"] == self._recent[-1]["step"]):
      return
    self._recent.append(row)
    if len(self._first) < _LONG:
      self._first.append(row["train/accuracy"])
    yield from self._pleased(row)
    if reason := int(row.get("guard/reason", 0)):
      what, why = _GUARDED[WATCHED[reason - 1]]
      measure = "" if _calibrates(row) else _MEASURE
      then = _LOWERED.format(share=row["guard/share"], measure=measure)
      yield f"guard {reason}", f"{what}, {why}; {then}"
    last = [*self._recent][-_SHORT:]
    if len(last) == _SHORT and all(m.get("train/truncated") == 1 for m in last):
      yield "truncated", f"every completion has been cut off for {_SHORT} steps; {_TRUNCATED}"
    mixed = [m.get("train/mixed_groups", 1.0) for m in last]
    if len(last) == _SHORT and all(mixed) and all(m.get("learner/grad_norm") == 0 for m in last):
      yield "gradient", f"the gradient has been 0 for {_SHORT} steps of mixed groups; {_GRADIENT}"
    if len(self._recent) < _LONG:
      return
    accuracies = [m["train/accuracy"] for m in self._recent]
    now, start = statistics.fmean(accuracies), statistics.fmean(self._first)
    if not any(m.get("train/mixed_groups", 1.0) for m in self._recent):
      cause = _TOO_EASY if now > 0.5 else _TOO_HARD
      yield "mixed", f"no group has had better and worse completions for {_LONG} steps; {cause}"
    noise = math.sqrt((statistics.variance(accuracies) + statistics.variance(self._first)) / _LONG)
    if start - now > max(5 * noise, 0.02):
      fell = f"accuracy has been {now:.3f} over {_LONG} steps and was {start:.3f} over the first"
      yield "falling", f"{fell}; {_FALLING}"

  def _pleased(self, row: dict[str, float]) -> Iterator[tuple[str, str]]:
    """What audits in training say of a reviewer that can be pleased."""
    for key in row:
      if key.startswith("review/premium_"):
        premiums = [m[key] for m in self._recent if key in m][-3:]
        if len(premiums) > 1 and statistics.fmean(premiums) > _PREMIUM:
          fault = key.removeprefix("review/premium_").replace("_", " ")
          earns = f"planting a {fault} earns {premiums[-1]:.1f} times a step's credit"
          yield key, f"{earns}; {_PLEASED.format('' if _calibrates(row) else 'calibrated or ')}"


def _calibrates(row: dict[str, float]) -> bool:
  """Whether the scheme is `calibrated` already, which alone writes this."""
  return "calibration/checks" in row


def findings(rows: list[dict[str, float]]) -> list[str]:
  """Everything that a run's rows say."""
  watch = Watch()
  return [said for row in rows for said in watch.read(row)]


_UNPAID = "although answers with more of it do not win more often than others"
_GUARDED = {
  "repeats": ("answers repeat themselves more and more", _UNPAID),
  "checks": ("answers check themselves more and more", _UNPAID),
  "length": ("answers get longer", _UNPAID),
  "truncated": ("more and more answers are cut off", "which never wins"),
  "reward": ("the reward has fallen", "which the outcome alone would not do"),
}
_LOWERED = (
  "the guard lowers the reviewer's share of credit, to {share:.2f} now, and lets it come back when"
  " that is over (guard/share). Read answers in trajectories/; {measure}credit.guard=False would"
  " let the reviewer have its way"
)
_MEASURE = "credit.scheme=calibrated measures what such steps are worth, and "
_PREMIUM = 0.5
_PLEASED = (
  "a policy that finds out will be paid for it: use credit.scheme={}uniform, or another"
  " reviewer (docs/reviewers.md)"
)
_LEAK = (
  "scores on them say nothing of new ones: remove them from one side, or use task.heldout_fraction"
)
_TRUNCATED = (
  "raise rollout.max_tokens, or find out in trajectories/ why no answer ends: a chat template that"
  " the model does not know, an end token that it does not write (rollout.stop)"
)
_GRADIENT = "nothing that counts was trained on: look at learner.mask_truncated and trajectories/"
_TOO_EASY = "nearly all are right, so nothing is left to learn here: take harder problems"
_TOO_HARD = (
  "none is right: read answers in trajectories/, whether the verifier takes them as they are"
  " written, and else take easier problems or a larger rollout.group"
)
_FALLING = (
  "lower learner.lr, or, if answers get longer or repeat themselves, mistrust the reviewer: compare"
  " with credit.scheme=uniform (docs/method.md)"
)
