r"""Verifiers: pure functions from a text to the final answer that it gives, in a normal form, or None.

A completion is correct where its answer equals the reference's. Only one answer of a text is ever compared, so hedging
is never more than a guess. It is the last one that the text states, in `\boxed{}`, after `####`, or after "the answer
is" and the like; several in one statement, or in boxes on one line, are no answer. A text that states none is read by
each verifier in its own way.
"""

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}")
_HASH = re.compile(r"####([^\n]*)")
_CUE = re.compile(
  r"\b(?:answer|correct (?:option|choice))[\s*_]*"
  r"(?::|=|(?:is|was|are|equals|comes to|(?:would|should|must|will) be)\b)[\s*_:]*",
  re.IGNORECASE,
)
_LINE = re.compile(r"[^\n]{0,500}")
_SENTENCE = re.compile(r"(?:[^\n.!?]|[.!?](?!\s|$)){0,500}")
# Between the members of a list.
_AMONG = r"[\s.,;/|&+*()•-]*(?:(?:or|and|to|then|maybe|perhaps|possibly|alternatively|through)\b[\s,;(]*)*"
_NOT = re.compile(r"(?:\bnot|n't|\bnever|≠|!=|\\neq?)\s*(?:be|equal to|=)?\s*$", re.IGNORECASE)

