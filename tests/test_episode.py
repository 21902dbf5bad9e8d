"""One attempt with several turns: its line, its rows and its steps."""

import dataclasses
import json
import math

import numpy as np
import pytest
import tiny
from etils import epath

from dca_jax.episode import Check, Episode, Outcome, Problem, Review, Segment, Step
from dca_jax.rollout.collect import cut_steps, rows_of
from dca_jax.store.trajectories import read_trajectories, write_trajectories

TASK = tiny.make_config().task.open()
TOKENIZER = TASK.tokenizer()


def segment(text: str, sampled: bool) -> Segment:
  ids = TOKENIZER(text, add_special_tokens=False)["input_ids"] if text else []
  return Segment(np.array(ids, np.int32), sampled, -np.arange(1, len(ids) + 1, dtype=np.float32))


def episode(*texts: tuple[str, bool], name: str = "1/7/0") -> Episode:
  segments = tuple(segment(*text) for text in texts)
  outcome = Outcome(0.5, False, True, True, {"format": 1.0})
  return Episode(name, Problem(7, "a prompt", "3"), segments, outcome)


TURNS = episode(("a1;b2", True), (";a0;", False), ("b3;#3$", True))


def reviewed(turns: Episode) -> Episode:
  (whole,), _ = cut_steps([turns], TOKENIZER, TASK)
  n = len(whole.steps)
  return dataclasses.replace(
    whole,
    trained=False,
    checks={k: Check((0.0, 1.0), (1.0, 1.0, 0.0), 1) for k in range(n)},
    review=Review(
      *("ok", ("error",) * n, tuple(k / 2 for k in range(n))),
      model="m-1",
      reasons=tuple(f"because {k}" for k in range(n)),
    ),
    values=(0.25, *[math.nan] * n)[:n],
    advantage=-0.5,
    credit=tuple(k / 8 for k in range(len(whole.tokens))),
  )


def test_episodes_with_the_same_content_are_equal():
  ours, same = (
    reviewed(TURNS),
    reviewed(episode(("a1;b2", True), (";a0;", False), ("b3;#3$", True))),
  )
  assert ours == same
  assert ours.segments == same.segments
  assert ours != ours.id


@pytest.mark.parametrize(
  "change",
  [
    {"id": "1/7/1"},
    {"outcome": Outcome(0.5, True, True)},
    {"review": Review("none")},
    {"values": (math.nan, 0.25)},
    {"credit": ()},
    {"segments": TURNS.segments[:-1]},
    {"segments": (dataclasses.replace(TURNS.segments[0], sampled=False), *TURNS.segments[1:])},
    {"segments": (segment("a1;b3", True), *TURNS.segments[1:])},
    {
      "segments": (
        dataclasses.replace(TURNS.segments[0], logprobs=np.zeros(5, np.float32)),
        *TURNS.segments[1:],
      )
    },
  ],
  ids=lambda change: next(iter(change)),
)
def test_episodes_that_differ_are_not_equal(change):
  ours = reviewed(TURNS)
  assert dataclasses.replace(ours, **change) != ours


def spans(e: Episode) -> list[tuple[list[int], bool]]:
  return [(s.tokens.tolist(), s.sampled) for s in e.segments if len(s.tokens)]


@pytest.mark.parametrize(
  "texts",
  [
    [("a1;b2", True), (";a0;", False), ("b3;#3$", True)],
    [("a0;", False), ("b3;#3$", True)],
    [("b3;#3", True), ("a0;", False), ("b1", False)],
    # An environment that says nothing.
    [("a1;", True), ("", False), ("", False)],
    [("a1;b1;#0$", True)],
    [],
  ],
  ids=str,
)
def test_an_episode_comes_back_from_its_line(texts, tmp_path):
  ours = reviewed(episode(*texts))
  write_trajectories(epath.Path(tmp_path), 1, 0, [ours])
  (kept,) = read_trajectories(epath.Path(tmp_path), 1)
  for theirs in (kept, Episode.from_json(json.loads(json.dumps(ours.to_json())))):
    assert json.dumps(theirs.to_json()) == json.dumps(ours.to_json())
    assert spans(theirs) == spans(ours)
    assert theirs.tokens == ours.tokens
    assert (theirs.steps, theirs.outcome, theirs.text) == (ours.steps, ours.outcome, ours.text)
    assert theirs.review == ours.review
    np.testing.assert_array_equal(theirs.values, ours.values)


def test_steps_partition_the_turns_and_cross_none():
  (whole,), uncut = cut_steps([TURNS], TOKENIZER, TASK)
  assert uncut == 0
  # The first turn ends in the middle of a line, and so does its last step; what was given is in no
  # step.
  assert whole.steps == (
    Step(0, 3, "a1;"),
    Step(3, 5, "b2"),
    Step(9, 12, "b3;"),
    Step(12, 15, "#3$"),
  )


def test_rows_have_the_turns_where_they_stand():
  short = episode(("a1;#1$", True), name="1/7/1")
  episodes, _ = cut_steps([TURNS, short], TOKENIZER, TASK)
  tokens, sampled, ids, logprobs = rows_of(episodes, 18)
  assert [row[:n].tolist() for row, n in zip(tokens, (15, 6), strict=True)] == [
    e.tokens for e in episodes
  ]
  assert not tokens[0, 15:].any()
  assert not tokens[1, 6:].any()
  expected = np.zeros((2, 18), bool)
  expected[0, :5] = expected[0, 9:15] = expected[1, :6] = True
  assert np.array_equal(sampled, expected)
  # What was given belongs to the step before it.
  assert ids[0].tolist() == [0] * 3 + [1] * 6 + [2] * 3 + [3] * 3 + [0] * 3
  assert ids[1].tolist() == [0] * 3 + [1] * 3 + [0] * 12
  np.testing.assert_array_equal(logprobs[0, 9:15], -np.arange(1, 7))
  np.testing.assert_array_equal(logprobs[0, :5], -np.arange(1, 6))
