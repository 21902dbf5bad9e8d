"""The verifier `math`, for a process of `judge`; started by path, so that it imports nothing of
ours. Its time is limited from outside, where a limit is no verdict and not a wrong answer."""

import contextlib
import functools
import logging
import resource
from collections.abc import Mapping
from typing import Any

import math_verify

logging.getLogger("math_verify").setLevel(logging.ERROR)  # It warns of the limits that it lacks.
# A tower of powers would take all the memory before it has taken its time.
with contextlib.suppress(OSError, ValueError):
  resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))


@functools.lru_cache(1024)
def _parsed(text: str) -> list[Any]:
  return math_verify.parse(text, parsing_timeout=None)


def verify(row: Mapping[str, str], completion: str) -> bool:
  """Whether an answer is worth what the `answer` of the row is; both as `verifiers.formula` gives
  them."""
  return math_verify.verify(_parsed(row["answer"]), _parsed(completion), timeout_seconds=None)


def final_answer(text: str) -> str | None:
  """The formula as sympy writes it, or None where math-verify reads none."""
  return next((str(found) for found in _parsed(text) if not isinstance(found, str)), None)


verify.final_answer = final_answer  # type: ignore[attr-defined]
