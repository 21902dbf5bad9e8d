"""Cutting a completion into steps."""

import re
import time
import types

import numpy as np
import pytest
import words
from hypothesis import given, settings
from hypothesis import strategies as st

from dca_jax import patterns
from dca_jax.episode import Episode, Outcome, Problem, Segment
from dca_jax.errors import UserError
from dca_jax.rollout import cut
from dca_jax.rollout.collect import Group, cut_steps, joined
from dca_jax.tasks.text import _STEPS
from dca_jax.tasks.tokenizer import load_tokenizer

PIECES = st.lists(st.text("ab;\n ", max_size=4).map(str.encode), max_size=12)


@settings(max_examples=300, deadline=None)
@given(
  pieces=PIECES,
  step_end=st.sampled_from([";", r"\n\n", r"[;\n]+", r"\s*", r"(?=a)", "a;|;b", r"\Z"]),
)
def test_spans_partition_the_tokens(pieces, step_end):
  spans = cut(pieces, step_end)
  assert [i for start, end in spans for i in range(start, end)] == list(range(len(pieces)))
  assert all(start < end for start, end in spans)


@settings(max_examples=300, deadline=None)
@given(pieces=PIECES, step_end=st.sampled_from([";", r"\n\n", r"[;\n]+", "a;|;b", r"\s*"]))
def test_a_step_ends_with_the_token_that_holds_the_last_character_of_a_match(pieces, step_end):
  owner = [i for i, piece in enumerate(pieces) for _ in piece]  # of every character
  last = {owner[m.end() - 1] for m in re.finditer(step_end, b"".join(pieces).decode()) if m[0]}
  expected = sorted(last | ({len(pieces) - 1} if pieces else set()))
  assert [end - 1 for _, end in cut(pieces, step_end)] == expected


@pytest.mark.parametrize(
  ("pieces", "spans"),
  [
    ([], []),
    (["$"], [(0, 1)]),
    (list("a0;c6;#6$"), [(0, 3), (3, 6), (6, 9)]),
    # The end token belongs to the last step; right after a boundary it is that step.
    (["a0;", "c6", ";", "$"], [(0, 1), (1, 3), (3, 4)]),
    # A boundary at the very end gives no empty step.
    (["a0;", "c6;"], [(0, 1), (1, 2)]),
    # Text that starts with the separator.
    ([";", "a", ";"], [(0, 1), (1, 3)]),
    ([";;", "a"], [(0, 1), (1, 2)]),
    # A boundary inside a token: the token is not cut, and the rest of it stays with the step that
    # ends there.
    (["a0;c", "6;#", "6$"], [(0, 1), (1, 2), (2, 3)]),
    (["a;b;c", "d"], [(0, 1), (1, 2)]),
    # Tokens without text of their own, such as half a character of several bytes.
    (["a", "", ";", "", "b"], [(0, 3), (3, 5)]),
  ],
)
def test_examples(pieces, spans):
  assert cut([piece.encode() for piece in pieces], ";") == spans


def test_a_separator_may_span_tokens():
  assert cut([b"one", b"\n", b"\n", b"two\n", b"three", b"$"], r"\n\n") == [(0, 3), (3, 6)]


# What a user's pattern may not do.


@pytest.mark.parametrize("steps", ["line", "paragraph", "sentence", r"\s", r"[^a-z]"])
def test_no_degenerate_text_takes_long(steps):
  """A token of 64 equal characters until there are no more tokens;
  a quadratic pattern takes a minute and more."""
  start = time.process_time()
  for text in (".", '."', '"', "\n", " ", "\n ", ". ", "。", "!?", "\t\n", "a.", ")"):
    pieces = [(text * 64)[:64].encode()] * 2048
    spans = cut(pieces, _STEPS.get(steps, steps), 4, 32)
    assert spans[0][0] == 0
    assert spans[-1][1] == 2048
  assert time.process_time() - start < 20


SENTENCES = st.text(".!?\"')]* \na。1", max_size=16)


@given(text=SENTENCES)
def test_a_sentence_ends_with_what_closes_it_and_the_space_after(text):
  quadratic = r"[.!?][.!?\"'”’)\]*]*\s+|[。！？]+\s*|\n\s*"
  ends = [len(text[: m.end()]) for m in re.finditer(quadratic, text)]
  expected = sorted({*ends, len(text)}) if text else []
  assert [end for _, end in cut([c.encode() for c in text], _STEPS["sentence"])] == expected


EXPONENTIAL = r"(?:[a-z]+[ ,]?)+[.!?]"


@pytest.fixture
def cut_texts(monkeypatch, tmp_path):
  """Cuts texts into steps as a training step does, with a short limit."""
  monkeypatch.setattr(patterns, "SECONDS", 0.05)
  tokenizer = load_tokenizer(words.save_tokenizer(tmp_path))

  def cut_texts(texts, step_end):
    episodes = [
      Episode(
        "",
        Problem(0, "", ""),
        (Segment(np.array(ids), True, np.zeros(len(ids))),),
        Outcome(0.0, False, False),
      )
      for ids in tokenizer(texts)["input_ids"]
    ]
    return cut_steps(
      episodes, tokenizer, types.SimpleNamespace(step_end=step_end, step_limits=(0, 0))
    )

  return cut_texts


def test_a_pattern_that_takes_for_ever_leaves_a_completion_whole_and_says_so(cut_texts, capsys):
  patterns.warn_slow.cache_clear()
  slow = "abcd" * 100 + " $"
  for _ in range(2):
    episodes, uncut = cut_texts(["one. two.", slow, "three."], EXPONENTIAL)
    texts = [tuple(step.text for step in episode.steps) for episode in episodes]
    assert texts == [("one.", " two."), (slow,), ("three.",)]
    assert (
      [episode.steps[-1].end for episode in episodes][1]
      == episodes[1].steps[0].end
      == len(episodes[1].tokens)
    )
    assert uncut == 1
  assert capsys.readouterr().err == (
    f"warning: task.steps: {EXPONENTIAL!r} took over 0.05 s on a completion, which then is a single"
    " step; write it without nested repetition\n"
  )


def test_a_pattern_that_takes_for_ever_on_all_completions_ends_the_run(cut_texts):
  slow = Group(0, np.zeros(1), 1, *cut_texts(["abcd" * 100 + " $"] * 2, EXPONENTIAL))
  fast = Group(1, np.zeros(1), 1, *cut_texts(["one."], EXPONENTIAL))
  task = types.SimpleNamespace(step_end=EXPONENTIAL)
  assert joined([fast, slow], [], task, 500).uncut == 2
  with pytest.raises(
    UserError, match=r"task\.steps: .* takes over 0\.05 s on every completion of a step"
  ):
    joined([slow], [], task, 500)


@pytest.mark.parametrize(
  ("least", "spans"),
  [
    (4, [(0, 2), (2, 4), (4, 7)]),
    (5, [(0, 4), (4, 7)]),
    (8, [(0, 4), (4, 7)]),
    (9, [(0, 7)]),
  ],
)
def test_a_step_has_a_least_number_of_characters_that_show(least, spans):
  pieces = [b"abcd", b" \n", b"efgh", b"\n", b"i", b"jklm", b"nop"]
  assert cut(pieces, "\n", least) == spans
