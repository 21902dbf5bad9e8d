"""The levels at which settings are given: an arm overrides the command line, which overrides
the recipe."""

import dataclasses
import importlib.util
import operator
import pathlib
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from dca_jax.config.sections import (
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
    layers.append(_parsed(arguments, _together(layers)))
  settings, left_out = _settled(layers)
  config = from_flat(settings)
  check(config)
  if left_out:
    print(f"note: left out for {_causes(layers, left_out)}: {', '.join(left_out)}", file=sys.stderr)
  return config


class Arm(NamedTuple):
  """An arm of a comparison."""

  config: Config
  left_out: tuple[str, ...]
  """The keys of the command line that it has no use for."""


def build_arm(
  given: ConfigDict | dict[str, Any],
  line: Sequence[str],
  own: Sequence[Sequence[str]],
  needed: Collection[str] = (),
) -> Arm:
  """Turns a recipe's ConfigDict into an arm, as `build` does, except that nothing is printed.

  Args:
    line: the command line's arguments, which all arms share. An arm leaves out those that it has no
      use for, even where the recipe had none either, and reads those that it alone knows.
    own: lists of the arm's arguments, each of which overrides what stands before.
    needed: keys of the line that may not be left out.

  Raises:
    ConfigError: see `build`.
  """
  layers = [_written(given)]
  before = _chosen(line, layers[0])
  known, after = _keys(before), _chosen([said for one in own for said in one], before)
  late = [x for x in line if "=" in x and _key(x) not in known and _key(x) in _keys(after)]
  strange = [x for x in line if _key(x) not in {*known, *_keys(after), *needed} and _is_setting(x)]
  layers.append(_parsed([x for x in line if x not in {*late, *strange}], layers[0]))
  layers[1] |= _parsed(late, after)
  for arguments in own:
    layers.append(_parsed(arguments, _together(layers)))
  optional = layers[1].keys() - _together(layers[2:]).keys() - {*needed}
  settings, left_out = _settled(layers, optional, {*needed} & layers[1].keys())
  config = from_flat(settings)
  check(config)
  return Arm(config, tuple([key for key in left_out if key in optional] + [*map(_key, strange)]))


def _together(layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
  return {key: value for layer in layers for key, value in layer.items()}


def _key(argument: str) -> str:
  return argument.split("=")[0].removeprefix("--config.")


def _is_setting(argument: str) -> bool:
  return argument.startswith("--config.") and "=" in argument


def _chosen(arguments: Sequence[str], said: Mapping[str, Any]) -> dict[str, Any]:
  """What flat settings choose, and `--config.section.key=value` arguments after them."""
  values = {_key(x): x.partition("=")[2] for x in arguments if "=" in x}
  return choices_of(said) | choices_of(values)


def _keys(chosen: Mapping[str, Any]) -> set[str]:
  """All keys that there are with these choices."""
  return {*flatten(dataclasses.asdict(make(Config(), nested(dict(chosen)), "")))}


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
  config = make(Config(), nested(_chosen(arguments, said)), "")
  full = dataclasses.asdict(config)
  known, keys = flatten(full), []
  for argument in arguments:
    key = _key(argument)
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


def _settled(
  layers: Sequence[dict[str, Any]],
  optional: Collection[str] = (),
  needed: Collection[str] = (),
) -> tuple[dict[str, Any], list[str]]:
  """The layers' keys together, and which keys of earlier ones were left out for the last.

  Args:
    optional: keys that are left out also where they had no effect before.
    needed: keys that never are.
  """
  *earlier, last = layers
  # What had no effect before is a mistake, which is not hidden.
  before = _moot(_settled(earlier, (), needed)[0]) if earlier else set()
  kept = last.keys() | {*needed} | (before - {*optional})
  settings = _together(layers)
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
