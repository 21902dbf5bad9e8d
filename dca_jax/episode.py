"""The one value that flows: what happened in one attempt at a problem."""

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

ROLES = ("necessary", "redundant", "irrelevant", "error", "inherits", "repair")
"""What a step can do in an episode."""


@dataclasses.dataclass(frozen=True)
class Problem:
  """A prompt, its reference answer, and an id that is unique within its split."""

  id: int
  prompt: str
  answer: str
  rendered: str = ""
  """What the policy reads, where it is not the prompt itself: the prompt in a chat template."""
  row: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False, repr=False)
  """The row of the data set, for a verifier of the user's and for scores by a field of it."""


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What the verifier or the environment says of an episode: `reward` in [0, 1]; `truncated` when
  it ran out of tokens or turns."""

  reward: float
  correct: bool
  truncated: bool
  judged: bool = True
  """False where the verifier gave no verdict, or the environment failed; such an episode is not
  trained on."""
  parts: dict[str, float] = dataclasses.field(default_factory=dict)
  """Numbers that the verifier reports besides the reward, by name."""
  progress: tuple[float, ...] = ()
  """The environment's score of the state after each turn; not a number where it gave none."""


@dataclasses.dataclass(frozen=True)
class Review:
  """What a reviewer says of each step; where `status` is not `ok` nothing,
  and credit is uniform."""

  status: str
  roles: tuple[str, ...] = ()
  weights: tuple[float, ...] = ()
  values: tuple[float, ...] = ()
  """The chance of success before each step is written, told without a look at the rest; what
  `potential` credit reads. A reviewer gives roles with weights, or values, or both."""
  sure: bool = True
  suspicious: bool = False
  """The reviewer says that the answer speaks to it. Only counted: whatever hung on it, the answer
  could bring about."""
  model: str = ""
  """The model that said so, as its provider names the version."""
  cached: bool = False
  """Whether it came from the cache, and cost nothing."""
  reasons: tuple[str, ...] = ()
  """Why, of each step, where the reviewer says so. Only kept."""
  rewrite: tuple[int, str] | None = None
  """Of a rewriter: how many steps it keeps, and what it would have written behind them."""

  def misfit(self, steps: int) -> str:
    """Why a review of status `ok` does not fit an episode of so many steps; empty where it does."""
    for name in ("roles", "values", "reasons"):
      if (said := len(getattr(self, name))) not in (0, steps):
        return f"{_count(said, name)} for {_count(steps, 'steps')}"
    if len(self.weights) != len(self.roles):
      return f"{_count(len(self.weights), 'weights')} for {_count(len(self.roles), 'roles')}"
    if strange := [role for role in self.roles if role not in ROLES]:
      near = difflib.get_close_matches(strange[0], ROLES, 1, 0.5)
      hint = f"; did you mean {near[0]}?" if near else ""
      return f"{strange[0]!r} is no role ({', '.join(ROLES)}){hint}"
    if self.rewrite and not 0 <= self.rewrite[0] < steps:
      return f"a rewrite that keeps {_count(self.rewrite[0], 'steps')} of {steps}"
    return "" if self.roles or self.values or self.rewrite else "it says nothing"

  def checked(self, steps: int) -> "Review":
    """This review, or one of status `invalid` where it does not fit an episode of so many steps."""
    return Review("invalid") if self.status == "ok" and self.misfit(steps) else self


def _count(number: int, things: str) -> str:
  return f"{number} {things.removesuffix('s') if number == 1 else things}"


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
  """Tokens that one side wrote: the policy (`sampled`), or its environment."""

  tokens: np.ndarray
  sampled: bool
  logprobs: np.ndarray
  """Of each token under the policy that sampled it; anything for what was given."""
  text: str = ""
  """What was given, without a chat template's words around it."""

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, Segment):
      return NotImplemented
    return (
      (self.sampled, self.text) == (other.sampled, other.text)
      and np.array_equal(self.tokens, other.tokens)
      and np.array_equal(self.logprobs, other.logprobs)
    )

  __hash__ = None  # type: ignore[assignment]  # Arrays may change.


