"""A credit scheme with a setting of its own."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from dca_jax.credit import Scheme
from dca_jax.episode import ROLES


@dataclasses.dataclass(frozen=True)
class Spotlight(Scheme):
  """A_t = A_i, times `contrast` in steps that decided the answer. Conserves nothing; biased."""

  contrast: float = 2.0
  reads: ClassVar[tuple[str, ...]] = ("roles",)

  def __call__(self, given):
    review = given.review
    roles_BxT = jnp.take_along_axis(review.roles_BxK, review.step_ids_BxT, 1)
    decisive_BxT = (roles_BxT == ROLES.index("necessary")) | (roles_BxT == ROLES.index("error"))
    told_BxT = decisive_BxT & review.ok_B[:, None]
    return given.advantages_B[:, None] * jnp.where(told_BxT, self.contrast, 1.0)
