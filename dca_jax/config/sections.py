"""Makes sections from mappings, as the choices in them say, and finds what is wrong with them."""

import dataclasses
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dca_jax.config.tree import Config, ConfigError, nested
from dca_jax.credit import SCHEMES, Scheme
from dca_jax.doors import absolute, choose, located, nearest
from dca_jax.errors import UserError
from dca_jax.learner.values import VALUES
from dca_jax.review import REVIEWERS, REWRITERS, ReviewerConfig, Rewriter
from dca_jax.rollout import ENGINES, EngineConfig, Values
from dca_jax.tasks import TASKS, TaskConfig


class Choice(NamedTuple):
  """A section whose keys depend on what is chosen in it."""

  base: type[Any]
  """What every choice extends: a frozen dataclass."""
  known: Mapping[str, type[Any]]
  """The built-in choices by their names."""


# By the key that chooses. What is no built-in name is MODULE:CLASS or path/to/file.py:CLASS.
CHOICES = {
  "task.name": Choice(TaskConfig, TASKS),
  "reviewer.name": Choice(ReviewerConfig, REVIEWERS),
  "engine.name": Choice(EngineConfig, ENGINES),
  "credit.scheme": Choice(Scheme, SCHEMES),
  "value.source": Choice(Values, VALUES),
  "rewrite.source": Choice(Rewriter, REWRITERS),
}
CHOSEN = tuple(key.partition(".")[0] + "." for key in CHOICES)
"""The beginnings of the keys that depend on what is chosen."""


def choices_of(settings: Mapping[str, Any]) -> dict[str, Any]:
  """What flat settings choose."""
  return {key: settings[key] for key in CHOICES if key in settings}


def from_flat(settings: dict[str, Any]) -> Config:
  """The Config of flat settings and of what they imply; nothing but its types is checked."""
  config: Config = make(Config(), nested(settings), "")
  implied = {key: value for key, value in config.implied().items() if not settings.get(key)}
  return make(Config(), nested({**settings, **implied}), "") if implied else config


def make(defaults: Any, given: Any, prefix: str) -> Any:
  """The dataclass `defaults` with the values of `given`, a mapping of what differs.

  Args:
    prefix: the section's place in the tree, such as `learner.`; empty for a Config.

  Raises:
    ConfigError: a key is unknown, or a value has the wrong type.
  """
  if not isinstance(given, (ConfigDict, dict)):
    raise ConfigError(f"{prefix[:-1]}: must be a section with keys of its own, not {given!r}")
  known = {field.name: field for field in dataclasses.fields(defaults)}
  values: dict[str, Any] = {}
  for key, value in given.items():
    if key not in known:
      chosen = Config(**{prefix[:-1]: defaults}) if prefix in CHOSEN else Config()
      raise ConfigError(no_such(prefix + key, chosen, [prefix + name for name in known]))
    default = getattr(defaults, key)
    if not prefix and isinstance(value, (ConfigDict, dict)):
      default = _choice(key, default, value)
    if dataclasses.is_dataclass(default):
      values[key] = make(default, value, f"{prefix}{key}.")
      continue
    if (type(default), type(value)) in ((float, int), (tuple, list)):
      value = type(default)(value)
    if prefix + key in CHOICES or known[key].metadata.get("door"):
      value = absolute(value)
    if known[key].metadata.get("local"):
      value = located(value)
    if type(value) is not type(default):
      raise ConfigError(f"{prefix}{key}: must be of type {type(default).__name__}, not {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
      raise ConfigError(f"{prefix}{key}: must be a finite number, not {value!r}")
    values[key] = value
  return dataclasses.replace(defaults, **values)


def _choice(section: str, default: Any, given: Mapping[str, Any]) -> Any:
  """The section that `given` chooses, with its defaults; `default` where it says nothing."""
  key = next((key for key in CHOICES if key.startswith(f"{section}.")), None)
  if key is None or (name := given.get(key.partition(".")[2])) is None:
    return default
  try:
    kind = choose(absolute(name), key, *CHOICES[key])
  except UserError as error:
    raise ConfigError(str(error)) from error.__cause__
  return kind(**{key.partition(".")[2]: absolute(name)})


def no_such(key: str, config: Config, known: Iterable[str]) -> str:
  """Why there is no such key: another choice has it, or nobody has."""
  section, first, *_ = *key.split("."), ""
  own = any(other.startswith(f"{section}.{first}.") for other in known)
  for choice, (_, kinds) in CHOICES.items():
    others = {field.name for kind in kinds.values() for field in dataclasses.fields(kind)}
    if choice.startswith(f"{section}.") and first in others and not own:
      return f"{key}: has no effect, because {choice} is {operator.attrgetter(choice)(config)!r}"
  return f"{key}: no such key{nearest(key, known)}"


def check(config: Config) -> None:
  """Raises ConfigError where a section has an impossible value, or one without effect."""
  for prefix, section in _sections(config, ""):
    for key, why in getattr(section, "check", dict)().items():
      raise ConfigError(f"{prefix}{key}: {why} (it is {operator.attrgetter(key)(section)!r})")
  for key, why in unused(config).items():
    default = _default(config, key)
    raise ConfigError(f"{key}: has no effect, because {why}; leave it at its default ({default!r})")


def unused(config: Config) -> dict[str, str]:
  """The keys that differ from their defaults without having any effect, and why."""
  unused: dict[str, str] = {}
  for prefix, section in _sections(config, ""):
    unused |= {prefix + key: why for key, why in getattr(section, "unused", dict)().items()}
  return {key: why for key, why in unused.items() if _differs(config, key)}


def _differs(config: Config, key: str) -> bool:
  return operator.attrgetter(key)(config) != _default(config, key)


def _default(config: Config, key: str) -> Any:
  """What `key` is where nobody says anything but what is chosen."""
  if key in CHOICES:
    return operator.attrgetter(key)(Config())
  sections = {choice.partition(".")[0] for choice in CHOICES}
  chosen = {section: type(getattr(config, section))() for section in sections}
  return operator.attrgetter(key)(Config(**chosen))


def _sections(section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
  """Every section at or below `section`, with the beginning of its keys."""
  for field in dataclasses.fields(section):
    if dataclasses.is_dataclass(getattr(section, field.name)):
      yield from _sections(getattr(section, field.name), f"{prefix}{field.name}.")
  yield prefix, section  # Last, so that its checks can rely on sound values below.
