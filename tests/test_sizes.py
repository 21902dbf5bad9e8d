"""Functions stay short enough to be read at once: at most 60 lines and 7 parameters."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(path for room in ("dca_jax", "evidence") for path in (ROOT / room).rglob("*.py"))
LINES, PARAMETERS = 60, 7
# What is longer or takes more, and why.
EXCEPTIONS = {
  # One formula with its masks; in parts, each part would take most of the others' arrays.
  "dca_jax/policy/attention.py: attend",
  "dca_jax/policy/attention.py: flash_attend",
  # One account of a program's memory and time, top to bottom.
  "evidence/benchmarks/tpu.py: main",
}


def too_large(path: pathlib.Path) -> set[str]:
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      continue
    a = node.args
    names = {x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)} - {"self", "cls"}
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if lines > LINES or len(names) > PARAMETERS:
      found.add(f"{path.relative_to(ROOT)}: {node.name}")
  return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short(path):
  assert not too_large(path) - EXCEPTIONS