_LATEX = (
  (r"(?<=\d)(?:\{,\}|\\[,!]|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ""),  # Thousands.
  (r"[\u00bc-\u00be\u2150-\u215e]", lambda m: " " + unicodedata.normalize("NFKC", m[0])),
  (r"[\u00b2\u00b3\u00b9\u2070-\u207b]+", lambda m: "^" + unicodedata.normalize("NFKC", m[0])),
  (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ\b)|°|\*\*|__|`|~|\\[,!;: ()\[\]]", " "),
  (r"\\(?:text|math|operatorname|mbox|boxed|fbox|left|right|displaystyle|approx|quad)[a-z]*", " "),
  (r"\\(?:times|cdot)\b|[×·]", "*"),
  (r"[\u2044\u2215]", "/"),
  (r"[\u2212\u2010-\u2013\ufe63\uff0d]", "-"),
  (r"\\([%$#&])", r"\1"),
  (r"(\w?)[$€£¥₹]", lambda m: m[1] and m[1] + " "),
  (r"(?<=\d)\s*\\[dtc]?frac", r" \\frac"),
  (r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))", lambda m: f"{m[1] or m[2]}/{m[3] or m[4]}"),
  (r"\\sqrt\s*", "√"),
  (r"\^\s*\{\s*([^{}\s]*)\s*\}", r"^\1"),
  (r"(?<=\d)\s*[*xX]\s*10\^\(?([-+]?\d{1,4})\)?", r"e\1"),
  (r"(?<=[A-Za-z])\^[-+]?\d+", " "),  # Of units.
  (r"[{}]", " "),
)
_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++)?|\.\d++)"
_NUMBER = re.compile(
  rf"(?<![\w./^√])(?<!\d:)(?<![√/] )([-+]?)(?:(\d++)\s+(?=\d+\s*/\s*\d))?({_DIGITS}(?:[eE][-+]?\d{{1,3}}(?!\d))?)"
  rf"(?:\s*/\s*({_DIGITS}))?(?!\d|[.:]\d|[eE][-+]?\d|\s*/\s*\.?\d|\s*(?:\^|[π√∞]|\\[A-Za-z]|[xyz]\b))"
  r"(?:\s*(thousand|million|billion|trillion)\b)?",
  re.IGNORECASE,
)
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


def _stated(text: str, wanted: str, extent: re.Pattern[str]) -> tuple[str, bool] | None:
  """The last answer that the text states, and whether it was marked as one by a box or hashes."""
  found: list[tuple[int, str, bool]] = []
  last = 0
  for m in _BOX.finditer(text):  # Those on one line are one statement.
    before = found.pop()[1] if found and "\n" not in text[last : m.start()] else m[1]
    found.append((m.start(), m[1] if before == m[1] else f"{before}, {m[1]}", True))
    last = m.end()
  found += [(m.start(), m[1], True) for m in _HASH.finditer(text) if re.match(rf"\W*{wanted}", m[1])]
  slots = [(m.start(), extent.match(text, m.end())) for m in _CUE.finditer(text)]
  found += [(start, slot[0], False) for start, slot in slots if slot and re.search(wanted, slot[0])]
  return max(found)[1:] if found else None


def _plain(text: str) -> str:
  for pattern, replacement in _LATEX:
    text = re.sub(pattern, replacement, text)
  return unicodedata.normalize("NFKC", text).replace("\u2044", "/")


def number(text: str) -> str | None:
  """A number, exactly, as an integer or a fraction in lowest terms: `1,000.50` is 2001/2, and 0.75 is 3/4.

  Units, currency and a percent sign are left out: 50% is 50, not 0.5. Rounded numbers differ from exact ones. Commas
  stand between thousands only. Dates, times, infinities, roots and expressions are no numbers. A text that states no
  answer gives its last number, unless that is the end of a list.
  """
  stated = _stated(text, r"\d", _SENTENCE)
  slot, marked = stated or (text, False)
  slot = _plain(slot)
  found = list(_NUMBER.finditer(slot))
  if not found:
    return None
  chosen = found[-1]
  if stated and len({_value(m) for m in found}) > 1:
    first, equals = found[0], slot.rfind("=")
    alone = not re.match(_AMONG + r"[-+]?\.?\d|\s*[-+*/=^]\s*[\d(.]", slot[first.end() :])
    if not marked and alone and re.fullmatch(r"\W*", slot[: first.start()]):
      chosen = first
    elif marked or len({_value(m) for m in found if m.start() > equals}) != 1 or equals < 0:
      return None
  elif not stated and len(found) > 1 and re.fullmatch(_AMONG, slot[found[-2].end() : chosen.start()]):
    return None
  return None if _NOT.search(slot[: chosen.start()]) else _value(chosen)


def _value(m: re.Match[str]) -> str | None:
  sign, whole, above, below, scale = m.groups()
  if len(m[0]) > 100:  # Nobody means such a number, and Python takes long to read it.
    return None
  value, divisor = Fraction(above.replace(",", "")), Fraction((below or "1").replace(",", ""))
  if not divisor or (whole and value >= divisor):
    return None
  value = (Fraction(whole or 0) + value / divisor) * _SCALES.get((scale or "").lower(), 1)
  return str(-value if sign == "-" else value)


def choice(text: str) -> str | None:
  """One of the letters A to E; a text that states no answer gives the one letter that stands as `B`, `(B)` or `B)` at
  the beginning of a line."""
  stated = _stated(text, r"\(?[A-Ea-e]\b", _SENTENCE)
  if stated is None:
    lines = re.findall(r"(?mi)^[^\w\n]{0,9}(?:option )?\(?([A-E])(?:[).:]|[^\w\n]{0,9}$)", text)
    return lines[0].upper() if len(set(lines)) == 1 else None
  slot = _plain(stated[0]).strip()
  m = re.match(r"\W*(?:(?:option|choice)\W*)?(?:([A-E])(?![\w'’])|\(([a-e])\)|([a-e])\W*$)", slot)
  if m is None or re.match(_AMONG + r"(?:[A-E](?![\w'’])|[a-e]\))", slot[m.end() :]):
    return None
  return str(m[1] or m[2] or m[3]).upper()


def exact(text: str) -> str | None:
  """The answer stated, to the end of its line, or the whole text: compatibility-normalised (NFKC), case folded, runs of
  white space made one space, and without quotes, asterisks, dollar signs and full stops around it."""
  stated = _stated(text, r"\S", _LINE)
  folded = unicodedata.normalize("NFKC", stated[0] if stated else text).casefold()
  return " ".join(folded.split()).strip(" \"'“”‘’`*$.") or None


VERIFIERS: dict[str, Callable[[str], str | None]] = {"number": number, "exact": exact, "choice": choice}
