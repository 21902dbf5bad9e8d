"""SmolLM2-135M-Instruct on sums of four digits, in three lines: answers with steps, on a CPU.

The model is that of `smollm2_arithmetic.py`. Two worked examples tell it to add one number a line;
at temperature 0.4 about a quarter of its samples are right. docs/reviewers.md has what a reviewer
learns from faults planted in them. Training on it has not been tried.
"""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from dca_jax.tasks.text import Rows, TextConfig


@dataclasses.dataclass(frozen=True)
class Sums(TextConfig):
  """Numbers to be added."""

  count: int = 3600
  """Different problems to train on."""
  heldout: int = 400
  """Further ones to be evaluated on."""
  draw: int = 0
  """Another value draws others; of the 6,561 that there are, some are in both."""

  def parts(self) -> dict[str, Rows]:
    rng, rows = np.random.default_rng(7 + self.draw), dict[str, dict[str, str]]()
    while len(rows) < self.count + self.heldout:
      numbers = rng.integers(1, 10, 4).tolist()
      question = f"Add {', '.join(map(str, numbers))}."
      rows[question] = {"question": question, "answer": str(sum(numbers))}
    numbers = {
      "train": range(self.count),
      "heldout": range(self.count, self.count + self.heldout),
    }
    listed = [*rows.values()]
    return {part: Rows(listed, lambda i: f"sum {i}", own) for part, own in numbers.items()}


EXAMPLES = """\
Add 4, 7, 2, 5.
4 + 7 = 11
11 + 2 = 13
13 + 5 = 18

Add 8, 5, 9, 1.
8 + 5 = 13
13 + 9 = 22
22 + 1 = 23

{question}
"""


def get_config():
  c = ConfigDict()
  c.steps = 10
  c.policy = dict(pretrained="runs/smollm2", lora_rank=16, lora_alpha=32.0)
  c.task = dict(name=f"{__file__}:Sums", prompt=EXAMPLES, chat_template=False)
  c.rollout = dict(
    problems=32, group=2, max_prompt_tokens=128, max_tokens=32, stop=("\n\n",), temperature=0.4
  )
  c.reviewer = dict(name="none")
  c.credit = dict(scheme="uniform")
  c.learner = dict(lr=3e-4, warmup_updates=2, max_grad_norm=1.0)
  c.evaluate = dict(problems=32, samples=3, k=2)
  return c
