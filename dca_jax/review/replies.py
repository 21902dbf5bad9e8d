"""What a language model may answer: numbers, names from a fixed list, and notes that are kept."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator

MAX_WEIGHT = 4
Role = Literal["necessary", "redundant", "irrelevant", "error", "inherits", "repair"]


def mistake(error: ValidationError) -> str:
  """The first thing that is wrong, and where."""
  first = error.errors(include_url=False, include_input=False)[0]
  where = ".".join(map(str, first["loc"]))
  return f"{where}: {first['msg']}" if where else str(first["msg"])


def _lower(value: Any) -> Any:
  return value.strip().lower() if isinstance(value, str) else value


def _no_boolean(value: Any) -> Any:
  if isinstance(value, bool):
    raise ValueError("a boolean is no number")
  return value


class _Step(BaseModel):
  """Lenient where there is no doubt: a capital letter, `2.0` or `"2"` for 2, a field too many."""

  role: Annotated[Role, BeforeValidator(_lower)]
  weight: Annotated[int, Field(ge=0, le=MAX_WEIGHT), BeforeValidator(_no_boolean)]


class _Rest(BaseModel):
  """What stands beside the steps."""

  suspicious: bool = False
  sure: bool = True
  summary: str = ""
  keeps: tuple[int, ...] = ()


class Note(BaseModel):
  """What a first reading says of a step; what is missing or of another form says nothing."""

  does: str = ""
  uses: list[int] = []
  without: str = ""

  @field_validator("*", mode="wrap")
  @classmethod
  def _or_nothing(cls, value: Any, read: Any, info: Any) -> Any:
    try:
      return read(value)
    except ValueError:
      return cls.model_fields[info.field_name].default

  @property
  def reason(self) -> str:
    uses = [f"uses {', '.join(map(str, self.uses))}"] if self.uses else []
    without = [f"without it: {self.without}"] if self.without else []
    aside = "; ".join(uses + without)
    return f"{self.does} ({aside})" if aside else self.does


class Said(NamedTuple):
  """What a reply says of one answer, in the order of the steps shown."""

  roles: tuple[str, ...] = ()
  weights: tuple[float, ...] = ()
  suspicious: bool = False
  sure: bool = True
  notes: Mapping[int, Note] = {}
  """By the number of the step."""
  summary: str = ""
  """Of these steps, for whoever sees only what follows."""
  keeps: tuple[int, ...] = ()
  """Steps that the summary rests on."""


def parse_reply(text: str, shown: Sequence[range], judged: bool = True) -> list[Said | str]:
  """What is said of each answer shown, or why nothing is.

  Entries are found by their numbers, never by their place. A server that keeps to no schema may put
  its JSON into a fence or behind a thought, and lists with numbers where we ask for names.

  Args:
    shown: the numbers of the steps of each answer.
    judged: whether a verdict was asked for; else notes alone.

  Raises:
    ValueError: nothing is said at all, or the reply names answers that were not shown.
  """
  answers = _numbered(_only_object(text), "answer")
  if strange := sorted(set(answers) - set(range(1, len(shown) + 1))):
    raise ValueError(f"answer {strange[0]} where 1 to {len(shown)} were asked for")
  said = [_said(answers.get(i), own, judged) for i, own in enumerate(shown, 1)]
  if all(isinstance(one, str) for one in said):
    raise ValueError(f"answer 1: {said[0]}")
  return said


def _said(answer: Any, shown: range, judged: bool) -> Said | str:
  if not isinstance(answer, dict):
    return "no entry"
  try:
    notes = _notes(answer.get("deliberation"), shown)
    rest = _Rest.model_validate(answer)
    if not judged:
      return Said(notes=notes, summary=rest.summary, keeps=rest.keeps) if notes else "no note"
    entries = _numbered(answer, "step")
    if set(entries) != {*shown}:
      return f"{len(entries)} steps that are not {shown.start} to {shown.stop - 1}"
    steps = [_Step.model_validate(entries[k]) for k in shown]
  except ValidationError as error:
    return mistake(error)[:200]
  except ValueError as error:
    return str(error)
  roles, weights = tuple(s.role for s in steps), tuple(float(s.weight) for s in steps)
  return Said(roles, weights, rest.suspicious, rest.sure, notes, rest.summary, rest.keeps)


def _notes(deliberation: Any, shown: range) -> dict[int, Note]:
  if not isinstance(deliberation, dict):
    return {}
  found = _numbered(deliberation, "step")
  return {k: Note.model_validate(found[k]) for k in shown if isinstance(found.get(k), dict)}


def parse_chance(text: str) -> float:
  """The chance that a reply names in percent, in [0, 1]; raises ValueError where there is none."""
  return _Chance.model_validate(_only_object(text, "chance")).chance / 100


def parse_rewrite(text: str, steps: int) -> tuple[int, str]:
  """How many of an answer's `steps` are kept, and what stands behind them; raises ValueError where
  a reply does not say so."""
  said = _Rewrite.model_validate(_only_object(text, "keep"))
  if said.keep >= steps:
    raise ValueError(f"{said.keep} steps are kept of {steps}")
  return said.keep, said.text


class _Rewrite(BaseModel):
  keep: Annotated[int, Field(ge=0), BeforeValidator(_no_boolean)]
  text: Annotated[str, Field(min_length=1)]


class _Chance(BaseModel):
  chance: Annotated[float, Field(ge=0, le=100), BeforeValidator(_no_boolean)]


def _numbered(holder: dict[str, Any], name: str) -> dict[int, Any]:
  """Entries by number, from `{"step_2": ...}` or from `{"steps": [{"step": 2, ...}]}`."""
  inner = holder.get(name + "s", holder)
  if isinstance(inner, dict):
    named = ((re.fullmatch(rf"(?:{name})?[_ ]?([0-9]{{1,4}})", key.lower()), key) for key in inner)
    pairs = [(match[1], inner[key]) for match, key in named if match]
  elif isinstance(inner, list):
    pairs = [(str(entry.get(name)), entry) for entry in inner if isinstance(entry, dict)]
  else:
    pairs = []
  entries: dict[int, Any] = {}
  for number, entry in pairs:
    if not re.fullmatch("[0-9]{1,4}", number):
      raise ValueError(f"an entry that names no {name}")
    if int(number) in entries:
      raise ValueError(f"{name} {number} twice")
    entries[int(number)] = entry
  return entries


def _only_object(text: str, key: str = "answer") -> dict[str, Any]:
  """The one JSON object in a text with a key that begins like this; of several that differ one may
  be quoted."""
  text = text.rpartition("</think>")[2]
  found: list[dict[str, Any]] = []
  place, tries = text.find("{"), 0
  while place >= 0 and tries < 20:
    end = place + 1
    try:
      value, end = _DECODER.raw_decode(text, place)
      found += [value] if any(name.lower().startswith(key) for name in value) else []
    except (ValueError, RecursionError):
      tries += 1
    place = text.find("{", end)
  if not found or any(value != found[0] for value in found):
    raise ValueError(f"{len(found)} JSON objects with {key} where one was asked for")
  return found[0]


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """An object in which whatever is said twice, and differently, is nothing."""
  made: dict[str, Any] = {}
  for key, value in pairs:
    made[key] = value if made.get(key, value) == value else None
  return made


_DECODER = json.JSONDecoder(object_pairs_hook=_without_doubles, parse_constant=lambda _: None)
