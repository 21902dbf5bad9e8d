"""The code that somebody's task is made of, as a number that changes with it."""

import hashlib
import linecache
import os
import pathlib
import sys
import sysconfig
import types
from collections.abc import Iterator
from typing import Any

_OURS = str(pathlib.Path(__file__).parent) + os.sep
_PATHS = [sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")]
_INSTALLED = (_OURS, *_PATHS)


def source_digest(thing: Any) -> str:
  """Of the files that define an object and what it holds, and of the user's files that those
  import.

  Installed packages are left out, except for the folder that the object's class is in.
  """
  kind = type(thing)
  homes = tuple(os.path.dirname(file) + os.sep for file, _ in _scopes(kind) if os.path.isfile(file))
  held = getattr(thing, "__dict__", {}).values()
  waiting = [scope for part in (kind, *held) for scope in _scopes(part)]
  seen: dict[str, str] = {}
  while waiting:
    file, names = waiting.pop()
    if file in seen or (file.startswith(_INSTALLED) and not file.startswith(homes)):
      continue
    linecache.checkcache(file)
    seen[file] = "".join(linecache.getlines(file))  # A notebook's cells are there too.
    waiting += [scope for value in list(names.values()) for scope in _scopes(value)]
  whole = "\0".join(sorted(seen.values()))
  return hashlib.sha256(whole.encode("utf-8", "replace")).hexdigest()[:16]


def package_digest(pattern: str) -> str:
  """Of this package's own files that fit a pattern, such as `policy/*.py`."""
  files = sorted(pathlib.Path(_OURS).glob(pattern))
  if not files:
    raise ValueError(f"no file of this package fits {pattern}")
  return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:16]


def _scopes(thing: Any) -> Iterator[tuple[str, dict[str, Any]]]:
  """The files that define `thing`, each with the names that are known in it."""
  if isinstance(thing, types.ModuleType):
    module: Any = thing
  else:
    module = sys.modules.get(str(getattr(thing, "__module__", None)))
  if getattr(module, "__file__", None):
    yield module.__file__, vars(module)
  # A recipe is no module that Python knows, nor is a notebook; their functions know their files.
  for value in vars(thing).values() if isinstance(thing, type) else (thing,):
    function = getattr(value, "__func__", value)
    if isinstance(function, types.FunctionType):
      yield function.__code__.co_filename, function.__globals__
