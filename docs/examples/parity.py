"""A task with exact labels: the running parity of some bits, one step for each bit."""

import dataclasses
from typing import ClassVar

import numpy as np

from dca_jax.checks import at_least
from dca_jax.tasks import SPLITS, Outcome, Problem, TaskConfig, character_tokenizer


@dataclasses.dataclass(frozen=True)
class Parity(TaskConfig):
  """The answer to `1101>` is `1;0;0;1$`."""

  bits: int = 4
  mistakes: float = 0.3
  """Chance that a step of a demonstration with mistakes is wrong."""

  offers: ClassVar[tuple[str, ...]] = ("labels", "demonstrations")
  step_end: ClassVar[str] = ";"

  def check(self):
    return at_least(1, self, "bits")

  def tokenizer(self):
    return character_tokenizer("01;>", end="$")

  def problem(self, split, index):
    rng = np.random.default_rng([SPLITS.index(split), index])
    bits = "".join(map(str, rng.integers(2, size=self.bits)))
    return Problem(index, f"{bits}>", str(bits.count("1") % 2))

  def verify(self, problem, completion, truncated):
    steps = completion.split(";")
    right = len(steps) == self.bits and steps[-1] == f"{problem.answer}$"
    return Outcome(float(right), right, truncated)

  def demonstration(self, index, mistakes):
    rng = np.random.default_rng([SPLITS.index("demonstrations"), index])
    problem, parity, steps = self.problem("demonstrations", index), 0, []
    for bit in problem.prompt[:-1]:
      parity ^= int(bit) ^ (mistakes and rng.random() < self.mistakes)
      steps.append(str(int(parity)))
    return problem.prompt, ";".join(steps) + "$"

  def label_steps(self, prompt, steps, truncated):
    labels, said, true = [], 0, 0
    for k, step in enumerate(steps):
      bit = int(prompt[k]) if k < self.bits else 0
      follows, true = said ^ bit, true ^ bit
      ending = "$" if k == self.bits - 1 else ";"
      if k >= self.bits or step != f"{follows}{ending}":
        labels.append("error")
      else:
        labels.append("necessary" if follows == true else "inherits")
      said = int(step[0]) if step[:1] in ("0", "1") else follows
    return labels
