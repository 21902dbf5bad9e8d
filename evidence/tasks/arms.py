"""Arms for `dca-jax compare` on tasks with turns."""

from collections.abc import Mapping
from typing import Any

_REDISTRIBUTED = {
  "credit.scheme": "weighted",
  "credit.baseline": "mean",
  "credit.divide_by_std": True,
}
_NOBODY = {"reviewer.name": "none"}
_ARMS: dict[str, dict[str, Any]] = {
  "uniform": {"credit.scheme": "uniform", **_NOBODY},
  "calibrated": {"credit.scheme": "calibrated"},
  "fooled": {"credit.scheme": "calibrated", "reviewer.name": "fooled"},
  "redistributed": _REDISTRIBUTED,
  "redistributed_fooled": _REDISTRIBUTED | {"credit.guard": False, "reviewer.name": "fooled"},
  "progress": {
    "credit.scheme": "potential",
    "credit.discount": 0.0,
    "value.source": "environment",
    **_NOBODY,
  },
}


def arms(rates: Mapping[str, float]) -> dict[str, dict[str, Any]]:
  """The arms, each with its own learning rate.

  `redistributed` is GRPO whose advantage a judge's reading spreads over the turns, as DRACO does it
  (arXiv 2609.04094), with nothing that looks after the judge. `progress` trusts the environment's
  own scores.
  """
  return {name: own | {"learner.lr": rates[name]} for name, own in _ARMS.items()}
