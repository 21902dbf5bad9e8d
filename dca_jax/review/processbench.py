"""Files in the form of ProcessBench (Zheng et al. 2024): solutions, and where each goes wrong."""

import pathlib

from pydantic import BaseModel, Field, StrictBool, StrictInt, StrictStr, ValidationError

from dca_jax.errors import UserError
from dca_jax.review.audit import Case
from dca_jax.review.replies import mistake
from dca_jax.review.types import Request, Truth


class _Line(BaseModel):
  """Whatever else a line holds is left alone."""

  problem: StrictStr
  steps: list[StrictStr] = Field(min_length=1)
  label: StrictInt = Field(ge=-1)
  final_answer_correct: StrictBool | None = None
  """Where a line lacks it, a solution is taken to be right if no step of it is wrong."""


def read_processbench(path: str, limit: int) -> tuple[list[Case], Truth]:
  """The first `limit` solutions of a JSONL file, and the truth for reviewers that read it: what
  stands before the first error is necessary, what stands behind it inherits it.

  Raises:
    UserError: it cannot be read, or a line is of another form.
  """
  try:
    text = pathlib.Path(path).read_text(encoding="utf-8")
  except (OSError, ValueError) as error:
    raise UserError(f"--processbench={path}: cannot be read ({error})") from None
  cases: list[Case] = []
  truth: dict[tuple[str, tuple[str, ...]], list[str]] = {}
  for number, line in enumerate(text.splitlines(), 1):
    if not line.strip() or len(cases) == limit:
      continue
    said = _parsed(path, number, line)
    right = said.label < 0 if said.final_answer_correct is None else said.final_answer_correct
    request = Request(f"line/{number}", said.problem, tuple(said.steps), right, False)
    cases.append(Case(request, (), said.label))
    truth[request.problem, request.steps] = _roles(said)
  if not cases:
    raise UserError(f"--processbench={path}: holds no solution")
  return cases, Truth(lambda r: truth[r.problem, r.steps], lambda _, c: [()] * len(c))


def _parsed(path: str, number: int, line: str) -> _Line:
  form = "a line is {'problem': ..., 'steps': [...], 'label': the first wrong step from 0, or -1}"
  try:
    said = _Line.model_validate_json(line)
  except ValidationError as error:
    raise UserError(f"--processbench={path}: line {number}: {mistake(error)}; {form}") from None
  if said.label >= len(said.steps):
    why = f"label {said.label} of {len(said.steps)} steps"
    raise UserError(f"--processbench={path}: line {number}: {why}; {form}")
  return said


def _roles(said: _Line) -> list[str]:
  behind = len(said.steps) - said.label - 1
  if said.label < 0:
    return ["necessary"] * len(said.steps)
  return ["necessary"] * said.label + ["error"] + ["inherits"] * behind
