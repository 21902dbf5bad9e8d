"""Completions that go on from one step to the next, so that no step waits for its longest.

At any time as many problems are under way as a batch has, and `rollout.carry` more. A step ends as
soon as a batch of them is whole. What the others have written is kept with its log-probabilities,
as a part of the train state, and is read again with the parameters of the next step.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np

from dca_jax.episode import Segment
from dca_jax.rollout.collect import Group, Rollout, Unfinished, ask_about, group_of, joined
from dca_jax.rollout.config import RolloutConfig
from dca_jax.rollout.engine import Begun
from dca_jax.rollout.sampler import Sampler
from dca_jax.rollout.turns import Played


def first_unfinished(config: RolloutConfig) -> Unfinished | None:
  """What a run begins with: its first problems, of which nothing is written; None where no step
  leaves anything to the next."""
  if not config.carry:
    return None
  shape = config.carry, config.group
  none = jnp.zeros(shape, jnp.int32)
  tokens, logprobs = (jnp.zeros((*shape, config.max_tokens), t) for t in (jnp.int32, jnp.float32))
  return Unfinished(jnp.arange(config.carry), none, none, none, tokens, logprobs)


def collect_whole(
  sampler: Sampler,
  seed: int,
  step: int,
  params,
  ask: Callable[[Group], Group],
  before: Unfinished,
) -> Rollout:
  """The batch of `step`, as `collect` makes it: of the groups under way those that are whole first.

  Args:
    before: what the step before left unfinished.
  """
  config, own = sampler.config, sampler.own
  # The first problems of the run are among those that it begins with.
  fresh = ((step - 1) * config.problems + config.carry + own).astype(np.int32)
  blank = [np.zeros((len(own), *x.shape[1:]), x.dtype) for x in before[1:]]
  now = Unfinished(*map(np.concatenate, zip(before, (fresh, *blank), strict=True)))
  earlier_CxG = now.lengths_CxG.copy()
  problems = [sampler.task.problem("train", (seed << 32) + int(n)) for n in now.numbers_C]
  prompts = sampler.encode(problems)
  groups: list[Group] = []
  for p in _whole(sampler, (seed, step), params, prompts, now):
    if len(groups) == len(own):
      continue  # The next batch has it.
    played = [*map(_played, range(config.group), *(x[p] for x in now[2:]))]
    group = group_of(sampler, p, problems[p], (prompts[0][p], prompts[1][p]), played, step)
    ages = (step - now.steps_CxG[p]).tolist()
    aged = [dataclasses.replace(e, age=age) for e, age in zip(group.episodes, ages, strict=True)]
    groups.append(ask_about(config, ask, group._replace(episodes=aged)))
  groups.sort(key=lambda group: group.place)
  taken = [group.place for group in groups]
  return joined(groups, groups, sampler.task, config.max_tokens)._replace(
    generated=int(now.lengths_CxG.sum() - earlier_CxG.sum()),
    stale=int(earlier_CxG[taken].sum()),
    unfinished=Unfinished(*(np.delete(x, taken, 0) for x in now)),
  )


def _whole(
  sampler: Sampler, noise: tuple[int, int], params, prompts, now: Unfinished
) -> Iterator[int]:
  """The places of groups as they become whole, at least a batch of them; `now` has what is
  written."""
  (seed, step), enough = noise, len(sampler.own)
  tokens, logprobs, lengths = map(np.copy, (now.tokens_CxGxT, now.logprobs_CxGxT, now.lengths_CxG))
  begun = Begun(tokens, logprobs, lengths, now.ends_CxG > 0, enough)
  whole = np.flatnonzero(begun.ended_PxG.all(1)).tolist()
  yield from whole
  if len(whole) >= enough:
    return
  # A problem's number tells in which step it was begun, and no step has the number 0.
  wanted = sampler.wanted(prompts, now.numbers_C, np.arange(sampler.config.group))
  for sample in sampler.engine.stream(params, wanted, (seed, 0), begun=begun):
    place = p, _ = divmod(sample.row, sampler.config.group)
    n = len(sample.tokens)
    if n and not now.lengths_CxG[place]:
      now.steps_CxG[place] = step
    now.lengths_CxG[place], now.ends_CxG[place] = n, sample.ended + sample.truncated
    now.tokens_CxGxT[place][:n], now.logprobs_CxGxT[place][:n] = sample.tokens, sample.logprobs
    if sample.ended and now.ends_CxG[p].all():
      yield p


def _played(row: int, ends: int, length: int, tokens_T, logprobs_T) -> Played:
  return Played(row, (Segment(tokens_T[:length], True, logprobs_T[:length]),), bool(ends == 2))
