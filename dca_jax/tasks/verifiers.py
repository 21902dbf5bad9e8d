r"""Verifiers: pure functions from a text to the final answer that it gives, in a normal form, or
None.

A completion is correct where its answer equals the reference's. Only one answer of a text is ever
compared, so hedging is never more than a guess. It is the last one that the text states, in
`\boxed{}`, after `####`, or after "the answer is" and the like; several in one statement, or in
boxes on one line, are no answer. A text that states none is read by each verifier in its own way.
"""

import pathlib
import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from dca_jax.tasks import numbers
from dca_jax.tasks.numbers import COMPARISON, EXPRESSION, LINE, MARK, RELATION, VALUE, WORD, Item

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_HASH = re.compile(r"####([^\n]*)")
_CUE = re.compile(
  r"\b(?:answer|correct (?:option|choice))[\s*_]*"
  r"(?::|=|(?:is|was|are|equals|comes to|(?:would|should|must|will) be)\b)[\s*_:]*",
  re.IGNORECASE,
)
_LINE = re.compile(r"[^\n]{0,500}")
_SENTENCE = re.compile(r"(?:[^\n.!?]|[.!?](?!\s|$)){0,500}[.!?]?")
# Between the members of a list.
_AMONG = (
  r"[\s.,;/|&+*()•-]*(?:(?:or|and|to|then|maybe|perhaps|possibly|alternatively|through)\b[\s,;(]*)*"
)
_LIST = {
  "or",
  "and",
  "nor",
  "to",
  "then",
  "maybe",
  "perhaps",
  "possibly",
  "alternatively",
  "through",
}
# After such a word a further number explains the first.
_EXPLAINS = {
  "as",
  "at",
  "because",
  "by",
  "each",
  "every",
  "for",
  "from",
  "given",
  "if",
  "in",
  "not",
  "on",
  "per",
}
_EXPLAINS |= {"since", "so", "that", "when", "where", "which", "with"}
_NEGATIVE = re.compile(
  r"no|not|never|none|nothing|cannot|neither|nor|without|undefined|impossible|\w+n't", re.IGNORECASE
)
_WRAPPERS = re.compile(
  r"\\textcolor\s*\{[^{}]*\}|\\(?:text|math)[a-z]*"
  r"|\\(?:operatorname|mbox|boxed|fbox|underline)|[{}$*_`~]"
  r"|\\[,!;: ()\[\]]"
)


class Statement(NamedTuple):
  text: str
  marked: bool
  """By a box or hashes."""


def _boxes(text: str) -> list[tuple[int, int, str]]:
  """Where each outermost box begins and ends, and what it holds; one whose brace is never closed is
  none."""
  opened: list[int] = []
  closing: dict[int, int] = {}
  for m in _BRACE.finditer(text):
    if m[0] == "{":
      opened.append(m.start())
    elif m[0] == "}" and opened:
      closing[opened.pop()] = m.start()
  boxes: list[tuple[int, int, str]] = []
  for m in _BOX.finditer(text):
    end = closing.get(m.end())
    if end is not None and not (boxes and m.start() < boxes[-1][1]):
      boxes.append((m.start(), end + 1, text[m.end() + 1 : end]))
  return boxes


def _marked(text: str, wanted: str) -> list[tuple[int, Statement]]:
  """What stands in boxes or after hashes, and where it begins."""
  found: list[tuple[int, Statement]] = []
  last = 0
  for start, end, held in _boxes(text):  # Those on one line are one statement.
    before = found.pop()[1].text if found and "\n" not in text[last:start] else held
    found.append((start, Statement(held if before == held else f"{before}, {held}", True)))
    last = end
  # A line with words at its beginning is a heading, unless nothing follows it.
  for m in _HASH.finditer(text):
    ends = m.end() == len(text.rstrip())
    if re.match(rf"\W*{wanted}", m[1]) or (ends and re.search(wanted, m[1])):
      found.append((m.start(), Statement(m[1], True)))
  return found


