"""What a task gives to the rest of the program."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, cast

import numpy as np

from dca_jax.episode import Outcome, Problem

SPLITS = ("train", "heldout", "demonstrations")


def problem_seed(split: str, index: int) -> int:
  """A seed, below 2**31, for whatever makes a problem out of one."""
  return int(np.random.SeedSequence([SPLITS.index(split), index]).generate_state(1)[0] >> 1)


@dataclasses.dataclass(frozen=True)
class TaskConfig:
  """The `task` section. A task extends it with settings of its own, and is opened once in a run; a
  task that has nothing to open has the methods of `Task` itself."""

  name: str = ""
  """`chains`, `tfds`, `jsonl`, `hub`, `openenv` or `reasoning_gym`; or your own, MODULE:CLASS."""

  offers: ClassVar[tuple[str, ...]] = ()
  """Which of the optional parts of `Task` it has: `labels` (`label_steps`), `values`
  (`prefix_values`), `corrections` (`correct_step`), `demonstrations` (`demonstration`),
  `environment` (see `environments`)."""
  notation: ClassVar[str] = ""
  """How to read its prompts and answers, where that is not plain; the page of a run says it."""
  step_end: ClassVar[str] = "\n"
  step_limits: ClassVar[tuple[int, int]] = (0, 0)
  sizes: ClassVar[Mapping[str, int]] = {}
  concurrency: ClassVar[int] = 1
  final_answer: ClassVar[Callable[[str], str | None] | None] = None

  def open(self) -> "Task":
    """Raises UserError where its data, tokenizer or verifier cannot be had."""
    return cast(Task, self)

  def render(self, prompt: str) -> str:
    """What the policy reads where it is asked `prompt`."""
    return prompt

  def implied(self, pretrained: str) -> dict[str, Any]:
    """What `policy.pretrained` decides of its keys, where nobody set them."""
    return {}


class Task(Protocol):
  """Stateless: everything it returns is a function of its arguments, its config and its data."""

  @property
  def step_end(self) -> str:
    """Regular expression; a step of a completion ends where a match ends."""

  @property
  def step_limits(self) -> tuple[int, int]:
    """Fewest characters of a step and most steps; see `rollout.cut`."""

  @property
  def sizes(self) -> Mapping[str, int]:
    """How many problems a split has; one that is not named here has no end."""

  def tokenizer(self) -> Any:
    """A `transformers` fast tokenizer whose `eos_token` ends a completion."""

  def problem(self, split: str, index: int) -> Problem: ...

  def render(self, prompt: str) -> str:
    """What the policy reads where it is asked `prompt`."""

  @property
  def concurrency(self) -> int:
    """How many threads may call `verify` at once."""

  def verify(self, problem: Problem, completion: str, truncated: bool) -> Outcome: ...

  @property
  def final_answer(self) -> Callable[[str], str | None] | None:
    """Gives the answer of a completion, for majority votes, or None where it gives none; None if
    nothing can tell."""


class Labelled(Task, Protocol):
  """A task that `offers` labels."""

  def label_steps(self, prompt: str, steps: Sequence[str], truncated: bool) -> list[str]:
    """The true role of every step (see `episode.ROLES`); what the oracle reviewer reads."""

  def expected_steps(self, prompt: str, steps: Sequence[str]) -> list[str]:
    """What every step should have been, given what it reads; an empty string where that is
    unknown. A task may leave this method out: a reviewer that is trained on labels learns from it
    what is right, and not only that something is wrong."""


class Valued(Task, Protocol):
  """A task that `offers` values."""

  def prefix_values(self, prompt: str, completions: Sequence[Sequence[str]]) -> list[list[float]]:
    """For each completion (its steps) of one prompt, the chance of success in [0, 1] before each
    step is written.

    What is said of a prefix may depend on the other completions, but not on the rest of its own.
    """


class Corrected(Labelled, Protocol):
  """A task that `offers` corrections."""

  def correct_step(self, prompt: str, steps: Sequence[str], k: int) -> str:
    """What would have been right in the place of step k, from 0, the first with the role `error`;
    empty where nobody can tell."""


class Demonstrated(Task, Protocol):
  """A task that `offers` demonstrations."""

  def demonstration(self, index: int, mistakes: bool) -> tuple[str, str]:
    """A prompt and a worked solution for the warm start; right throughout unless `mistakes` are
    allowed."""
