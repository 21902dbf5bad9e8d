"""A reviewer that calls a Python function."""

import dataclasses

from dca_jax.checks import at_least
from dca_jax.review import Review, ReviewerConfig


@dataclasses.dataclass(frozen=True)
class Repeats(ReviewerConfig):
  """Whoever says again what was said in the last `window` steps is redundant."""

  window: int = 3

  def check(self):
    return super().check() | at_least(1, self, "window")

  def review(self, request):
    steps, plain = request.steps, "necessary" if request.correct else "error"
    repeats = [step in steps[max(0, k - self.window) : k] for k, step in enumerate(steps)]
    return Review("ok", tuple("redundant" if repeat else plain for repeat in repeats))
