"""Arms for `dca-jax compare` on tasks with turns."""

from collections.abc import Mapping
from typing import Any

_REDISTRIBUTED = {
  "credit.scheme": "weighted",
  "credit.baseline": "mean",
  "credit.divide_by_std": True,
}
_NOBODY = {"reviewer.name": "none"}
_PROGRESS = {"credit.scheme": "potential", "value.source": "environment", **_NOBODY}
_ARMS: dict[str, dict[str, Any]] = {
  "uniform": {"credit.scheme": "uniform", **_NOBODY},
  "calibrated": {"credit.scheme": "calibrated"},
  "fooled": {"credit.scheme": "calibrated", "reviewer.name": "fooled"},
  "redistributed": _REDISTRIBUTED,
  "redistributed_fooled": _REDISTRIBUTED | {"credit.guard": False, "reviewer.name": "fooled"},
  "progress_0": _PROGRESS | {"credit.discount": 0.0},
  "progress_1": _PROGRESS | {"credit.discount": 1.0},
}


def arms(rates: Mapping[str, float]) -> dict[str, dict[str, Any]]:
  """The arms, each with its own learning rate.

  `redistributed` is GRPO whose advantage a judge's reading spreads over the turns, as DRACO does it
  (arXiv 2609.04094), with nothing that looks after the judge. `progress_0` takes what a turn
  changed in the environment's own score for its credit; `progress_1` is unbiased whatever the
  scores are.
  """
  return {name: own | {"learner.lr": rates[name]} for name, own in _ARMS.items()}
