"""Verifiers on a corpus of spellings, and what no spelling may do."""

import json
import pathlib
import time
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dca_jax.tasks.verifiers import VERIFIERS, choice, exact, number, reference


def read_corpus(name: str) -> list[dict]:
  with pathlib.Path(__file__).with_name(name).open(encoding="utf-8") as lines:
    return [json.loads(line) for line in lines]


CORPUS = read_corpus("number_corpus.jsonl")


@pytest.mark.parametrize(
  "case", CORPUS, ids=[f"{i}-{c['text'][:24]!r}" for i, c in enumerate(CORPUS)]
)
def test_the_corpus(case):
  reference = number(case["reference"])
  assert reference is not None
  assert (number(case["text"]) == reference) == case["correct"]


def test_numbers_are_read_as_a_careful_human_reads_them_or_not_at_all():
  for case in read_corpus("number_readings.jsonl"):
    assert number(case["text"]) == (None if case.get("declined") else case["human"]), case


def test_a_numeral_of_a_hundred_digits_is_read_and_a_longer_one_is_none():
  assert number("#### " + "7" * 100) == "7" * 100
  assert number("#### " + "7" * 101) is None


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


@given(
  value=st.decimals(
    allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9
  )
)
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


SCIENTIFIC = [
  "{m}e{e}",
  "{m}E{e}",
  "{m}\\times10^{{{e}}}",
  "{m} \\cdot 10^{{{e}}}",
  "{m}×10^{e}",
  "{m} x 10^{e}",
]
SCIENTIFIC += ["{m}X10^{e}", "{m}*10^{e}", "{m}·10^({e})", "{m} * 10**{e}", "{m}×10{superscript}"]
SCIENTIFIC += ["{m} \\times 10^{{ {e} }}"]


@given(
  digits=st.integers(1, 10**6),
  places=st.integers(0, 8),
  power=st.integers(-20, 20),
  sign=st.sampled_from(["", "-", "−", "+"]),
  form=st.sampled_from(SCIENTIFIC),
  frame=st.sampled_from(FRAMES[1:5]),
)
def test_scientific_notation_in_every_usual_spelling(digits, places, power, sign, form, frame):
  mantissa = str(digits)[0] + ("." + str(digits)[1:] + "0" * places if places or digits > 9 else "")
  superscript = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
  text = frame.format(sign + form.format(m=mantissa, e=power, superscript=superscript))
  value = Fraction(mantissa) * Fraction(10) ** power
  assert number(text) == str(-value if sign in ("-", "−") else value), text


# What makes an expression of a number, on its left and on its right.
LEFT = [
  "2x+",
  "\\sqrt",
  "f(2)=g",
  "\\pi",
  "a_",
  "x^",
  "2^",
  "3\\cdot ",
  "7/3/",
  "\\pm ",
  "x<",
  "\\log ",
  "4:",
  "1-",
]
LEFT += [
  "\\frac{\\sqrt{2}}",
  "\\binom{5}",
  "at least ",
  "between 1 and ",
  "not ",
  "half of ",
  "square root of ",
  "x\\le",
]
RIGHT = [
  "x",
  "!",
  "^2",
  "_2",
  "i",
  "(x+1)",
  "\\pi",
  "+1",
  "\\pm 1",
  "-3",
  ":5",
  "/x",
  "\\sqrt 2",
  " to 1000",
  " or 1000",
]
RIGHT += [
  "ab",
  " mod 7",
  " squared",
  "^{10}",
  "\\ldots",
  "\\times 3",
  "nd",
  " feet 1000 inches",
  "%\\text{ of }1000",
  "≠x",
]


@given(
  value=st.one_of(st.integers(2, 999), st.decimals(0, 99, places=2)),
  around=st.sampled_from([(left, "") for left in LEFT] + [("", right) for right in RIGHT]),
  frame=st.sampled_from(
    ["#### {}", "The answer is {}", "\\boxed{{{}}}", "So it is $\\boxed{{{}}}$."]
  ),
)
def test_no_number_is_taken_out_of_an_expression(value, around, frame):
  assert number(frame.format(f"{around[0]}{value}{around[1]}")) is None


@given(
  value=st.integers(-(10**6), 10**6),
  before=st.sampled_from(["答案是", "ответ: ", "答えは、", "답은 ", "उत्तर ", "الجواب ", "总共"]),
  after=st.sampled_from(["", "个苹果", "円", " км", "км", "개", "元。", " रुपये"]),
)
def test_numbers_beside_letters_of_other_scripts_keep_sign_and_separators(value, before, after):
  for spelling in (str(value), f"{value:,}", f"{value}".replace("-", "−")):
    assert (
      number(f"{before}{spelling}{after}")
      == number(f"\\boxed{{{before}{spelling}{after}}}")
      == str(value)
    )