class Step(NamedTuple):
  """A span of sampled tokens, counted from the end of the prompt; it never crosses a segment."""

  start: int
  end: int
  text: str


class Check(NamedTuple):
  """A spot check of a step: rewards of answers that the policy went on to write from before the
  step, and from after it. After the last step there is nothing to write, and the reward is the
  episode's own."""

  before: tuple[float, ...]
  after: tuple[float, ...]
  common: int = 0
  """So many answers, the first ones on both sides, came through both boundaries."""

  @property
  def effect(self) -> float:
    """How much the step changed the chance of success, measured without bias."""
    return float(np.mean(self.after) - np.mean(self.before))

  @property
  def variance(self) -> float:
    """Of `effect`, estimated from what each answer adds to it; not a number with a single one."""
    if min(map(len, self[:2])) < 2:
      return math.nan
    sides = [np.array(side, float) for side in self[:2]]
    before, after = ((x - x.mean()) / np.sqrt(len(x) * (len(x) - 1)) for x in sides)
    alone = np.concatenate([before[self.common :], after[self.common :]])
    both = after[: self.common] - before[: self.common]
    return float((both**2).sum() + (alone**2).sum())


class Rewrite(NamedTuple):
  """A better answer to an episode's problem, which somebody began and the policy ended."""

  tokens: tuple[int, ...]
  """Of the whole answer."""
  start: int
  """The first token with which it leaves the episode; what is learnt begins there."""
  forced: int
  """The first token that the policy wrote by itself."""
  text: str
  before: tuple[float, ...]
  """Rewards of answers that the policy went on to write from where the episode left the rewrite;
  the episode's own, where that was wrong."""
  after: tuple[float, ...]
  """The same from behind what was forced."""