def _stated(text: str, wanted: str, extent: re.Pattern[str]) -> Statement | None:
  """The last answer that the text states; `wanted` is what it must hold."""
  found = _marked(text, wanted)
  for m in reversed(list(_CUE.finditer(text))):
    slot = extent.match(text, m.end())
    if slot and re.search(wanted, slot[0]):
      found.append((m.start(), Statement(slot[0], False)))
      break
  return max(found)[1] if found else None


def reference(verifier: str, text: str) -> str | None:
  """The answer that a data set gives: the last one that is marked by a box or hashes, or else the
  whole text.

  None where there is a mark but no answer in it, and where the verifier cannot read the answer for
  sure.
  """
  text = given_answer(text)
  # A bare answer is held to what a statement is held to: it may not be ambiguous.
  return VERIFIERS[verifier](f"#### {text}") if text else None


def given_answer(text: str) -> str:
  """The text of a data set's answer: see `reference`; empty where there is none."""
  if "####" in text or "\\boxed" in text or "\\fbox" in text:
    text = max(_marked(text, r"\S"), default=(0, Statement("", True)))[1].text
  return " ".join(text.split())


def formula(text: str) -> str:
  """The answer that a text marks by a box or hashes, in a box, as `math` reads it; empty where
  there is none. It would find a formula in any sentence, whatever that says of it."""
  said = max(_marked(text, r"\S"), default=(0, Statement("", True)))[1].text
  return boxed(said) if len(said) <= _LONGEST and "####" not in said else ""


def boxed(text: str) -> str:
  """A text in a box; empty where its braces would make it more than one."""
  box = f"\\boxed{{{text}}}"
  return box if [(start, end) for start, end, _ in _boxes(box)] == [(0, len(box))] else ""


def number(text: str) -> str | None:
  """A number, exactly, as an integer or a fraction in lowest terms: `1,000.50` is 2001/2, and 0.75
  is 3/4.

  Units, currency and a percent sign are left out: 50% is 50, not 0.5. Rounded numbers differ from
  exact ones. Expressions, dates, times, bounds and what could be read in two ways are no numbers
  (see `numbers`). A text that states no answer gives its last number, unless that is the end of a
  list.
  """
  stated = _stated(text, numbers.DIGIT, _SENTENCE)
  if stated is None:
    value = _last(numbers.read(_end(text)))
  elif len(stated.text) > _LONGEST:
    value = None
  else:
    items = numbers.read(("" if stated.marked else "\n") + " ".join(stated.text.split()))
    value = None if stated.marked else _leading(items)
    value = _single(items) if value is None else value
  return None if value is None else str(value)


_LONGEST = 1000  # Characters of a statement that is read for a number.


def _end(text: str) -> str:
  """The line of a text that holds its last digit, and what stands around it."""
  found = re.search(numbers.DIGIT, text[::-1])
  place = len(text) - found.start() if found else 0
  return "\n" + text[max(0, place - _LONGEST) : place + _LONGEST] if found else ""


def _next(items: list[Item], kinds: tuple[str, ...]) -> int | None:
  return next((i for i, item in enumerate(items) if item.kind in kinds), None)


def _leading(items: list[Item]) -> Fraction | None:
  """The value that a sentence begins with, if what follows explains it and adds no other."""
  first = _next(items, (VALUE, EXPRESSION, WORD, COMPARISON))
  if first is None or items[first].kind != VALUE:
    return None
  rest = items[first + 1 :]
  further = _next(rest, (VALUE, EXPRESSION))
  between = [item.text.lower() for item in rest[:further] if item.kind == WORD]
  explained = bool(_EXPLAINS.intersection(between)) and between[-1] not in _LIST
  return items[first].value if further is None or explained else None


def _single(items: list[Item]) -> Fraction | None:
  """The one value that a statement gives, after the last equals sign if there is any."""
  denied = any(item.kind == WORD and _NEGATIVE.fullmatch(item.text) for item in items)
  if denied or any(item.kind == COMPARISON for item in items):
    return None
  sides: list[list[Item]] = [[]]
  for item in items:
    if item.kind == RELATION:
      sides.append([])
    else:
      sides[-1].append(item)
  *labels, last = sides
  values = {item.value for item in last if item.kind == VALUE}
  if len(values) != 1 or any(item.kind == EXPRESSION for item in last):
    return None
  for side in labels:  # Names and calculations, and nothing that gives another value.
    listed = any(item.kind == WORD and item.text.lower() in _LIST for item in side)
    calculated = any(item.kind == EXPRESSION or item.text in ("+", "-", "*", "/") for item in side)
    others = {item.value for item in side if item.kind in (VALUE, EXPRESSION)} - values
    if others and (listed or not calculated):
      return None
  return values.pop()


