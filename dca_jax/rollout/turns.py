"""Whole attempts at problems: of one turn, or of several with an environment between them.

What the policy wrote is never encoded again: an episode that goes on is a new request to the
engine, whose prompt is all tokens so far. Environments work in threads, or on an event loop, while
the engine decodes other episodes. What is sampled does not depend on who answers first.
"""

import asyncio
import contextlib
import dataclasses
import inspect
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, cast

import numpy as np

from dca_jax.episode import Outcome, Problem, Segment
from dca_jax.errors import UserError, reason
from dca_jax.rollout.engine import Sample, Wanted
from dca_jax.rollout.sampler import Sampler
from dca_jax.rollout.verify import verify
from dca_jax.tasks.environments import Acting, Environment, Frame, Turn
from dca_jax.tasks.tokenizer import plain_ids, text_of


class Played(NamedTuple):
  """An attempt that has ended."""

  row: int
  """p * G + g, of sample g of problem p."""
  segments: tuple[Segment, ...]
  truncated: bool
  outcome: Outcome | None = None
  """What the environment says; None where the verifier is to say it."""
  seconds: float = 0.0
  """That its environment took."""
  seed: int | None = None
  """Of its environment, if it has one."""

  @property
  def tokens(self) -> list[int]:
    return [token for segment in self.segments for token in segment.tokens.tolist()]

  @property
  def sampled(self) -> int:
    """Tokens that the policy wrote."""
    return self.sampled_after(0)

  def sampled_after(self, place: int) -> int:
    """Those of them that are not before a place."""
    end = written = 0
    for segment in self.segments:
      start, end = end, end + len(segment.tokens)
      written += max(0, end - max(start, place)) if segment.sampled else 0
    return written


def play(
  sampler: Sampler,
  params: Any,
  problems: Sequence[Problem],
  prompts: tuple[np.ndarray, np.ndarray],
  ids: Sequence[int] | np.ndarray,
  numbers: np.ndarray,
  noise: Sequence[int],
) -> Iterator[Played]:
  """Attempts at problems, as they end; see `Sampler.stream`."""
  if not hasattr(sampler.task, "environment"):
    for sample in sampler.stream(params, prompts, ids, numbers, noise):
      yield Played(sample.row, (_written(sample),), sample.truncated)
    return
  numbers_PxG = np.broadcast_to(numbers, (len(problems), numbers.shape[-1]))
  seats = []
  for (p, g), n in np.ndenumerate(numbers_PxG):
    seed = np.random.SeedSequence([*noise, int(ids[p]), int(n) % 2**32]).generate_state(1)[0]
    row, prompt = p * numbers_PxG.shape[1] + g, prompts[0][p, : prompts[1][p]]
    seats.append(Seat(row, problems[p], prompt, int(ids[p]), int(n), int(seed)))
  yield from seated(sampler, params, seats, noise)


def seated(
  sampler: Sampler, params: Any, seats: Sequence["Seat"], noise: Sequence[int]
) -> Iterator[Played]:
  """Attempts with environments, as they end.

  Raises:
    UserError: all are to begin, and none could.
  """
  with contextlib.closing(Turns(sampler, seats)) as turns:
    if (first := turns.take(wait=True)) is not None:
      for sample in sampler.engine.stream(params, first, noise, turns):
        turns.heard(sample)
        yield from turns.ended()
    yield from turns.ended()
    turns.tell_of_failures()


def outcomes_of(
  sampler: Sampler, problems: Sequence[Problem], attempts: Sequence[Played]
) -> list[Outcome]:
  """What attempts have come to: the word of their environments, or the verifier's."""
  pairs = [*zip(problems, attempts, strict=True)]
  judged = iter(
    verify(
      sampler.task,
      [(p, last_text(sampler, a), a.truncated) for p, a in pairs if a.outcome is None],
    )
  )
  return [a.outcome or next(judged) for a in attempts]


def last_text(sampler: Sampler, attempt: Played) -> str:
  """What the policy wrote last."""
  written = [s.tokens for s in attempt.segments if s.sampled]
  return text_of(sampler.tokenizer, written[-1]) if written else ""


def _written(sample: Sample) -> Segment:
  return Segment(sample.tokens, True, sample.logprobs)


@dataclasses.dataclass(eq=False)
class Seat:
  """An episode that is being played."""

  row: int
  problem: Problem
  prompt: np.ndarray
  id: int
  number: int
  """With `id` what tells its noise from that of others; see `Wanted`."""
  seed: int
  """Of its environment."""
  ahead: list[Segment] | None = None
  """What is to be played again before the policy goes on; its last segment may be the beginning of
  a turn. None where the episode is new."""
  environment: Environment | None = None
  segments: list[Segment] = dataclasses.field(default_factory=list)
  turns: list[Turn] = dataclasses.field(default_factory=list)
  seconds: float = 0.0

  @property
  def tokens(self) -> np.ndarray:
    """Of the whole episode, the prompt's included."""
    return np.concatenate([self.prompt, *(segment.tokens for segment in self.segments)])


