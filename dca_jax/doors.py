"""Doors: what a user brings is found by MODULE:ATTRIBUTE or path/to/file.py:ATTRIBUTE, like a
built-in by its name."""

import dataclasses
import difflib
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from dca_jax.errors import UserError


def find(spec: str, key: str) -> Any:
  """What `spec` names, MODULE:ATTRIBUTE or path/to/file.py:ATTRIBUTE.

  Args:
    key: the setting that it stands in, for messages.

  Raises:
    UserError: the module cannot be imported, or has no such attribute.
  """
  where, _, attribute = spec.rpartition(":")
  try:
    module = _from_file(where) if where.endswith(".py") else importlib.import_module(where)
    found = module
    for name in attribute.split("."):
      found = getattr(found, name)
  except Exception as error:  # A module may raise anything.
    what = f"{type(error).__name__}: {error}"
    hint = "give a file, path/to/file.py:NAME, or put the module's folder on PYTHONPATH"
    if where == "__main__":
      hint = "it is from a script or a notebook: run its definition first, or move it to a file"
    elif "<locals>" in attribute:
      hint = "it is from within a function, where it cannot be found again: move it out of there"
    raise UserError(f"{key}: cannot import {spec} ({what}); {hint}") from error
  return found


def choose(spec: Any, key: str, base: type, known: Mapping[str, type]) -> type:
  """The class that a setting chooses: one of the built-in ones by its name, or MODULE:CLASS.

  Raises:
    UserError: there is no such class, or it does not extend `base` as a frozen dataclass.
  """
  if not isinstance(spec, str) or not (spec in known or ":" in spec):
    raise UserError(f"{key}: must be one of {', '.join(known)}, or MODULE:CLASS, not {spec!r}")
  kind = known[spec] if spec in known else find(spec, key)
  if not (isinstance(kind, type) and issubclass(kind, base) and dataclasses.is_dataclass(kind)):
    what = f"a frozen dataclass that extends {base.__module__}.{base.__name__}"
    raise UserError(f"{key}: {spec} must be {what}")
  return kind


def door(default: Any) -> Any:
  """A field of a section that holds MODULE:ATTRIBUTE, or several; see `absolute`."""
  return dataclasses.field(default=default, metadata={"door": True})


def local(default: str = "") -> Any:
  """A field of a section that may hold the path of a file or folder; see `located`."""
  return dataclasses.field(default=default, metadata={"local": True})


def located(spec: Any) -> Any:
  """The path from the root of a file or folder that is there, which is the same from every folder;
  anything else, such as a hub id or a bucket, as it is."""
  if not isinstance(spec, str) or not spec or "://" in spec:
    return spec
  path = pathlib.Path(spec).expanduser().absolute()
  return str(path) if path.exists() else spec


def absolute(spec: Any) -> Any:
  """The spec, or each of several, with the path of its file from the root: it is the same from
  every folder."""
  if isinstance(spec, (tuple, list)):
    return type(spec)(map(absolute, spec))
  if not isinstance(spec, str):
    return spec
  path, colon, rest = spec.partition(".py:")
  return f"{pathlib.Path(path).expanduser().absolute()}{colon}{rest}" if colon else spec


def _from_file(path: str) -> Any:
  """The module in a file; one file is one module, however often it is named."""
  place = pathlib.Path(path).expanduser().absolute()
  name = f"{place.stem}@{place.parent}"
  if name not in sys.modules:
    loader = importlib.util.spec_from_file_location(name, place)
    if loader is None or loader.loader is None or not place.is_file():
      raise FileNotFoundError(f"no file {path}")
    module = importlib.util.module_from_spec(loader)
    sys.modules[name] = module  # Dataclasses look their module up while they are made.
    try:
      loader.loader.exec_module(module)
    except BaseException:
      del sys.modules[name]
      raise
  return sys.modules[name]


def require(package: str, extra: str, key: str) -> None:
  """Raises UserError where the package of an optional `extra` is not installed, which the setting
  `key` needs."""
  if not importlib.util.find_spec(package):
    name = package.replace("_", "-")
    raise UserError(f"{key}: needs the package {name}: pip install 'dca-jax[{extra}]'")


def nearest(key: str, known: Iterable[str]) -> str:
  """The end of a sentence about a name that is not known: the nearest one, or all."""
  known = sorted(known)
  near = difflib.get_close_matches(key, known, 1, 0.5)
  return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
