"""The levels at which settings are given: an arm overrides the command line, which overrides
the recipe."""

import dataclasses
import importlib.util
import operator
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from dca_jax.config.sections import (
  CHOICES,
  CHOSEN,
  check,
  choices_of,
  from_flat,
  make,
  no_such,
  unused,
)
from dca_jax.config.tree import Config, ConfigError, flatten, nested


def load(path: str, overrides: Sequence[str] = ()) -> Config:
  """Reads the recipe at `path` and builds the Config, as the command line's `overrides` say."""
  recipe = read_recipe(path)
  try:
    return build(recipe.get_config(), overrides)
  except ConfigError as error:
    raise ConfigError(f"{error} (--config={path})") from None


def read_recipe(path: str) -> Any:
  """The recipe's module; it has `get_config()` and may have `ARMS`."""
  if not pathlib.Path(path).is_file():
    raise ConfigError(f"--config={path}: no such file")
  spec = importlib.util.spec_from_file_location("recipe", path)
  if spec is None or spec.loader is None:
    raise ConfigError(f"--config={path}: a recipe is a Python file, NAME.py")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except SyntaxError as error:
    raise ConfigError(f"--config={path}: line {error.lineno}: {error.msg}") from error
  if not hasattr(module, "get_config"):
    raise ConfigError(f"--config={path}: the file defines no get_config()")
  return module


def build(given: ConfigDict | dict[str, Any], *overrides: Sequence[str]) -> Config:
  """Turns a recipe's ConfigDict into a Config.

  Each of `overrides` is a list of `--config.section.key=value` arguments that overrides what
  stands on its left: the command line overrides the recipe, and an arm of a comparison overrides
  both. What was set earlier and has no effect with them, or contradicts them, is left out, and a
  line on stderr says so.

  Raises:
    ConfigError: a key is unknown, has the wrong type or an impossible value, or differs from its
      default without having any effect.
  """
  layers = [_written(given)]
  for arguments in overrides:
    layers.append(_parsed(arguments, {k: v for layer in layers for k, v in layer.items()}))
  settings, left_out = _settled(layers)
  config = from_flat(settings)
  check(config)
  if left_out:
    print(f"note: left out for {_causes(layers, left_out)}: {', '.join(left_out)}", file=sys.stderr)
  return config


def _written(given: Any) -> dict[str, Any]:
  """The keys that a recipe sets, flat, with values of the right types."""
  if not isinstance(given, (ConfigDict, dict)):
    raise ConfigError(f"get_config() must return a ConfigDict, not {given!r}")
  sound = make(Config(), given, "")
  return {key: operator.attrgetter(key)(sound) for key in flatten(ConfigDict(given).to_dict())}


def _parsed(arguments: Sequence[str], said: dict[str, Any]) -> dict[str, Any]:
  """The keys that `--config.section.key=value` arguments set, flat, with values of the right types.

  Args:
    said: the keys that were set before, of which the choices decide which keys there are.
  """
  chosen = choices_of(said)
  for argument in arguments:
    key, equals, value = argument.removeprefix("--config.").partition("=")
    if equals and key in CHOICES:
      chosen[key] = value
  config = make(Config(), nested(chosen), "")
  full = dataclasses.asdict(config)
  known, keys = flatten(full), []
  for argument in arguments:
    key = argument.split("=")[0].removeprefix("--config.")
    if argument.startswith("--config."):
      if key not in known:
        raise ConfigError(no_such(key, config, known))
      keys.append(key)
  typed = ConfigDict(full)
  values, argv = flags.FlagValues(), ["dca-jax", *arguments]
  try:
    config_flags.DEFINE_config_dict("config", typed, flag_values=values, sys_argv=argv)
    strays = values(argv, known_only=True)[1:]
  except (flags.Error, TypeError, ValueError) as error:
    raise ConfigError(str(error).removeprefix("flag --config.")) from None
  if strays:
    stray = strays[0].lstrip("-")
    hint = f"--config.{stray}" if stray.split("=")[0] in known else "--config.section.key=value"
    raise ConfigError(f"cannot read the argument {strays[0]!r}; settings are given as {hint}")
  said = flatten(typed.to_dict())
  return {key: said[key] for key in keys}


def _settled(layers: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
  """The layers' keys together, and which keys of earlier ones were left out for the last."""
  *earlier, last = layers
  # What had no effect before is a mistake, which is not hidden.
  kept = last.keys() | (_moot(_settled(earlier)[0]) if earlier else set())
  settings = {key: value for layer in layers for key, value in layer.items()}
  left_out: list[str] = []
  while moot := sorted(_moot(settings) & settings.keys() - kept):
    left_out += moot
    settings = {key: value for key, value in settings.items() if key not in moot}
  return settings, left_out


def _moot(settings: dict[str, Any]) -> set[str]:
  """Keys that have no effect with the others, or contradict them."""
  fields = flatten(dataclasses.asdict(make(Config(), nested(choices_of(settings)), "")))
  if foreign := {key for key in settings if key.startswith(CHOSEN) and key not in fields}:
    return foreign
  config = from_flat(settings)
  return config.gives_way() | unused(config).keys()


def _causes(layers: Sequence[dict[str, Any]], left_out: Sequence[str]) -> str:
  """The overrides without which less would be left out; all, where no single one decides."""
  said = {key: value for layer in layers[1:] for key, value in layer.items() if key not in left_out}

  def decides(key: str) -> bool:
    without = [{k: v for k, v in layer.items() if k != key} for layer in layers[1:]]
    return not set(left_out) <= set(_settled([layers[0], *without])[1])

  causes = {key: value for key, value in said.items() if decides(key)} or said
  return " ".join(f"--config.{key}={value}" for key, value in causes.items())