class Turns:
  """The episodes of a batch at their environments; what the engine is to go on with (`Further`)."""

  def __init__(self, sampler: Sampler, seats: Sequence[Seat]):
    self._sampler, self._task = sampler, cast(Acting, sampler.task)
    self._calls = Calls(self._task.at_once, self._task.turn_seconds)
    self._answers: queue.SimpleQueue[tuple[Seat, Said]] = queue.SimpleQueue()
    self._pending = 0
    self._new = all(seat.ahead is None for seat in seats)
    self._asked: list[Seat] = []  # By the engine's rows.
    self._ended: list[Played] = []
    self._failures: list[str] = []
    self._open: list[Environment] = []
    for seat in seats:
      seat.environment = self._task.environment(seat.problem, seat.seed)
      self._open.append(seat.environment)
      self._ask(seat, seat.environment.begin, seat.problem)

  def expected(self) -> int:
    """See `Further`."""
    return self._pending

  def take(self, wait: bool) -> Wanted | None:
    """See `Further`. Where only one environment may work at a time, all are waited for."""
    ready: list[Seat] = []
    while self._pending:
      patient = self._task.at_once == 1 or (wait and not ready)
      try:
        seat, said = self._answers.get(patient)
      except queue.Empty:
        break
      self._pending -= 1
      seat.seconds += said.seconds
      if self._goes_on(seat, said.answer):
        ready.append(seat)
    ready.sort(key=lambda seat: seat.row)
    self._asked += ready
    return self._wanted(ready) if ready else None

  def heard(self, sample: Sample) -> None:
    """Takes what the engine gave: the next turn of an episode, or the rest of it."""
    seat, turn = self._asked[sample.row], _written(sample)
    if seat.segments and seat.segments[-1].sampled:
      begun = seat.segments.pop()
      parts = zip((begun.tokens, begun.logprobs), (turn.tokens, turn.logprobs), strict=True)
      tokens, logprobs = map(np.concatenate, parts)
      turn = Segment(tokens, True, logprobs)
    seat.segments.append(turn)
    if sample.truncated:
      self._end(seat, truncated=True)
    else:
      self._step(seat)

  def ended(self) -> Iterator[Played]:
    """The episodes that have ended since the last call."""
    done, self._ended = self._ended, []
    yield from done

  def close(self) -> None:
    for environment in self._open:
      self._calls.call(None, environment.close)
    self._calls.close()

  def tell_of_failures(self) -> None:
    """Raises UserError where all episodes are new and no environment could begin."""
    if not self._failures:
      return
    said = f"{len(self._failures)} environments failed, the first because of: {self._failures[0]}"
    if self._new and not self._asked:
      raise UserError(f"no episode could begin: {said}; run again to go on")
    what = "episodes" if self._new else "further answers"
    print(f"warning: {said}; their {what} are left out", file=sys.stderr)

  def _step(self, seat: Seat) -> None:
    """Hands the last turn of the policy to its environment."""
    assert seat.environment
    text = text_of(self._sampler.tokenizer, seat.segments[-1].tokens)
    self._ask(seat, seat.environment.step, text)

  def _ask(self, seat: Seat, method: Callable[..., Any], what: Any) -> None:
    self._pending += 1
    self._calls.call(lambda said: self._answers.put((seat, said)), method, what)

  def _goes_on(self, seat: Seat, answer: Any) -> bool:
    """Takes an environment's answer; whether it is the policy's turn."""
    begins = not seat.segments
    if isinstance(answer, Exception):
      return self._failed(seat, reason(answer))
    turn = Turn(answer) if begins else answer
    if wrong := _mistake(turn):
      return self._failed(seat, f"{wrong} in its answer {answer!r:.200}")
    given = self._given(seat, turn.observation or "")
    seat.turns += [] if begins else [turn]
    said = [given] if len(given.tokens) or not begins else []
    if seat.ahead is not None:
      return self._goes_on_as_before(seat, said, turn.done)
    fits = len(given.tokens) < self._left(seat)
    if begins and not fits:
      return self._failed(seat, "what it said first leaves no room; see rollout.max_tokens")
    if turn.done or not fits or len(seat.turns) == self._task.max_turns:
      self._end(seat, truncated=not turn.done)
      return False
    seat.segments += said
    return True

  def _goes_on_as_before(self, seat: Seat, said: list[Segment], done: bool) -> bool:
    """The same where an episode is played again, as long as its environment says the same."""
    assert seat.ahead is not None
    if done or said != [segment for segment in seat.ahead[:1] if not segment.sampled]:
      return self._failed(seat, "played again with the same seed, it does not answer the same")
    turn = seat.ahead[len(said) : len(said) + 1]
    seat.segments += said + turn
    seat.ahead = seat.ahead[len(said + turn) :]
    if seat.ahead:  # What was said to this turn.
      self._step(seat)
      return False
    seat.ahead = None
    return True

  def _failed(self, seat: Seat, why: str) -> bool:
    self._failures.append(why)
    self._end(seat, failed=True)
    return False

  def _given(self, seat: Seat, text: str) -> Segment:
    frame = self._task.between if seat.segments else self._task.opening
    last = seat.segments[-1].tokens[-1:].tolist() if seat.segments else []
    ids = observed(self._sampler.tokenizer, frame, text, last)
    own = np.array([i for i in ids if i < self._sampler.rows], np.int32)
    return Segment(own, False, np.zeros(len(own), np.float32), text)

  def _left(self, seat: Seat) -> int:
    """Tokens that an episode may still have."""
    return self._sampler.config.max_tokens - len(seat.tokens) + len(seat.prompt)

  def _end(self, seat: Seat, truncated: bool = False, failed: bool = False) -> None:
    last = seat.turns[-1].outcome if seat.turns else Turn().outcome
    errors = {"tool_errors": float(sum(turn.error for turn in seat.turns))}
    outcome = dataclasses.replace(
      last,
      truncated=truncated or last.truncated,
      judged=last.judged and not failed,
      parts={**last.parts, **errors},
      progress=tuple(float(turn.score) for turn in seat.turns),
    )
    segments, truncated = tuple(seat.segments), outcome.truncated
    played = Played(seat.row, segments, truncated, outcome, seat.seconds, seat.seed)
    self._ended.append(played)
    assert seat.environment
    self._open.remove(seat.environment)
    self._calls.call(None, seat.environment.close)

  def _wanted(self, seats: Sequence[Seat]) -> Wanted:
    config = self._sampler.config
    prompts = np.zeros((len(seats), config.max_prompt_tokens + config.max_tokens), np.int32)
    lengths = np.array([len(seat.tokens) for seat in seats], np.int32)
    for row, seat in zip(prompts, seats, strict=True):
      row[: len(seat.tokens)] = seat.tokens
    return Wanted(
      prompts,
      lengths,
      np.array([seat.id for seat in seats]),
      np.array([[seat.number] for seat in seats]),
      np.array([self._left(seat) for seat in seats]),
      lengths - np.array([len(seat.prompt) for seat in seats], np.int32),
    )


