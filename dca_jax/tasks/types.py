"""What a task gives to the rest of the program."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

SPLITS = ("train", "heldout", "demonstrations")


@dataclasses.dataclass(frozen=True)
class Problem:
  """A prompt, its reference answer, and an id that is unique within its split."""

  id: int
  prompt: str
  answer: str
  rendered: str = ""
  """What the policy reads, where it is not the prompt itself: the prompt in a chat template."""
  row: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False, repr=False)
  """The row of the data set, for a verifier of the user's."""


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What the verifier says of one completion: `reward` in [0, 1]; `truncated` when it ran out of tokens."""

  reward: float
  correct: bool
  truncated: bool
  judged: bool = True
  """False where the verifier gave no verdict; such a completion is not trained on."""
  parts: dict[str, float] = dataclasses.field(default_factory=dict)
  """Numbers that the verifier reports beside the reward, by name."""


class Task(Protocol):
  """Stateless: everything it returns is a function of its arguments, its config and its data. Free text has no
  `demonstration`, `label_steps` and `prefix_values`; configs that need them are refused."""

  step_end: str
  """Regular expression; a step of a completion ends where a match ends."""
  step_limits: tuple[int, int]
  """Fewest characters of a step and most steps; see `rollout.cut`."""
  sizes: dict[str, int]
  """How many problems a split has; one that is not named here has no end."""

  def tokenizer(self):
    """A `transformers` fast tokenizer whose `eos_token` ends a completion."""
    ...

  def problem(self, split: str, index: int) -> Problem: ...

  def demonstration(self, index: int, mistakes: bool) -> tuple[str, str]:
    """A prompt and a worked solution for the warm start; right throughout unless `mistakes` are allowed."""
    ...

  concurrency: int
  """How many threads may call `verify` at once."""

  def verify(self, problem: Problem, completion: str, truncated: bool) -> Outcome: ...

  final_answer: Callable[[str], str | None] | None
  """Gives the answer of a completion, for majority votes, or None where it gives none; None if nothing can tell."""

  def label_steps(self, prompt: str, steps: Sequence[str], truncated: bool) -> list[str]:
    """The true role of every step (see `roles.ROLES`); what the oracle reviewer reads."""
    ...

  def prefix_values(self, prompt: str, completions: Sequence[Sequence[str]]) -> list[list[float]]:
    """For each completion (its steps) of one prompt, the chance of success in [0, 1] before each step is written.

    A value reads the steps before it and, to learn how able the policy is, the *other* completions; never the rest of
    its own.
    """
    ...