@given(
  value=st.integers(0, 9999),
  inside=st.sampled_from(["10 red + 10 blue", "see step 3", "not 7", "= 4 \\cdot 5"]),
)
def test_a_number_followed_by_its_explanation_in_brackets_is_that_number(value, inside):
  for frame in (*FRAMES[:5], "#### {}"):
    assert number(frame.format(f"{value} ({inside})")) == str(value)
    assert number(frame.format(f"{value} apples ({inside})")) == str(value)


NUMBERS = st.lists(st.integers(0, 999), min_size=3, max_size=30, unique=True)
SEPARATORS = st.sampled_from(
  [", ", " ", "; ", " or ", "\n", ", or ", " / ", "\n- ", " and ", "\t", ". ", " | "]
)


@given(numbers=NUMBERS, between=SEPARATORS, frame=st.sampled_from(FRAMES[:4]))
def test_a_list_of_numbers_is_no_answer(numbers, between, frame):
  # A statement ends with its line, and a sentence with its full stop; such a one holds one number.
  assume(frame[0] in "{\\" or ("\n" not in between and between != ". "))
  assert number(frame.format(between.join(map(str, numbers)))) is None


@settings(max_examples=300)
@given(
  text=st.text("0123456789.,/-+eE%$ \n\\{}boxedanswer is:#()ABCDE½²−", max_size=60),
  tail=st.integers(0, 99),
)
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
  start = time.process_time()
  for verifier in VERIFIERS.values():
    verifier(text)
  assert time.process_time() - start < 2


@pytest.mark.parametrize("depth", [0, 1, 4, 50, 5000])
def test_boxes_hold_braces_of_any_depth(depth):
  held = "\\sqrt{" * depth + "7" + "}" * depth
  text = f"So {{ and \\{{ we get \\boxed{{{held}}}, done in 3 steps."
  assert exact(text) == reference("exact", text) == held
  assert number(text) == reference("number", text) == (None if depth else "7")
  assert number(f"\\boxed{{{'{' * min(depth, 15)}7{'}' * min(depth, 15)}}}") == "7"
  wrapped = "B"
  for _ in range(min(depth, 50)):
    wrapped = f"\\textbf{{{wrapped}}}"
  assert choice(f"\\boxed{{{wrapped}}}") == "B"


@pytest.mark.parametrize(
  ("text", "answers"),
  [
    ("\\boxed{\\frac{1}{2}", [None, None, None]),  # Never closed.
    ("It is 7, so \\fbox{7", [None, None, None]),
    ("3 + 4 = 7\n#### ", [None, None, None]),
    ("3 + 4 = 7\n#### seven", [None, "seven", None]),
    ("It is 7 \\boxed{}", [None, None, None]),
    ("It is B and 7, so \\fbox{B}", [None, "b", "B"]),
    ("1 + 1\n#### 2\nChecked in 3 ways.", ["2", "2", None]),
    ("#### Step 1: 3 + 4\nso \\boxed{7}", ["7", "7", None]),
    ("7 apples", ["7", "7 apples", None]),
    ("A worked\nsolution", [None, "a worked solution", None]),
    ("3 and 4", [None, "3 and 4", None]),
  ],
)
def test_a_reference_is_what_is_marked_or_the_whole_text_and_never_a_part_of_it(text, answers):
  assert [reference(verifier, text) for verifier in ("number", "exact", "choice")] == answers


CHOICES = r"""B|(B)|b|(b)|B.|B)|**B**|Answer: B|The answer is (B).|The answer is B) 42|\boxed{B}
\boxed{\text{(B)}}|#### B|Option B|The correct option is B|The answer is option B.|the answer is b
The answer is $B$|B: because A is wrong|(B) 42|The answer is A. No: the answer is B.
The answer is B because a dog is one"""
NO_CHOICES = r"""F|A or B|The answer is A or B|The answer is (A), (B)|\boxed{A} \boxed{B}|A man has Bees
The answer is a dog|I think|The answer is not B|The answer isn't B|The answer is AB|The answer is B and C
The answer is A dog|\boxed{A, B}|The answer is A/B|E-mail|B-12 is a vitamin|ABCDE|A B C D E"""


@pytest.mark.parametrize("text", [*CHOICES.replace("\n", "|").split("|"), "Let us think.\nB"])
def test_a_choice_in_the_usual_spellings(text):
  assert choice(text) == "B"


@pytest.mark.parametrize(
  "text", ["", *NO_CHOICES.replace("\n", "|").split("|"), "A) 1\nB) 2\nC) 3"]
)
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
