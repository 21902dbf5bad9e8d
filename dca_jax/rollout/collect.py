"""One batch of episodes: sampled, verified, cut into steps.

Where several processes share a run, each has the problems of its own devices here, and no others.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dca_jax import patterns
from dca_jax.episode import Episode, Outcome, Problem, Step
from dca_jax.errors import UserError
from dca_jax.review.episodes import Asked
from dca_jax.rollout.config import RolloutConfig
from dca_jax.rollout.sampler import Sampler
from dca_jax.rollout.steps import cut, step_texts
from dca_jax.rollout.turns import Played, outcomes_of, play
from dca_jax.rollout.verify import neutral
from dca_jax.tasks import Task
from dca_jax.tasks.tokenizer import token_bytes


class Unfinished(NamedTuple):
  """C groups between two steps, some of whose samples may have ended; T tokens at most."""

  numbers_C: Any
  """Of their problems in the training split."""
  steps_CxG: Any
  """In which a sample's first token was written; 0 where there is none."""
  ends_CxG: Any
  """0 where a sample goes on, 1 where it has ended, 2 where it has and was truncated."""
  lengths_CxG: Any
  tokens_CxGxT: Any
  logprobs_CxGxT: Any
  """Under the policies that wrote them."""


class Rollout(NamedTuple):
  """One batch on the host: P problems, B = P * G episodes of up to T tokens."""

  episodes: list[Episode]
  """Episode p * G + g is number g of problem p."""
  prompts_PxS: np.ndarray
  prompt_lengths_P: np.ndarray
  tokens_BxT: np.ndarray
  sampled_BxT: np.ndarray
  """True where the policy wrote a token; these are trained on, and no others."""
  step_ids_BxT: np.ndarray
  """Which step a token belongs to, from 0; what was given has the number of the step before it."""
  logprobs_BxT: np.ndarray
  """Under the policy that sampled."""
  outcomes: list[Outcome]
  """Of everything sampled for this step, groups that were replaced included."""
  generated: int
  """Tokens sampled in this step, for such groups and for what is unfinished too."""
  uncut: int
  """Episodes that are a single step because `task.steps` took too long on them."""
  asked: list[Asked]
  """What the reviewer was asked about each group."""
  environment_seconds: float = 0.0
  """That environments took, of all episodes together."""
  unfinished: Unfinished | None = None
  """What goes on in the next step, with `rollout.carry`."""
  stale: int = 0
  """Tokens of the episodes that were written in earlier steps."""

  @property
  def rewards_B(self) -> np.ndarray:
    return np.array([episode.outcome.reward for episode in self.episodes], np.float32)

  @property
  def truncated_B(self) -> np.ndarray:
    return np.array([episode.outcome.truncated for episode in self.episodes])

  @property
  def trained_BxT(self) -> np.ndarray:
    return self.sampled_BxT & np.array([episode.trained for episode in self.episodes])[:, None]


class Group(NamedTuple):
  """The episodes of one problem."""

  place: int
  """Of its problem among those that were sampled with it."""
  prompt_S: np.ndarray
  prompt_length: int
  episodes: list[Episode]
  uncut: int
  """See `Rollout`."""
  kept: bool = False
  """Whether it is sure that the batch has it."""
  asked: Asked | None = None
  environment_seconds: float = 0.0

  @property
  def mixed(self) -> bool:
    return len({e.outcome.reward for e in self.episodes if e.outcome.judged}) > 1


# Problems that groups are refilled from are counted from here on. No run comes so far with the
# others, so an epoch of these has an order of its own, and a sample noise of its own.
_FURTHER = 2**31


def collect(
  sampler: Sampler, seed: int, step: int, params, ask: Callable[[Group], Group] = lambda g: g
) -> Rollout:
  """Samples, verifies and cuts the batch of `step`.

  Its problems are the next ones of the training split, whatever earlier steps were refilled with,
  so that all have their turn in every epoch. Groups are refilled from an order of their own.

  Args:
    ask: is given each group of the batch as soon as it is sure that the batch has it, while others
      may still be sampled; returns what the batch has in its place.

  Raises:
    UserError: not one episode could be cut into steps in time.
  """
  config, own = sampler.config, sampler.own
  refill = config.zero_variance == "refill"
  rounds = config.refill_rounds if refill else 1
  further = ((step - 1) * (rounds - 1) + i for i in range(rounds - 1))

  keep = functools.partial(ask_about, config, ask)
  groups: list[Group] = []
  for first in ((step - 1) * config.problems, *(_FURTHER + i * config.problems for i in further)):
    room = len(own) - sum(group.mixed for group in groups)
    if room <= 0:
      break
    sampled = [
      # Mixed groups go first, and at most as many as its place are before it.
      keep(group) if not refill or (group.mixed and group.place < room) else group
      for group in _sampled(sampler, first + own, (seed, step), params)
    ]
    groups += sorted(sampled, key=lambda group: group.place)
  # Mixed groups first, each kind in the order of its problems.
  kept = sorted(groups, key=lambda group: not group.mixed)[: len(own)] if refill else groups
  kept = [group if group.kept else keep(group) for group in kept]
  return joined(kept, groups, sampler.task, config.max_tokens)


