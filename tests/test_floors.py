"""The floors of the house: nothing imports what stands above it, at the top of a file or within a
function."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FLOORS = (
  {"errors", "checks", "doors", "patterns", "episode", "intervals", "progress"},
  {"tasks", "review", "credit", "policy"},
  {"rollout", "learner", "devices", "store", "source"},
  {"reader"},
  {"config"},
  {"run", "tally", "step", "loop", "api"},
  {"commands", "__main__"},
)
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted((ROOT / "dca_jax").rglob("*.py"))
# The public names come from everywhere.
FREE = {"__init__"}
# A trained reviewer is a model, which is opened when it is asked for, and by nobody else.
LAZY = {"review/trained.py": {"reader"}}


def imported(path: pathlib.Path) -> set[str]:
  """The modules that a file imports, `from x import y` as x.y."""
  names: set[str] = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return names


def room(path: pathlib.Path) -> str:
  return path.relative_to(ROOT / "dca_jax").with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_upward(path):
  own, names = room(path), imported(path)
  assert not [name for name in names if name.partition(".")[0] == "evidence"]
  if own in FREE:
    return
  used = {name.split(".")[1] for name in names if name.startswith("dca_jax.")}
  used -= LAZY.get(path.relative_to(ROOT / "dca_jax").as_posix(), set())
  assert not {other for other in used if FLOOR[other] > FLOOR[own]}
  if own in ("review", "credit"):
    assert not used & {"policy", "rollout", "learner", "devices", "store"}
  if own == "review":
    assert not [name for name in names if name.partition(".")[0] in ("jax", "jaxlib", "flax")]
