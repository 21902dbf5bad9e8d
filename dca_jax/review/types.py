"""What goes to a reviewer and what comes back."""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

from dca_jax.episode import Episode, Review


@dataclasses.dataclass(frozen=True)
class Request:
  """One completion to review. `id` identifies the sample in its run
  and is the same after a resume."""

  id: str
  problem: str
  steps: tuple[str, ...]
  correct: bool
  truncated: bool
  answer: str = ""
  """The right one, where it is known; shown to a model on request."""
  given: tuple[str, ...] = ()
  """What the environment said before each step; empty where it has none."""

  def given_before(self, k: int) -> str:
    """What was given before step k, counted from 1; nothing where steps were edited."""
    return self.given[k - 1] if len(self.given) == len(self.steps) else ""

  @classmethod
  def of(cls, episode: Episode) -> "Request":
    texts = tuple(step.text for step in episode.steps)
    problem, outcome, given = episode.problem, episode.outcome, episode.given()
    ended, said = (outcome.correct, outcome.truncated), given if any(given) else ()
    return cls(episode.id, problem.prompt, texts, *ended, problem.answer, said)


class Truth(NamedTuple):
  """What a task knows."""

  labels: Callable[[Request], Sequence[str]]
  """The true roles of a request's steps."""
  values: Callable[[str, Sequence[Sequence[str]]], Sequence[Sequence[float]]]
  """From a prompt and the steps of its completions to the values of their prefixes (see
  `Valued.prefix_values`); empty ones where the task offers none."""
  correction: Callable[[Request, int], str] = lambda request, k: ""
  """What would have been right in the place of step k, from 0 (see `Corrected.correct_step`)."""
  expected: Callable[[Request], Sequence[str]] = lambda request: ()
  """What each step of a request should have been, given what it reads (see `Labelled`); nothing
  where the task does not say."""

  @classmethod
  def of(cls, task: Any) -> "Truth":
    """That of a task which offers labels; asked of another one, it fails."""

    def values(problem: str, completions: Sequence[Sequence[str]]):
      known = getattr(task, "prefix_values", None)
      return known(problem, completions) if known else [()] * len(completions)

    def correction(request: Request, k: int) -> str:
      return task.correct_step(request.problem, request.steps, k)

    def expected(request: Request) -> Sequence[str]:
      known = getattr(task, "expected_steps", None)
      return known(request.problem, request.steps) if known else ()

    def labels(request: Request) -> Sequence[str]:
      return task.label_steps(request.problem, request.steps, request.truncated)

    return cls(labels, values, correction, expected)


@dataclasses.dataclass(frozen=True)
class Usage:
  """What calls to a model took; tokens of thought are billed as output."""

  calls: int = 0
  prompt_tokens: int = 0
  cached_tokens: int = 0
  """Of the prompt's, those that the provider had cached."""
  output_tokens: int = 0
  thought_tokens: int = 0
  dollars: float = 0.0

  def __add__(self, other: "Usage") -> "Usage":
    return Usage(*map(operator.add, dataclasses.astuple(self), dataclasses.astuple(other)))


def finished(reviews: list[Review]) -> "Future[list[Review]]":
  """What needs no waiting."""
  done: Future[list[Review]] = Future()
  done.set_result(reviews)
  return done


class Share(NamedTuple):
  """A process's part of what a run may do, where several processes review."""

  processes: int = 1
  total: Callable[[float], float] = lambda own: own
  """The sum of a number over all processes, which must all ask for it."""
  spent: float = 0.0
  """Dollars that the run is known to have spent, whatever the caches still know of it."""


class Trial(NamedTuple):
  """How a first question went; both are empty for reviewers that are asked none."""

  said: str = ""
  """What came, and what it cost."""
  wrong: str = ""
  """Who gave no usable review, and why."""


Submit = Callable[[Sequence[Request], float], "Future[list[Review]]"]
"""Asks as `Reviewer.submit` does."""


class Reviewer(Protocol):
  def submit(self, requests: Sequence[Request], deadline: float) -> "Future[list[Review]]":
    """One review per request, in order, always, within `deadline` seconds; failure is a status,
    never an exception."""
    ...

  def begin_step(self, step: int = 0) -> Submit:
    """What asks the questions of one training step, in as many parts as it takes; for reviewers
    that watch how steps fare, and have no other way to tell.

    Args:
      step: its number; 0 outside of training.
    """
    return self.submit

  def stats(self) -> dict[str, float]:
    """Metrics of what was done since the last call."""
    return {}

  def problem(self) -> str | None:
    """Why the run should end at this step, or None."""
    return None

  def trial(self, seconds: float) -> Trial:
    """Asks a question whose answer is known, whatever the cache has; for reviewers
    that may not be there."""
    return Trial()

  def failures(self) -> str:
    """Who failed and how, of late; empty where nobody did."""
    return ""

  def close(self) -> None:
    """Ends what is under way."""
    return None