@dataclasses.dataclass(frozen=True, eq=False)
class Episode:
  """One attempt. What is not known at the beginning is filled in as it goes through a training
  step."""

  id: str
  """`step/problem/sample`: the same after a resume."""
  problem: Problem
  segments: tuple[Segment, ...]
  """What follows the prompt."""
  outcome: Outcome
  steps: tuple[Step, ...] = ()
  """They partition the sampled tokens."""
  trained: bool = True
  age: int = 0
  """Training steps since its first token was written; above 0 only with `rollout.carry`."""
  checks: Mapping[int, Check] = dataclasses.field(default_factory=dict)
  """Spot checks, by the number of the step."""
  review: Review = Review("none")
  values: Sequence[float] = ()
  """Of the prefixes before each step, as credit read them; not a number where there is none."""
  advantage: float = 0.0
  """The episode's own, before credit moved it."""
  credit: Sequence[float] = ()
  """The advantage of every token."""
  seed: int | None = None
  """Of its environment, if it has one: begun with it again, it has the same hidden randomness."""
  rewrite: Rewrite | None = None
  """What was learnt in its place, beside it."""

  def __eq__(self, other: object) -> bool:
    """Whether all is the same; a value that there is not is the same as another."""
    if not isinstance(other, Episode):
      return NotImplemented
    return self._comparable() == other._comparable()

  def _comparable(self) -> dict[str, Any]:
    outcome = dataclasses.replace(self.outcome, progress=())
    values, progress = (_known(own) for own in (self.values, self.outcome.progress))
    same = {"outcome": outcome, "values": values, "progress": progress}
    return {**vars(self), **same, "credit": list(self.credit)}

  @property
  def tokens(self) -> list[int]:
    return [token for segment in self.segments for token in segment.tokens.tolist()]

  @property
  def text(self) -> str:
    return "".join(step.text for step in self.steps)

  def to_json(self) -> dict[str, Any]:
    """A line of a run's trajectories. `given` are the spans of tokens that were not sampled, and
    their texts."""
    return {
      "id": self.id,
      "problem": self.problem.id,
      "prompt": self.problem.prompt,
      "answer": self.problem.answer,
      "tokens": self.tokens,
      "given": [[s, e, own.text] for s, e, own in self.spans() if not own.sampled],
      "steps": [self._step_to_json(k) for k in range(len(self.steps))],
      **dataclasses.asdict(self.outcome),
      "progress": _known(self.outcome.progress),
      "review": self.review.status,
      "model": self.review.model,
      "trained": self.trained,
      "age": self.age,
      "advantage": self.advantage,
      "credit": list(self.credit),
      **({} if self.seed is None else {"seed": self.seed}),
      **({"rewrite": self.rewrite._asdict()} if self.rewrite else {}),
    }

  def spans(self) -> Iterator[tuple[int, int, Segment]]:
    """Each segment with its first place and the one after its last."""
    end = 0
    for segment in self.segments:
      start, end = end, end + len(segment.tokens)
      yield start, end, segment

  def before(self, place: int) -> list[Segment]:
    """What stands before a place, the segment around it cut off there."""
    return [
      dataclasses.replace(
        own, tokens=own.tokens[: place - start], logprobs=own.logprobs[: place - start]
      )
      for start, end, own in self.spans()
      if start < place or end == place
    ]

  def given(self) -> tuple[str, ...]:
    """What was given directly before each step; empty where nothing was."""
    said = {end: own.text for _, end, own in self.spans() if not own.sampled}
    return tuple(said.get(step.start, "") for step in self.steps)

  def _step_to_json(self, k: int) -> dict[str, Any]:
    line: dict[str, Any] = self.steps[k]._asdict()
    if self.review.roles:
      line |= {"role": self.review.roles[k], "weight": self.review.weights[k]}
    if self.review.reasons:
      line["reason"] = self.review.reasons[k]
    if len(self.values) and not math.isnan(self.values[k]):
      line["value"] = self.values[k]
    if k in self.checks:
      before, after, common = self.checks[k]
      line |= {"before": list(before), "after": list(after), "common": common}
    return line

  @classmethod
  def from_json(cls, line: dict[str, Any]) -> "Episode":
    """The inverse of `to_json`, except for log-probabilities, which are not kept.

    Raises:
      KeyError, TypeError: it is no such line.
    """
    outcome = Outcome(**{field.name: line[field.name] for field in dataclasses.fields(Outcome)})
    progress = tuple(math.nan if x is None else x for x in outcome.progress)
    outcome = dataclasses.replace(outcome, progress=progress)
    steps, told = line["steps"], all("role" in step for step in line["steps"])
    review = Review(
      line["review"],
      tuple(step["role"] for step in steps) if told else (),
      tuple(step["weight"] for step in steps) if told else (),
      model=line["model"],
      reasons=tuple(step.get("reason", "") for step in steps if any("reason" in s for s in steps)),
    )
    return cls(
      line["id"],
      Problem(line["problem"], line["prompt"], line["answer"]),
      tuple(_segments(line["tokens"], line["given"])),
      outcome,
      tuple(Step(step["start"], step["end"], step["text"]) for step in steps),
      line["trained"],
      line["age"],
      {
        k: Check(tuple(step["before"]), tuple(step["after"]), step.get("common", 0))
        for k, step in enumerate(steps)
        if "before" in step
      },
      review,
      tuple(step.get("value", math.nan) for step in steps),
      line["advantage"],
      tuple(line["credit"]),
      line.get("seed"),
      _rewrite(line.get("rewrite")),
    )


def _rewrite(line: Mapping[str, Any] | None) -> Rewrite | None:
  if line is None:
    return None
  said: dict[str, Any] = {k: tuple(x) if isinstance(x, list) else x for k, x in line.items()}
  return Rewrite(**said)


def _known(values: Sequence[float]) -> list[float | None]:
  """Numbers, and None in the place of what is none."""
  return [None if math.isnan(value) else value for value in values]


def _segments(tokens: list[int], given: list[list[Any]]) -> Iterator[Segment]:
  """Segments of tokens, of which the spans `given` were not sampled."""

  def segment(start: int, end: int, sampled: bool, text: str = "") -> Segment:
    own = np.array(tokens[start:end], np.int32)
    return Segment(own, sampled, np.zeros(len(own), np.float32), text)

  place = 0
  for start, end, text in given:
    if place < start:
      yield segment(place, start, True)
    yield segment(start, end, False, text)
    place = end
  if place < len(tokens):
    yield segment(place, len(tokens), True)
