"""Episodes as the reader reads them: token ids in arrays of few shapes, and what is known of them.

P prompts of at most S tokens, B = P * G answers to them of at most T, with at most K steps.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dca_jax.episode import ROLES, Episode
from dca_jax.review import Request

_LEAST = 16
"""Smallest power of two for the size of an axis."""


class Labelled(NamedTuple):
  """A request, and what is known of its steps; what is empty is unknown."""

  request: Request
  roles: Sequence[str] = ()
  """Empty strings where a step's is unknown."""
  expected: Sequence[str] = ()
  """What each step should have been; empty strings where that is unknown."""
  values: Sequence[float] = ()
  """The chance of success before each step; not a number where it is unknown."""
  effects: Sequence[float] = ()
  """How much each step changed the chance of success; not a number where it is unknown."""


def by_checks(episodes: Iterable[Episode]) -> list[Labelled]:
  """What spot checks have measured of the steps of episodes."""
  found = []
  for e in (e for e in episodes if e.checks):
    checks = [e.checks.get(k) for k in range(len(e.steps))]
    effects = [check.effect if check else math.nan for check in checks]
    values = [float(np.mean(check.before)) if check else math.nan for check in checks]
    found.append(Labelled(Request.of(e), values=values, effects=effects))
  return found


class Texts(NamedTuple):
  """What is read; row p * G + g is answer g to prompt p."""

  prompts_PxS: np.ndarray
  prompt_lengths_P: np.ndarray
  tokens_BxT: np.ndarray
  """Answers, with room for one token more."""
  step_ids_BxT: np.ndarray
  """Which step a token belongs to, from 0; K where it belongs to none."""
  starts_BxK: np.ndarray
  """The place of each step's first token."""
  ends_BxK: np.ndarray
  """The place behind each step's last token."""
  steps_B: np.ndarray
  outcomes_B: np.ndarray
  """0 wrong, 1 right, 2 truncated."""


class Targets(NamedTuple):
  """What is known."""

  roles_BxK: np.ndarray
  """Numbers of `ROLES`, or -1."""
  tokens_BxT: np.ndarray
  """What should stand in the place of each token, or -1."""
  values_BxK: np.ndarray
  effects_BxK: np.ndarray


class Ids(NamedTuple):
  """An episode in token ids."""

  prompt: list[int]
  answer: list[int]
  spans: list[tuple[int, int]]
  """The places of each step's first token and of the one behind its last, in `answer`."""


def encoded(tokenizer: Any, requests: Sequence[Request]) -> list[Ids]:
  """The ids of requests. What was given before a step belongs to no step."""
  turns = [[(r.given_before(k), step) for k, step in enumerate(r.steps, 1)] for r in requests]
  texts = itertools.chain([r.problem for r in requests], *itertools.chain(*turns))
  distinct = [*dict.fromkeys(texts)]  # Steps are alike: most are encoded once for many.
  found = tokenizer(distinct, add_special_tokens=False)["input_ids"] if distinct else []
  ids_of = dict(zip(distinct, found, strict=True))
  read = []
  for request, own in zip(requests, turns, strict=True):
    spans, answer = [], list[int]()
    for given, step in own:
      answer += ids_of[given]
      start = len(answer)
      answer += ids_of[step]
      spans.append((start, len(answer)))
    read.append(Ids(ids_of[request.problem], answer, spans))
  return read


def fits(ids: Ids, limit: int) -> bool:
  """Whether an episode can be read at all, with at most `limit` tokens."""
  return bool(ids.prompt and ids.spans) and len(ids.prompt) + len(ids.answer) <= limit


def stacked(groups: Sequence[Sequence[tuple[Request, Ids]]], prompts: int, each: int) -> Texts:
  """The arrays of groups that share a prompt, filled up to so many `prompts` with so many answers
  `each` by empty ones."""
  everything = [ids for group in groups for _, ids in group]
  longest = _size(max(len(ids.prompt) for ids in everything))
  most = _size(max(len(ids.spans) for ids in everything))
  rows, room = prompts * each, _size(1 + max(len(ids.answer) for ids in everything))
  shape_BxT, shape_BxK = (rows, room), (rows, most)
  texts = Texts(
    np.zeros((prompts, longest), np.int32),
    np.ones(prompts, np.int32),
    np.zeros(shape_BxT, np.int32),
    np.full(shape_BxT, most, np.int32),
    np.zeros(shape_BxK, np.int32),
    np.zeros(shape_BxK, np.int32),
    np.ones(rows, np.int32),
    np.zeros(rows, np.int32),
  )
  for p, group in enumerate(groups):
    prompt = group[0][1].prompt
    texts.prompts_PxS[p, : len(prompt)], texts.prompt_lengths_P[p] = prompt, len(prompt)
    for row, (request, ids) in enumerate(group, p * each):
      texts.tokens_BxT[row, : len(ids.answer)] = ids.answer
      for k, (start, end) in enumerate(ids.spans):
        texts.step_ids_BxT[row, start:end] = k
        texts.starts_BxK[row, k], texts.ends_BxK[row, k] = start, end
      texts.steps_B[row] = len(ids.spans)
      texts.outcomes_B[row] = 2 if request.truncated else int(request.correct)
  return texts


def _size(least: int) -> int:
  """A power of two, or three quarters of one: every size is a program that has to be compiled."""
  above = max(_LEAST, 1 << (least - 1).bit_length())
  return above * 3 // 4 if least <= above * 3 // 4 else above


def targets(
  tokenizer: Any, labelled: Sequence[Labelled], read: Sequence[Ids], on: Texts
) -> Targets:
  """What is known of the episodes in `on`."""
  wanted = Targets(
    np.full(on.ends_BxK.shape, -1, np.int32),
    np.full(on.tokens_BxT.shape, -1, np.int32),
    np.full(on.ends_BxK.shape, np.nan, np.float32),
    np.full(on.ends_BxK.shape, np.nan, np.float32),
  )
  for row, (known, ids) in enumerate(zip(labelled, read, strict=True)):
    for k, role in enumerate(known.roles):
      wanted.roles_BxK[row, k] = ROLES.index(role) if role else -1
    wanted.values_BxK[row, : len(known.values)] = known.values
    wanted.effects_BxK[row, : len(known.effects)] = known.effects
    texts = [*known.expected]
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    for (start, end), right in zip(ids.spans, expected, strict=False):
      if len(right) == end - start:  # Otherwise no token stands in another one's place.
        wanted.tokens_BxT[row, start:end] = right
  return wanted
