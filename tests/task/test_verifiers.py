"""Verifiers on a corpus of spellings, and what no spelling may do."""

import json
import pathlib
import time
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dca_jax.task.verifiers import VERIFIERS, choice, exact, number

CORPUS = [json.loads(line) for line in pathlib.Path(__file__).with_name("number_corpus.jsonl").open(encoding="utf-8")]


@pytest.mark.parametrize("case", CORPUS, ids=[f"{i}-{c['text'][:24]!r}" for i, c in enumerate(CORPUS)])
def test_the_corpus(case):
  reference = number(case["reference"])
  assert reference is not None
  assert (number(case["text"]) == reference) == case["correct"]


FRAMES = [
  "{}",
  "#### {}",
  "The answer is {}.",
  "\\boxed{{{}}}",
  "So it is $\\boxed{{{}}}$.",
  "3 + 4 = {}",
  "**Answer:** {}",
]


@given(value=st.fractions(max_denominator=10**6), frame=st.sampled_from(FRAMES))
def test_every_fraction_is_read_back(value, frame):
  assert number(frame.format(value)) == str(value)


@given(value=st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_a_decimal_means_the_same_in_every_spelling(value):
  expected = str(Fraction(value))
  sign, size = ("-", -value) if value < 0 else ("", value)
  for spelling in (
    f"{value}",
    f"{value:,}",
    f"{sign}${size:,}",
    f"{value}".replace("-", "−"),
    f"{value:,} km",
    f"{value}e0",
  ):
    assert number(f"The answer is {spelling}.") == expected, spelling


NUMBERS = st.lists(st.integers(0, 999), min_size=3, max_size=30, unique=True)
SEPARATORS = st.sampled_from([", ", " ", "; ", " or ", "\n", ", or ", " / ", "\n- ", " and ", "\t", ". ", " | "])


@given(numbers=NUMBERS, between=SEPARATORS, frame=st.sampled_from(FRAMES[:4]))
def test_a_list_of_numbers_is_no_answer(numbers, between, frame):
  # A statement ends with its line, and a sentence with its full stop; such a one holds one number.
  assume(frame[0] in "{\\" or ("\n" not in between and between != ". "))
  assert number(frame.format(between.join(map(str, numbers)))) is None


@settings(max_examples=300)
@given(text=st.text("0123456789.,/-+eE%$ \n\\{}boxedanswer is:#()ABCDE½²−", max_size=60), tail=st.integers(0, 99))
def test_one_text_gives_one_answer_and_no_error(text, tail):
  for verifier in VERIFIERS.values():
    found = verifier(text)
    assert found is None or isinstance(found, str)
  # What is stated last stands, whatever came before.
  assert number(f"{text}\n#### {tail}") == str(tail)
  assert number(f"{text}\n\nThe answer is {tail}.") == str(tail)


SLOW = r"""1,111|answer is |answer is 1|\boxed{|\boxed{1}|\boxed{{|1 |\frac{1|1/|not |#### |9|(|{|1^|1 1/1 |or |A) |[
10^|√|-|\|.|^|, |1-|0.|=|1=|$|1e|x|π|*|**|\text|\text{|\,|{,}|1{,}"""
PARTS = [*SLOW.replace("\n", "|").split("|"), "\n", " .\n", "\n ", "answer" + " " * 200]


@pytest.mark.parametrize("part", PARTS)
def test_no_text_takes_long(part):
  text = part * (20_000 // len(part))
  start = time.perf_counter()
  for verifier in VERIFIERS.values():
    verifier(text)
  assert time.perf_counter() - start < 2


CHOICES = r"""B|(B)|b|(b)|B.|B)|**B**|Answer: B|The answer is (B).|The answer is B) 42|\boxed{B}
\boxed{\text{(B)}}|#### B|Option B|The correct option is B|The answer is option B.|the answer is b
The answer is $B$|B: because A is wrong|(B) 42|The answer is A. No: the answer is B."""
NO_CHOICES = r"""F|A or B|The answer is A or B|The answer is (A), (B)|\boxed{A} \boxed{B}|A man has Bees
The answer is a dog|I think|The answer is not B|The answer isn't B|The answer is AB|The answer is B and C
\boxed{A, B}|The answer is A/B|E-mail|B-12 is a vitamin|ABCDE|A B C D E"""


@pytest.mark.parametrize("text", [*CHOICES.replace("\n", "|").split("|"), "Let us think.\nB"])
def test_a_choice_in_the_usual_spellings(text):
  assert choice(text) == "B"


@pytest.mark.parametrize("text", ["", *NO_CHOICES.replace("\n", "|").split("|"), "A) 1\nB) 2\nC) 3"])
def test_no_single_choice(text):
  assert choice(text) is None


@pytest.mark.parametrize(
  ("text", "answer"),
  [
    ("Paris", "paris"),
    ("  The  answer is\tPARIS. ", "paris"),
    ("The answer is St. Louis.", "st. louis"),
    ("\\boxed{New York}", "new york"),
    ("So:\n#### New\u00a0York", "new york"),
    ("two\nlines", "two lines"),
    ('"Yes"', "yes"),
    ("ＡＢＣ", "abc"),
    ("Answer: ÉCOLE", "école"),
    ("", None),
    (" . ", None),
  ],
)
def test_exact(text, answer):
  assert exact(text) == answer
