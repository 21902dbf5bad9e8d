"""A rewriter: whoever says something twice might say it once."""

import dataclasses

from dca_jax.review import Proposing


@dataclasses.dataclass(frozen=True)
class Brief(Proposing):
  """Leaves out the first step that an answer has had already."""

  kinds = ("wins",)

  def propose(self, request, truth):
    steps = request.steps
    for k, step in enumerate(steps):
      if step in steps[:k]:
        return k, "".join(steps[k + 1 :])
    return None
