"""Credit assignment: from outcomes and reviews to token advantages."""

from dca_jax.credit.calibrated import Calibrated
from dca_jax.credit.guard import Guarded
from dca_jax.credit.scheme import (
  Advantages,
  Array,
  Given,
  ReviewArrays,
  Scheme,
  assign_credit,
  group_advantages,
  token_advantages,
)
from dca_jax.credit.schemes import (
  SCHEMES,
  Capo,
  Potential,
  ReturnToGo,
  RoleTable,
  Signed,
  Uniform,
  Weighted,
)

__all__ = [
  "SCHEMES",
  "Advantages",
  "Array",
  "Calibrated",
  "Capo",
  "Given",
  "Guarded",
  "Potential",
  "ReturnToGo",
  "ReviewArrays",
  "RoleTable",
  "Scheme",
  "Signed",
  "Uniform",
  "Weighted",
  "assign_credit",
  "group_advantages",
  "token_advantages",
]
