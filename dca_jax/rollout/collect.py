"""One batch of episodes: sampled, verified, cut into steps.

Where several processes share a run, each has the problems of its own devices here, and no others.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dca_jax import patterns
from dca_jax.devices.processes import gather, put
from dca_jax.episode import Episode, Outcome, Problem, Segment, Step
from dca_jax.errors import UserError
from dca_jax.rollout.prompts import encode_prompts
from dca_jax.rollout.sampler import Sampler, Samples
from dca_jax.rollout.steps import cut, cut_at_stops, step_texts
from dca_jax.rollout.verify import attempts, neutral, verify
from dca_jax.tasks import Task
from dca_jax.tasks.tokenizer import token_bytes


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
  """Tokens sampled for this step, for such groups too."""
  uncut: int
  """Episodes that are a single step because `task.steps` took too long on them."""

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

  prompt_S: np.ndarray
  prompt_length: int
  episodes: list[Episode]

  @property
  def mixed(self) -> bool:
    return len({e.outcome.reward for e in self.episodes if e.outcome.judged}) > 1


# Problems that groups are refilled from are counted from here on. No run comes so far with the
# others, so an epoch of these has an order of its own, and a sample noise of its own.
_FURTHER = 2**31


def collect(sampler: Sampler, seed: int, step: int, task: Task, tokenizer, params) -> Rollout:
  """Samples, verifies and cuts the batch of `step`.

  Its problems are the next ones of the training split, whatever earlier steps were refilled with,
  so that all have their turn in every epoch. Groups are refilled from an order of their own.
  """
  config = sampler.config
  refill = config.zero_variance == "refill"
  rounds = config.refill_rounds if refill else 1
  key, own = step_key(seed, step, sampler.end_ids_E.sharding), sampler.own(config.problems)
  sampled: list[Group] = []
  further = ((step - 1) * (rounds - 1) + i for i in range(rounds - 1))
  starts = ((step - 1) * config.problems, *(_FURTHER + i * config.problems for i in further))
  for numbers in (first + own for first in starts):
    problems = [task.problem("train", (seed << 32) + int(n)) for n in numbers]
    limit, rows = config.max_prompt_tokens, sampler.policy.rows
    prompts, lengths = encode_prompts(tokenizer, problems, limit, rows)
    samples = sampler(params, prompts, lengths, numbers, key, np.arange(config.group))
    samples = cut_at_stops(config.stop, tokenizer, samples)
    episodes = list(_verified(samples, step, problems, task, tokenizer))
    for p, (prompt_S, length) in enumerate(zip(prompts, lengths, strict=True)):
      mine = episodes[p * config.group : (p + 1) * config.group]
      sampled.append(Group(prompt_S, length, mine))
    enough = sum(group.mixed for group in sampled) >= len(own)
    if refill and all(gather("refill", enough)):
      break
  # Mixed groups first, each kind in the order of its problems.
  kept = sorted(sampled, key=lambda group: not group.mixed)[: len(own)] if refill else sampled
  trained = [group.mixed or config.zero_variance == "keep" for group in kept]
  episodes, uncut = cut_steps(
    [
      dataclasses.replace(episode, trained=trains and episode.outcome.judged)
      for group, trains in zip(kept, trained, strict=True)
      for episode in group.episodes
    ],
    tokenizer,
    task,
  )
  everything = [episode for group in sampled for episode in group.episodes]
  return Rollout(
    episodes,
    np.stack([group.prompt_S for group in kept]),
    np.array([group.prompt_length for group in kept], np.int32),
    *rows_of(episodes, config.max_tokens),
    [episode.outcome for episode in everything],
    sum(len(s.tokens) for episode in everything for s in episode.segments if s.sampled),
    uncut,
  )


def _verified(
  samples: Samples, step: int, problems: Sequence[Problem], task: Task, tokenizer
) -> Iterator[Episode]:
  group = len(samples.tokens_BxT) // len(problems)
  outcomes = verify(task, attempts(tokenizer, problems, samples))
  for i, (tokens, n, _, logprobs) in enumerate(zip(*samples, strict=True)):
    if i % group == 0:
      judged = neutral(outcomes[i : i + group])
    problem, segment = problems[i // group], Segment(tokens[:n], True, logprobs[:n])
    yield Episode(f"{step}/{problem.id}/{i % group}", problem, (segment,), judged[i % group])


def cut_steps(episodes: Sequence[Episode], tokenizer, task: Task) -> tuple[list[Episode], int]:
  """The episodes with their steps, and how many could not be cut in time.

  Raises:
    UserError: none could.
  """
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
  if uncut and uncut == len(done):
    said = f"{task.step_end!r} takes over {patterns.SECONDS:g} s on every completion of a step"
    raise UserError(f"task.steps: {said}; write it without nested repetition")
  return done, uncut


def rows_of(
  episodes: Sequence[Episode], most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Tokens, which of them were sampled, their steps, and their log-probabilities, each [B, most]."""
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


_fold_in = jax.jit(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))


def step_key(seed: int, step: int, sharding) -> jax.Array:
  """The key of a step; `sharding` says on which devices it lies."""
  return _fold_in(*put((np.uint32(seed), np.uint32(step)), sharding))
