r"""Numbers as people and models write them, read exactly or not at all.

`read` cuts a text into items: values, mathematics that is no number, words, and punctuation. A
value is a numeral with sign, separators and exponent, a fraction or a mixed number, alone;
everything that is joined to it by an operator, a bracket, a power, an index or a letter makes it an
expression, and an expression is no number. So `\frac{\sqrt2}{2}`, `2x + 3`, `f(2)`, `101_2` and
`5!` are single items of the kind EXPRESSION, and no number inside them is ever seen.
"""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

# Kinds of items, the last four also of tokens.
VALUE, EXPRESSION = "value", "expression"
WORD, RELATION, COMPARISON, MARK, LINE = "word", "relation", "comparison", "mark", "line"
_ITEMS = (WORD, RELATION, COMPARISON, MARK, LINE)
# Kinds of tokens that mathematics is made of; OTHER has no part in a number.
NUMERAL, FRACTION, GROUP, OPEN, CLOSE, SIGN, TIMES, SLASH, POWER, OTHER = "nfG()±*/^x"
_PARTS = dict.fromkeys(("number", "repeating", "absolute"), NUMERAL) | {"fraction": FRACTION}
_PARTS |= {"times": TIMES, "power": POWER, "open": OPEN, "close": CLOSE, "command": OTHER}
_SIGNS = {"+": SIGN, "-": SIGN, "/": SLASH} | dict.fromkeys("_÷±∓√∞∪∩", OTHER)
DIGIT = r"[\d\u00bc-\u00be\u2150-\u215e]"


class Item(NamedTuple):
  kind: str
  text: str
  value: Fraction = Fraction(0)


class _Token(NamedTuple):
  kind: str
  text: str
  spaced: bool
  """Whether white space or markup stands before it."""