def _mistake(turn: Any) -> str:
  """What is wrong with an answer; empty where nothing is."""
  if not isinstance(turn, Turn):
    return "there is no Turn"
  if not isinstance(turn.observation, str | None):
    return "the observation is no text"
  sound = isinstance(turn.outcome, Outcome) and 0 <= turn.outcome.reward <= 1
  return "" if sound else "there is no Outcome with a reward from 0 to 1"


def observed(tokenizer: Any, frame: Frame, text: str, last: Sequence[int] = ()) -> list[int]:
  """The tokens of an observation in its frame; nothing in its text is special.

  Args:
    last: the token that ended the turn, which is not said again.
  """
  before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in frame)
  if before[:1] == [*last]:
    before = before[1:]
  return [*before, *plain_ids(tokenizer, text), *after]


class Said(NamedTuple):
  """What came of a call: what it returned, or the Exception that it ended with."""

  answer: Any
  seconds: float


class Calls:
  """Calls of functions in threads, and of coroutines on an event loop, with a limit of time.

  A thread that hangs is left alone; it keeps neither others nor the process from ending.
  """

  def __init__(self, at_once: int, seconds: float):
    self._room, self._seconds = asyncio.Semaphore(at_once), seconds
    self._loop = asyncio.new_event_loop()
    threading.Thread(target=self._run, daemon=True).start()

  def call(
    self, told: Callable[[Said], None] | None, function: Callable[..., Any], *arguments: Any
  ) -> None:
    """Returns at once; `told` hears what came of it."""
    work = self._limited(told, function, arguments)
    asyncio.run_coroutine_threadsafe(work, self._loop)

  def close(self) -> None:
    """Returns at once; what was called has as much time as ever."""
    asyncio.run_coroutine_threadsafe(self._finish(), self._loop)

  def _run(self) -> None:
    self._loop.run_forever()
    self._loop.close()

  async def _finish(self) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*others, return_exceptions=True)
    self._loop.stop()

  async def _limited(
    self,
    told: Callable[[Said], None] | None,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
  ) -> None:
    async with self._room:
      start = time.perf_counter()
      answer: Any
      try:
        async with asyncio.timeout(self._seconds):
          if inspect.iscoroutinefunction(function):
            answer = await function(*arguments)
          else:
            answer = await asyncio.wrap_future(_in_thread(function, arguments))
      except TimeoutError:
        answer = TimeoutError(f"no answer within task.turn_seconds ({self._seconds:g} s)")
      except Exception as error:  # It raises what it likes.
        answer = error
      if told:
        told(Said(answer, time.perf_counter() - start))


def _in_thread(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Future:
  future: Future = Future()

  def work() -> None:
    try:
      answer, error = function(*arguments), None
    except BaseException as raised:  # SystemExit would end the loop.
      answer, error = None, raised if isinstance(raised, Exception) else RuntimeError(repr(raised))
    if future.set_running_or_notify_cancel():  # Somebody still waits for it.
      future.set_exception(error) if error else future.set_result(answer)

  threading.Thread(target=work, daemon=True).start()
  return future