def ask_about(config: RolloutConfig, ask: Callable[[Group], Group], group: Group) -> Group:
  """What the batch has in the place of a group, of which it is sure that it has it."""
  trains = group.mixed or config.zero_variance == "keep"
  marked = [dataclasses.replace(e, trained=trains and e.outcome.judged) for e in group.episodes]
  return ask(group._replace(episodes=marked, kept=True))


def _sampled(sampler: Sampler, numbers, noise: tuple[int, int], params) -> Iterator[Group]:
  """The groups of the training problems with these numbers, as they end."""
  size = sampler.config.group
  problems = [sampler.task.problem("train", (noise[0] << 32) + int(n)) for n in numbers]
  prompts = sampler.encode(problems)
  waiting: list[dict[int, Played]] = [{} for _ in problems]
  for attempt in play(sampler, params, problems, prompts, numbers, np.arange(size), noise):
    p, g = divmod(attempt.row, size)
    waiting[p][g] = attempt
    if len(waiting[p]) < size:
      continue
    own = [waiting[p].pop(g) for g in range(size)]
    yield group_of(sampler, p, problems[p], (prompts[0][p], prompts[1][p]), own, noise[1])


def group_of(
  sampler: Sampler,
  place: int,
  problem: Problem,
  prompt: tuple[np.ndarray, int],
  attempts: Sequence[Played],
  step: int,
) -> Group:
  """All attempts at a problem, verified and cut into steps."""
  outcomes = neutral(outcomes_of(sampler, [problem] * len(attempts), attempts))
  episodes = [
    Episode(f"{step}/{problem.id}/{g}", problem, attempt.segments, outcomes[g], seed=attempt.seed)
    for g, attempt in enumerate(attempts)
  ]
  cut_up = cut_steps(episodes, sampler.tokenizer, sampler.task)
  seconds = sum(attempt.seconds for attempt in attempts)
  return Group(place, *prompt, *cut_up, environment_seconds=seconds)


def cut_steps(episodes: Sequence[Episode], tokenizer, task: Task) -> tuple[list[Episode], int]:
  """The episodes with their steps, and how many could not be cut in time: these are one step."""
  done, uncut = [], 0
  for episode in episodes:
    steps: list[Step] = []
    slow = False
    end = 0
    for segment in episode.segments:
      start, end = end, end + len(segment.tokens)
      if segment.sampled:
        pieces = token_bytes(tokenizer, segment.tokens)
        try:
          spans = cut(pieces, task.step_end, *task.step_limits)
        except TimeoutError:
          patterns.warn_slow("task.steps", task.step_end, "then is a single step")
          spans, slow = [(0, len(pieces))], True
        texts = step_texts(pieces, spans)
        own = zip(spans, texts, strict=True)
        steps += [Step(start + a, start + b, text) for (a, b), text in own]
    uncut += slow
    done.append(dataclasses.replace(episode, steps=tuple(steps)))
  return done, uncut


def joined(kept: Sequence[Group], sampled: Sequence[Group], task: Task, most: int) -> Rollout:
  """The batch of the groups that are `kept` of those `sampled`, with up to `most` tokens an
  episode."""
  episodes = [episode for group in kept for episode in group.episodes]
  uncut = sum(group.uncut for group in kept)
  if uncut and uncut == len(episodes):
    said = f"{task.step_end!r} takes over {patterns.SECONDS:g} s on every completion of a step"
    raise UserError(f"task.steps: {said}; write it without nested repetition")
  everything = [episode for group in sampled for episode in group.episodes]
  return Rollout(
    episodes,
    np.stack([group.prompt_S for group in kept]),
    np.array([group.prompt_length for group in kept], np.int32),
    *rows_of(episodes, most),
    [episode.outcome for episode in everything],
    sum(len(s.tokens) for episode in everything for s in episode.segments if s.sampled),
    uncut,
    [group.asked for group in kept if group.asked],
    sum(group.environment_seconds for group in sampled),
  )


def rows_of(
  episodes: Sequence[Episode], most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Tokens, which of them were sampled, their steps, and their log-probabilities, each [B,
  most]."""
  shape = len(episodes), most
  tokens_BxT, sampled_BxT = np.zeros(shape, np.int32), np.zeros(shape, bool)
  step_ids_BxT, logprobs_BxT = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
  for i, episode in enumerate(episodes):
    end = 0
    for segment in episode.segments:
      start, end = end, end + len(segment.tokens)
      tokens_BxT[i, start:end], sampled_BxT[i, start:end] = segment.tokens, segment.sampled
      logprobs_BxT[i, start:end] = segment.logprobs
    for k, step in enumerate(episode.steps):
      step_ids_BxT[i, step.start : end] = k
  return tokens_BxT, sampled_BxT, step_ids_BxT, logprobs_BxT