# Words and units that may stand after a number, short enough for a product of variables.
_SHORT = re.compile(
  r"an|and|am|any|as|at|by|can|cm|day|dl|do|ft|gb|ha|hp|hrs?|in|is|it|kb|kcal|kg|kj|kmh?|kn|kw"
  r"|lbs?|man|may|mb|mg|mi|min|ml|mm|mph|ms|no|nm|of|on|or|oz|pa|pcs?|pm|pt|rpm|sec|so|sq|tb|to|up"
  r"|usd?|was|way|we|yd|yrs?",
  re.IGNORECASE,
)
_UNIT_LETTERS = "mgshlLWVJNKCF"
_VARIABLES = re.compile(r"[a-dk-np-rt-z]{2}|abc|xyz|pqr", re.IGNORECASE)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "lakh": 10**5, "million": 10**6, "crore": 10**7}
_SCALES |= {"billion": 10**9, "trillion": 10**12, "十": 10, "百": 10**2, "千": 10**3}
_SCALES |= {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
# Words that take the number right after them, or right before them, into something else.
_BEFORE = re.compile(
  r"(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|lg|exp|sqrt|root|cbrt|max|min|gcd|lcm|floor|ceil"
  r"|abs|half|twice|thrice|double|triple|minus|negative|plus|times|than|least|most|under|over|below"
  r"|above|between|beyond|within|exceeding|exceeds|modulo|mod|base|power",
  re.IGNORECASE,
)
_AFTER = re.compile(
  r"squared|cubed|factorial|choose|mod|modulo|plus|minus|divided|multiplied|raised|base|and|or|to"
  r"|dozens?|score|gross|hal(?:f|ves)|(?:third|quarter|fourth|fifth|sixth|seventh|eighth|ninth)s?"
  r"|(?:tenth|hundredth|thousandth|millionth)s?|st|nd|rd|th|tausend|hundert|mi[ol]|mln|mrd|bn|mille"
  r"|[bm]ill?i[oó]\w*|mill?i?ard\w*|trill?i[oó]\w*|(?:тыс|млн|млрд|миллио|миллиа|триллио)\w*"
  r"|[^\W_]*半[^\W_]*|兆.*",
  re.IGNORECASE,
)
_ALTERNATIVE = re.compile(
  r"or|and|maybe|perhaps|possibly|alternatively|mod|modulo|base",
  re.IGNORECASE,
)

_TRANSLATED = str.maketrans(
  dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-")
  | dict.fromkeys("×·⋅∙∗", "*")
  | dict.fromkeys("\u2044\u2215", "/")
  | dict.fromkeys("≃∼≅", "≈")
  | {"٫": ".", "٬": ",", "…": "...", "’": "'"}
)
_SPELLINGS = (
  (r"[\u00bc-\u00be\u2150-\u215e]", lambda m: r"\frac{{{}}}{{{}}}".format(*_vulgar(m[0]))),
  (r"[\u00b2\u00b3\u00b9\u2070-\u207e]+", lambda m: f"^{{{unicodedata.normalize('NFKC', m[0])}}}"),
  (r"[\u2080-\u208e]+", r"\\index "),
  (r"\\!", ""),
  # Thousands, by what is never between two numbers.
  (r"(?<=\d)(?:\{,\}|\\,|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ","),
  (r"\\(?:left|right|[bB]ig{1,2}[lr]?)(?![A-Za-z])\s*", ""),
  (r"\\(?:textcolor|color|colorbox|[hv]space\*?|v?phantom|tag|label)\s*\{[^{}]*\}", " "),
)
# Thousands by plain spaces, where a group by itself would be no number.
_SPACED = re.compile(r"(?<![\w.,])[1-9]\d{0,2}(?: \d{3}){2,}+(?![.,]?\d)")

_END = r"(?![A-Za-z])"  # Of a LaTeX command.
_LETTER = r"[A-Za-z\u00c0-\u024f]"
_TOKENS = {
  "space": (
    rf"(?:[^\S\n]|~|\\[ ,;:()\[\]]|\\q?quad{_END}"
    r"|<<[^<>\n]*>>|</?[A-Za-z][\w-]*\s?/?>|`)+"  # GSM8K's calculator, and tags.
  ),
  "line": r"\n|\\\\",
  "unit": rf"\\?[$%€£¥₹₽₩₪₫]|°|\^\s?(?:\{{\s?)?(?:\\circ{_END}|°)(?:\s?\}})?|\\degree{_END}",
  "repeating": r"\d+\.\d*\\(?:overline|bar)\s?\{\s?\d+\s?\}",
  "number": r"(?:\d+(?:(?:[.,']|\{,\})\d+)*|(?<![\d.])\.\d+)(?:[eE][-+]?\d{1,3}(?!\w|\.\d))?",
  "absolute": r"\|[-+]?\d+(?:\.\d+)?\|(?!\d)",
  "fraction": rf"\\[dtc]?frac{_END}",
  "power": r"(?<=\w)\*\*(?=[\w({-])|\^",
  "times": rf"\*(?!\*)|\\(?:times|cdot|ast){_END}|(?<=[\d\s}}])[xX](?=\s?10\s?(?:\^|\*\*))",
  "markup": r"\*\*+|(?<![^\W_])_+|_+(?![^\W_]|\{)",
  "open": r"\\?[{]|[(\[]",
  "close": r"\\?[}]|[)\]]",
  "upright": (
    rf"\\(?:text(?:rm|bf|it|sf|tt|normal)?|math(?:rm|sf|tt)|mbox|operatorname\*?){_END}\s*"
  ),
  "wrapper": rf"\\(?:boxed|fbox|underline|math(?:bf|it)|(?:display|text)style){_END}\s*",
  "comparison": (
    r"<=|>=|!=|=/=|[<>≤≥≠≡∈∉≪≫∝]|\\not\s?(?:=|\\\w+)"
    rf"|\\(?:leq?|geq?|neq?|lt|gt|leqslant|geqslant|ll|gg|equiv|in|notin|propto){_END}"
  ),
  "arrow": rf"[-=]+>|[→⇒⟹∴]|\\(?:to|[rR]ightarrow|[lL]ongrightarrow|implies|therefore){_END}",
  "relation": rf":?=+|≈|\\(?:approx|simeq|sim|cong){_END}",
  "name": rf"{_LETTER}+\d\w*(?:[.,]\d+)*",
  "word": rf"{_LETTER}+(?:'[A-Za-z]+)?(?:\s?\^\s?(?:\{{\s?[-+]?\d\s?\}}|[-+]?\d(?![.,]?\d)))?",
  "foreign": r"[^\W\d_A-Za-z\u00c0-\u024f]+",
  "command": r"\\[A-Za-z]+",
  "other": r"[\s\S]",
}
_TOKEN = re.compile("|".join(f"(?P<{kind}>{pattern})" for kind, pattern in _TOKENS.items()))
_POWER_OF_UNIT = re.compile(r"\s?\^\s?(?:\{\s?[-+]?\d\s?\}|\d(?![.,]?\d))")

_NUMERALS = (
  re.compile(r"\d+(?:(?:\.|\{,\})\d+)?|\.\d+"),
  re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?"),
  re.compile(r"[1-9]\d?(?:,\d\d)+,\d{3}(?:\.\d+)?"),  # As in India.
  re.compile(r"[1-9]\d{0,2}(?:'\d{3})+(?:\.\d+)?"),
)
_DOTTED = re.compile(r"[1-9]\d{0,2}(?:\.\d{3}){2,}(?:,\d+)?")


def read(text: str) -> list[Item]:
  """The items of a text, in order."""
  items = _Reader(_tokens(text)).items()
  for i, item in enumerate(items):
    of = i > 1 and items[i - 1].text.lower() == "of"
    before, after = items[max(0, i - 1 - of) : i - of], items[i + 1 : i + 2]
    if item.kind == VALUE and (_joins(before, _BEFORE) or _joins(after, _AFTER)):
      items[i] = item._replace(kind=EXPRESSION)
  return items


def _joins(neighbour: list[Item], words: re.Pattern[str]) -> bool:
  """Whether what stands beside a value makes it a part of something else."""
  kinds = [item.kind for item in neighbour if item.kind != WORD or words.fullmatch(item.text)]
  return COMPARISON in kinds or WORD in kinds


def _vulgar(character: str) -> tuple[int, int]:
  return Fraction(unicodedata.numeric(character)).limit_denominator(10).as_integer_ratio()


def _tokens(text: str) -> list[_Token]:
  """The tokens of a text, with white space, currency and markup left out."""
  for pattern, replacement in _SPELLINGS:
    text = re.sub(pattern, replacement, text)
  text = unicodedata.normalize("NFKC", text.translate(_TRANSLATED)).translate(_TRANSLATED)
  text = _SPACED.sub(lambda m: m[0].replace(" ", ",") if " 0" in m[0] else m[0], text)
  tokens: list[_Token] = []
  braces: list[bool] = []  # Of each brace that is open, whether it is that of an upright text.
  place, spaced, upright, within = 0, True, False, 0
  while place < len(text):
    match = _TOKEN.match(text, place)
    assert match  # The last alternative takes any character.
    kind, said, place = str(match.lastgroup), match[0], match.end()
    opens_text, upright = upright and said == "{", kind == "upright"
    if said == "{":
      braces.append(opens_text)
      within += opens_text
    elif said == "}" and braces and braces.pop():
      opens_text, within = True, within - 1  # It closes one.
      if power := _POWER_OF_UNIT.match(text, place):
        place = power.end()
    if upright or opens_text or kind in ("space", "wrapper", "markup"):
      spaced = True
    elif kind != "unit":
      before = tokens[-1] if tokens and not spaced else None
      kind = _kind(kind, said, before, within > 0, text[place : place + 3])
      tokens.append(_Token(kind, said, spaced))
      spaced = kind == LINE
  return tokens


def _kind(group: str, said: str, before: _Token | None, upright: bool, after: str) -> str:
  """What part a token can have in a number. `before`: the token that it is joined to, without white
  space between."""
  follows = before.kind if before else ""
  if group == "name":
    return WORD if said[1].isalpha() or said in ("m2", "m3") else OTHER
  if group == "word":
    return WORD if upright or _is_word(said, before, after) else OTHER
  if group == "foreign":
    greek = "\u0370" <= said[0] <= "\u03ff" and len(said) < 3
    variable = greek or said in tuple("хХуУ")
    return OTHER if variable else WORD
  if group != "other":
    return group if group in (LINE, RELATION, COMPARISON) else _PARTS.get(group, MARK)
  if said == ":":
    return OTHER if re.match(r"\s?\d" if before is None else r"\d", after) else MARK
  postfix = (said in "!'" and follows in (OTHER, CLOSE)) or (said == "!" and follows == NUMERAL)
  dots = said == "." and follows == NUMERAL and after.startswith(".")
  return OTHER if postfix or dots else _SIGNS.get(said, MARK)


def _is_word(said: str, before: _Token | None, after: str) -> bool:
  """Whether letters are a word or a unit, and not variables."""
  letters = re.split(r"\s?\^", said)[0]
  if len(said) == 1:
    article = said in "aAI" and re.match(r"\s(?:[^\W_]{2}|\d)", after)
    return before is None and (said in _UNIT_LETTERS or bool(article))
  if _SHORT.fullmatch(letters):
    return True
  after_number = before is not None and before.kind in (NUMERAL, CLOSE)
  return len(letters) > 3 if after_number else not _VARIABLES.fullmatch(letters)


def _numeral(text: str) -> Fraction | None:
  """The value of a numeral; None where its separators could mean something else, or nothing."""
  if len(text) > 100:  # Nobody means such a number, and Python takes long to read it.
    return None
  if text[0] == "|":
    return abs(Fraction(text[1:-1]))
  if "\\" in text:
    fixed, _, rest = text.partition("\\")
    repeated = re.sub(r"\D", "", rest)
    tail = Fraction(int(repeated), 10 ** len(repeated) - 1)
    return Fraction(fixed + "0") + tail / 10 ** len(fixed.partition(".")[2])
  mantissa, _, exponent = text.lower().partition("e")
  if _DOTTED.fullmatch(mantissa):
    mantissa = mantissa.replace(".", "").replace(",", ".")
  elif not any(form.fullmatch(mantissa) for form in _NUMERALS):
    return None
  plain = mantissa.replace("{,}", ".").replace(",", "").replace("'", "")
  return Fraction(plain) * Fraction(10) ** int(exponent or 0)


class _Part(NamedTuple):
  """A part of a run of mathematics; only numerals, fractions and groups can have a value."""

  kind: str
  text: str = ""
  value: Fraction | None = None


class _Reader:
  """Puts tokens together to items."""

  def __init__(self, tokens: list[_Token]):
    self.tokens, self.depth = tokens, 0
    self.closing: dict[int, int] = {}  # Where each bracket that is open ends.
    self.prose = [0]  # How many words and relations there are before each token.
    unclosed = []
    for i, token in enumerate(tokens):
      if token.kind == OPEN:
        unclosed.append(i)
      elif token.kind == CLOSE and unclosed:
        self.closing[unclosed.pop()] = i
      self.prose.append(self.prose[-1] + (token.kind in (WORD, RELATION)))

  def items(self) -> list[Item]:
    items: list[Item] = []
    i = 0
    while i < len(self.tokens):
      token = self.tokens[i]
      end, parts = self.run(i)
      if parts:
        value = _value(parts)
        alone = len(parts) == 1 and re.fullmatch(r"[^\W\d_]", token.text)
        kind = WORD if alone else EXPRESSION if value is None else VALUE
        items.append(Item(kind, token.text if alone else "", value or Fraction(0)))
      elif token.kind == WORD and self.called(i):
        end = self.closing[i + 1] + 1
        digits = any(t.kind == NUMERAL for t in self.tokens[i:end])
        items.append(Item(EXPRESSION if digits else WORD, token.text))
      elif self.explains(i, items):
        end = self.closing[i] + 1
      else:
        end = i + 1
        if not (items and items[-1].kind == VALUE and (scale := _scale(token))):
          items.append(Item(token.kind if token.kind in _ITEMS else MARK, token.text))
        else:
          items[-1] = items[-1]._replace(value=items[-1].value * scale)
      i = end
    return items

  def called(self, i: int) -> bool:
    """Whether a bracket is joined to token i, as to the name of a function."""
    latin = self.tokens[i].text[0] < "\u0250"
    return latin and i + 1 in self.closing and not self.tokens[i + 1].spaced

  def explains(self, i: int, items: list[Item]) -> bool:
    """Whether a bracket with words or a calculation begins at token i and stands after a value and
    its unit.

    What is in it explains the value and is left out; an alternative ("or 43") or a modulus makes
    the value none.
    """
    k = len(items) - 1
    while k >= 0 and (items[k].kind == WORD or items[k].text == "."):
      k -= 1
    if k < 0 or items[k].kind not in (VALUE, EXPRESSION):
      return False
    if i not in self.closing or self.tokens[i].text == "{":
      return False
    if _ALTERNATIVE.fullmatch(self.tokens[i + 1].text):
      items[k] = items[k]._replace(kind=EXPRESSION)
    return True

  def run(self, i: int) -> tuple[int, list[_Part]]:
    """The mathematics that begins with token i: where it ends, and its parts."""
    parts: list[_Part] = []
    while i < len(self.tokens):
      token = self.tokens[i]
      if token.kind in (SIGN, TIMES, SLASH):
        if not self.operand(i + 1) or (token.kind != SIGN and not parts):
          break
        sure = parts or self.is_sign(i)
        parts.append(_Part(token.kind if sure else OTHER, token.text))
        i += 1
      elif token.kind == FRACTION:
        i, value = self.fraction(i)
        parts.append(_Part(FRACTION, "", value))
      elif token.kind == OPEN:
        end = self.closing.get(i)
        called = parts and parts[-1].kind == OTHER
        if end is None or (self.prose[end] > self.prose[i] and not called):
          break
        parts.append(_Part(GROUP, "", self.group(i)))
        i = end + 1
      elif token.kind in (NUMERAL, POWER, OTHER):
        value = _numeral(token.text) if token.kind == NUMERAL else None
        kind = OTHER if token.kind == NUMERAL and value is None else token.kind
        parts.append(_Part(kind, token.text, value))
        i += 1
      else:
        break
    return i, parts

  def operand(self, i: int) -> bool:
    """Whether something that can be added or multiplied, or the sign of such a thing, begins at
    token i."""
    if i < len(self.tokens) and self.tokens[i].kind == SIGN:
      i += 1
    return i < len(self.tokens) and self.tokens[i].kind in (NUMERAL, FRACTION, OPEN, OTHER)

  def is_sign(self, i: int) -> bool:
    """Whether a plus or minus at the beginning of mathematics is the sign of a number, and no
    hyphen or dash."""
    before = self.tokens[i - 1] if i else None
    if not self.tokens[i + 1].spaced:
      latin = before and before.kind == WORD and before.text[-1] < "\u0250"
      return not latin or self.tokens[i].spaced
    # On a line of text it may be a bullet or a dash.
    return before is None or before.kind in (RELATION, OPEN)

  def group(self, i: int) -> Fraction | None:
    """The value of what the bracket at token i holds, if that is a number and nothing else."""
    if self.depth > 20:
      return None
    self.depth += 1
    end, parts = self.run(i + 1)
    self.depth -= 1
    return _value(parts) if end == self.closing[i] else None

  def fraction(self, i: int) -> tuple[int, Fraction | None]:
    r"""Where the fraction at token i ends, and its value; `\frac34` has single digits."""
    arguments: list[Fraction | None] = []
    i += 1
    while len(arguments) < 2:
      token = self.tokens[i] if i < len(self.tokens) else _Token(MARK, "", False)
      if token.text == "{" and i in self.closing:
        arguments.append(self.group(i))
        i = self.closing[i]
      elif token.text.isdecimal() and len(token.text) <= 2 - len(arguments):
        arguments += [Fraction(digit) for digit in token.text]
      else:
        return i, None
      i += 1
    above, below = arguments
    return i, None if above is None or not below else above / below


def _scale(token: _Token) -> int | None:
  return _SCALES.get(token.text.lower()) or _SCALES.get(token.text[0])


def _value(parts: list[_Part]) -> Fraction | None:
  """The value of a number by itself; None of everything else."""
  sign = 1
  if parts[:1] and parts[0].kind == SIGN:
    sign, parts = -1 if parts[0].text == "-" else 1, parts[1:]
  kinds = "".join(part.kind for part in parts)
  values = [part.value or Fraction(0) for part in parts]
  whole = all(part.text.isdecimal() for part in parts if part.kind == NUMERAL)
  if any(part.value is None for part in parts if part.kind in (NUMERAL, FRACTION, GROUP)):
    return None
  if kinds in (NUMERAL, FRACTION, GROUP):
    return None if sign < 0 and values[0] < 0 else sign * values[0]
  if kinds == "n/n" and values[2]:
    return sign * values[0] / values[2]
  if kinds in ("nn/n", "nf") and whole:  # Mixed numbers.
    part = values[1] if kinds == "nf" else values[1] / values[3] if values[3] else 1
    return sign * (values[0] + part) if 0 <= part < 1 else None
  if re.fullmatch(r"n\*n\^±?[nG]", kinds) and parts[2].text == "10":
    exponent = -values[-1] if parts[-2].text == "-" else values[-1]
    if exponent.denominator == 1 and abs(exponent) < 1000:
      return sign * values[0] * Fraction(10) ** int(exponent)
  return None
