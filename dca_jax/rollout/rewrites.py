"""Verified rewrites: better answers that somebody proposed, and the policy has borne out.

Nobody's word is taken that a rewrite is better. What of it the policy could not have known is
forced, from there the policy goes on, and the verifier judges where it ends:

* Of a wrong answer the first step in which the rewrite differs is forced, because it is the
  correction. The policy has to come to the right result from there.
* Of a right answer only the token with which the rewrite leaves it is forced. A shortcut must be
  one that the policy can take: were the next result given to it, leaving out whatever leads there
  would always seem to do no harm. It has to succeed at least as often as from the token that the
  answer itself had there, and to come to a right result in fewer tokens.

What is learnt is the answer that the policy wrote, from where it leaves the episode on; nothing of
the proposal behind what was forced.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dca_jax.episode import Episode, Review, Rewrite
from dca_jax.review.rewriter import Proposing
from dca_jax.rollout.collect import Rollout
from dca_jax.rollout.prefixes import Continues, Further, Prefix, Spent, continued
from dca_jax.rollout.sampler import Sampler
from dca_jax.rollout.steps import cut
from dca_jax.tasks.tokenizer import plain_ids, text_of, token_bytes

_CHARACTERS = 64
"""Of a proposal that are read for each token that an answer may have."""


class Proposals(NamedTuple):
  """What came of asking in one step."""

  proposed: int
  """Rewrites that the policy went on from."""
  spent: Spent


class Fork(NamedTuple):
  """Where a rewrite leaves an episode."""

  forced: np.ndarray
  """Tokens of the rewrite's beginning, from which the policy goes on."""
  start: int
  """The first of them that the episode has not."""
  own: np.ndarray
  """The episode's tokens up to the first one that the rewrite has not."""


def drawn(rewriter: Proposing, seed: int, episodes: Sequence[Episode], group: int) -> list[bool]:
  """Which episodes a rewriter is asked about: a function of the seed, of what an episode is called,
  and of the outcomes."""
  chosen = [False] * len(episodes)
  for first in range(0, len(episodes), group):
    worth = [
      (np.random.default_rng([seed, 1, *episodes[i].id.encode()]).random(), i)
      for i in range(first, first + group)
      if episodes[i].outcome.judged and rewriter.improves(episodes[i].outcome.correct)
    ]
    for _, i in sorted(worth)[: rewriter.most]:
      chosen[i] = True
  return chosen