def _last(items: list[Item]) -> Fraction | None:
  """The last value of a text, unless an expression follows it, it is denied, or it is the end of a
  list."""
  numeric = [i for i, item in enumerate(items) if item.kind in (VALUE, EXPRESSION)]
  if not numeric or items[numeric[-1]].kind == EXPRESSION:
    return None
  *before, last = numeric
  previous = before[-1] if before else last
  if items[previous] != items[last] and _listed(items[previous], items[previous + 1 : last]):
    return None
  for item in reversed(items[:last]):
    if item.kind in (VALUE, EXPRESSION, LINE) or item.text in (".", ","):
      break
    if item.kind == WORD and _NEGATIVE.fullmatch(item.text):
      return None
  return items[last].value


def _listed(first: Item, between: list[Item]) -> bool:
  """Whether what stands between two numbers makes them members of a list, or parts of one
  quantity."""
  words = [item.text.lower() for item in between if item.kind == WORD]
  among = all(item.text in ".,;/|&+-*()•" for item in between if item.kind == MARK)
  listed = among and all(word in _LIST for word in words)
  if any(item.kind == RELATION for item in between):  # As in x = 5, y = 3, or 1/3 = 0.33.
    said = between[0].text.lower() in {",", ";", *_LIST}
    names = all(len(word) == 1 for word in words if word not in _LIST)
    return (said and names) or (first.kind == VALUE and len(between) == 1)
  unit = len(words) == len(between) == 1 and words[0] not in _EXPLAINS  # As in 5 feet 3 inches.
  same_sentence = not any(item.kind == LINE or item.text == "." for item in between)
  return listed or unit or bool(words and words[-1] in _LIST and same_sentence)


# An "A" that begins a phrase.
_ARTICLE = r"(?<=A)\s+(?!(?:because|since|as|is|so|for|with|which)\b)[a-z]"


def choice(text: str) -> str | None:
  """One of the letters A to E; a text that states no answer gives the one letter that stands as
  `B`, `(B)` or `B)` at the beginning of a line."""
  stated = _stated(text, r"\(?[A-Ea-e]\b", _SENTENCE)
  if stated is None:
    lines = re.findall(r"(?mi)^[^\w\n]{0,9}(?:option )?\(?([A-E])(?:[).:]|[^\w\n]{0,9}$)", text)
    return lines[0].upper() if len(set(lines)) == 1 else None
  slot = unicodedata.normalize("NFKC", _WRAPPERS.sub(" ", stated.text)).strip()
  m = re.match(
    r"\W*(?:(?:option|choice)\W*)?(?:([A-E])(?![\w'’])(?!"
    + _ARTICLE
    + r")|\(([a-e])\)|([a-e])\W*$)",
    slot,
  )
  if m is None or re.match(_AMONG + r"(?:[A-E](?![\w'’])|[a-e]\))", slot[m.end() :]):
    return None
  return str(m[1] or m[2] or m[3]).upper()


def exact(text: str) -> str | None:
  """The answer stated, to the end of its line, or the whole text: compatibility-normalised (NFKC),
  case folded, runs of white space made one space, and without quotes, asterisks, dollar signs and
  full stops around it."""
  stated = _stated(text, r"\S", _LINE)
  folded = unicodedata.normalize("NFKC", stated.text if stated else text).casefold()
  return " ".join(folded.split()).strip(" \"'“”‘’`*$.") or None


VERIFIERS: dict[str, Callable[[str], str | None]] = {
  "number": number,
  "exact": exact,
  "choice": choice,
}

# Those that are called in processes of their own, as a user's are.
JUDGED = {"math": f"{pathlib.Path(__file__).with_name('math_answers.py')}:verify"}
