"""Cutting a completion into steps."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dca_jax.rollout import cut

PIECES = st.lists(st.text("ab;\n ", max_size=4).map(str.encode), max_size=12)


@settings(max_examples=300, deadline=None)
@given(pieces=PIECES, step_end=st.sampled_from([";", r"\n\n", r"[;\n]+", r"\s*", r"(?=a)", "a;|;b", r"\Z"]))
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
    # A boundary inside a token: the token is not cut, and the rest of it stays with the step that ends there.
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