def verified(
  answers: int, policy: Continues, rollout: Rollout, proposals: Sequence[Review]
) -> tuple[Rollout, Proposals]:
  """The batch with the rewrites that the policy has borne out. All processes call it together.

  Args:
    answers: that the policy writes from each beginning.
  """
  episodes, group = [*rollout.episodes], len(rollout.episodes) // len(rollout.prompt_lengths_P)
  forks = {
    i: fork
    for i, (episode, said) in enumerate(zip(episodes, proposals, strict=True))
    if said.rewrite and (fork := forked(policy.sampler, episode, *said.rewrite))
  }

  def ahead(i: int, tokens: np.ndarray) -> Prefix:
    return Prefix(i // group * group, tokens.astype(rollout.tokens_BxT.dtype).tobytes())

  begun = [ahead(i, fork.forced) for i, fork in forks.items()]
  begun += [ahead(i, fork.own) for i, fork in forks.items() if _goes_on(episodes[i], fork)]
  begun = [*dict.fromkeys(begun)]
  further, spent = continued(policy, rollout, begun, answers)
  found = dict(zip(begun, further, strict=True))
  for i, fork in forks.items():
    own, episode = found.get(ahead(i, fork.own), []), episodes[i]
    before = [f.outcome.reward for f in own if f.outcome.judged]
    rewrite = _borne_out(
      policy.sampler,
      episode,
      fork,
      before if _goes_on(episode, fork) else [episode.outcome.reward],
      found[ahead(i, fork.forced)],
    )
    episodes[i] = dataclasses.replace(episode, rewrite=rewrite)
  return rollout._replace(episodes=episodes), Proposals(len(forks), spent)


def _goes_on(episode: Episode, fork: Fork) -> bool:
  """Whether it has to be measured how good the episode itself was where the rewrite leaves it."""
  return episode.outcome.correct and len(fork.own) < len(episode.tokens)


def forked(sampler: Sampler, episode: Episode, keep: int, text: str) -> Fork | None:
  """Where `text`, behind the first `keep` steps, leaves the episode; None where it does not, or
  leaves no room. Nothing in it is special, whatever it spells."""
  most, tokenizer, tokens = sampler.config.max_tokens, sampler.tokenizer, np.array(episode.tokens)
  begin = episode.steps[keep].start
  said = plain_ids(tokenizer, text[: _CHARACTERS * most])
  new = np.array([i for i in said if i < sampler.rows][:most], int)
  ours, theirs = token_bytes(tokenizer, new), token_bytes(tokenizer, tokens[begin:])
  leaves, left = _leaves(ours, theirs), _leaves(theirs, ours)
  end = leaves
  if episode.outcome.correct:
    leaves *= left > 0  # What only adds to an answer does not shorten it.
  elif leaves:
    try:
      spans = cut(ours, sampler.task.step_end, *sampler.task.step_limits)
    except TimeoutError:
      return None
    end = next(end for _, end in spans if end >= leaves)
  forced = np.concatenate([tokens[:begin], new[:end]])
  stops = (
    string.encode() in b"".join(token_bytes(tokenizer, forced)) for string in sampler.config.stop
  )
  if not leaves or len(forced) >= most or any(stops):
    return None
  return Fork(forced, begin + leaves - 1, tokens[: begin + left])


def _leaves(pieces: Sequence[bytes], others: Sequence[bytes]) -> int:
  """How many pieces it takes until they are no beginning of what the others make; 0 where all are
  one."""
  other, place = b"".join(others), 0
  for n, piece in enumerate(pieces, 1):
    if not other.startswith(piece, place) or place + len(piece) > len(other):
      return n
    place += len(piece)
  return 0


def _borne_out(
  sampler: Sampler, episode: Episode, fork: Fork, before: Sequence[float], after: Sequence[Further]
) -> Rewrite | None:
  """The first of the answers `after` that is better than the episode, if they keep up with those
  `before`."""
  judged = [f for f in after if f.outcome.judged]
  rewards = [f.outcome.reward for f in judged]
  right = [f for f in judged if f.outcome.correct and not f.outcome.truncated]
  if episode.outcome.correct:
    room = len(episode.tokens) - len(fork.forced)
    right = [f for f in right if len(f.tokens) < room]
    if not before or not rewards or np.mean(rewards) < np.mean(before):
      return None
  if not right:
    return None
  tokens = np.concatenate([fork.forced, right[0].tokens]).astype(int)
  return Rewrite(
    tuple(tokens.tolist()),
    fork.start,
    len(fork.forced),
    text_of(sampler.tokenizer, tokens),
    tuple(before),
    tuple(rewards),
  )


def rows_of_rewrites(
  rewriter: Proposing, episodes: Sequence[Episode], group: int, most: int
) -> tuple[np.ndarray, np.ndarray]:
  """Tokens and their weights, each [E, most]; see `learner.loss.Rewrites`."""
  rows = len(episodes) // group * rewriter.most
  tokens_ExT, weights_ExT = np.zeros((rows, most), np.int32), np.zeros((rows, most), np.float32)
  for p in range(len(episodes) // group):
    kept = [e.rewrite for e in episodes[p * group : (p + 1) * group] if e.rewrite]
    for row, rewrite in enumerate(kept, p * rewriter.most):
      tokens_ExT[row, : len(rewrite.tokens)] = rewrite.tokens
      weights_ExT[row, rewrite.start : rewrite.forced] = rewriter.forced_weight
      weights_ExT[row, rewrite.forced : len(rewrite.tokens)] = rewriter.weight
  return tokens_ExT, weights_ExT
