"""A run's settings: typed sections made from a ConfigDict, every mistake found before the first step."""

import dataclasses
import importlib.util
import json
import math
import operator
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from dca_jax.checks import at_least, between
from dca_jax.credit import SCHEMES, Scheme, Uniform
from dca_jax.devices.mesh import MeshConfig
from dca_jax.doors import absolute, choose, nearest
from dca_jax.errors import UserError
from dca_jax.learner import LearnerConfig
from dca_jax.learner.supervised import WarmstartConfig
from dca_jax.learner.values import VALUES
from dca_jax.policy import PolicyConfig
from dca_jax.review import REVIEWERS, Nobody, ReviewerConfig
from dca_jax.rollout import RolloutConfig
from dca_jax.rollout.evaluate import EvaluateConfig
from dca_jax.rollout.prefixes import FromReviewer, Values
from dca_jax.store import hold
from dca_jax.store.checkpoints import CheckpointConfig
from dca_jax.store.workdir import is_remote, locate, write_whole
from dca_jax.tasks import TASKS, ChainsConfig, TaskConfig


class ConfigError(UserError):
  """A mistake in a config; the message names the key and says what to do."""


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that determines a run. A recipe sets what differs from these defaults."""

  seed: int = 0
  """Decides the problems and the noise of every step."""
  steps: int = 100
  """Training steps: batches sampled, reviewed and trained on."""
  task: TaskConfig = ChainsConfig()
  policy: PolicyConfig = PolicyConfig()
  warmstart: WarmstartConfig = WarmstartConfig()
  rollout: RolloutConfig = RolloutConfig()
  reviewer: ReviewerConfig = Nobody()
  value: Values = FromReviewer()
  credit: Scheme = Uniform()
  learner: LearnerConfig = LearnerConfig()
  evaluate: EvaluateConfig = EvaluateConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  mesh: MeshConfig = MeshConfig()

  def check(self) -> dict[str, str]:
    """Mistakes that no section can see alone."""
    bad = at_least(1, self, "steps") | between(0, 2**31 - 1, self, "seed")
    if self.policy.pretrained and self.warmstart.total:
      bad["warmstart.steps" if self.warmstart.steps else "warmstart.clean_steps"] = (
        "must be 0 with policy.pretrained"
      )
    if self.rollout.problems % self.learner.micro_batches:
      bad["learner.micro_batches"] = f"must divide rollout.problems ({self.rollout.problems})"
    if self.checkpoint.best and self.checkpoint.best not in self.evaluate.scores:
      bad["checkpoint.best"] = f"is no score{nearest(self.checkpoint.best, self.evaluate.scores)}"
    if self.reviewer.overlap and self.learner.loss != "ppo":
      bad["learner.loss"] = (
        "must be 'ppo' with reviewer.overlap, because the batch was sampled by an older policy"
      )
    if "labels" not in self.task.offers and (readers := _labelled(self.reviewer.members)):
      bad["reviewer.name"] = (
        f"asks {readers[0]}, which reads step labels, and task '{self.task.name}' has none"
      )
    elif missing := self._lacks:
      bad["reviewer.name"] = missing
    if "demonstrations" not in self.task.offers:
      for key in (*_WARM, "reviewer.canary_every"):
        if operator.attrgetter(key)(self):
          bad[key] = f"must be 0, because task '{self.task.name}' has no demonstrations"
    return bad

  @property
  def _wanted(self) -> set[str]:
    """What the scheme reads of reviews: roles, values or both."""
    return {*self.credit.reads} - (set() if self.value.from_reviewer else {"values"})

  @property
  def _unheard(self) -> bool:
    """Whether the scheme reads what nobody says."""
    return bool(self._wanted) and not any(member.gives for member in self.reviewer.members)

  @property
  def _lacks(self) -> str:
    """Why the scheme gets nothing, or not all, of what it reads from reviews; empty if it does."""
    scheme = f"credit.scheme '{self.credit.scheme}'"
    if self._unheard:
      return f"is '{self.reviewer.name}', so {scheme} would be uniform; choose a reviewer"
    for member in self.reviewer.members:
      if missing := self._wanted - member.gives_of(self.task.offers):
        what = "prefix values" if "values" in missing else "roles"
        who = (
          f"is '{member.name}', which" if member is self.reviewer else f"asks {member.name}, which"
        )
        return f"{who} gives no {what}, which {scheme} reads; see the value section"
    return ""

  def unused(self) -> dict[str, str]:
    unused, scheme = {}, f"credit.scheme is '{self.credit.scheme}'"
    if self.policy.pretrained:
      unused["warmstart.seed"] = "policy.pretrained is set, so no weights are drawn"
    if "values" not in self.credit.reads:
      unused["value.source"] = f"{scheme}, which reads no values"
    if not self.credit.reads:
      unused["reviewer.name"] = f"{scheme}, which reads no review"
    elif "roles" not in self.credit.reads and not self.value.from_reviewer:
      unused["reviewer.name"] = f"{scheme} and value.source '{self.value.source}'"
    if (
      self.learner.loss == "ppo"
      and self.learner.updates_per_batch == 1
      and not self.reviewer.overlap
    ):
      # With one update on a fresh batch the ratio is exactly 1, so its clip never acts.
      why = "learner.updates_per_batch is 1 and reviewer.overlap 0"
      unused |= dict.fromkeys(("learner.clip_low", "learner.clip_high"), why)
    return unused

  def implied(self) -> dict[str, Any]:
    """What other settings decide of the keys that nobody set."""
    values = {
      f"task.{key}": value for key, value in self.task.implied(self.policy.pretrained).items()
    }
    if "demonstrations" not in self.task.offers or self.policy.pretrained:
      values |= {"warmstart.clean_steps": 0, "warmstart.steps": 0}
    return values

  def gives_way(self) -> set[str]:
    """Keys at odds with another one, which are left out where the other was said later."""
    gives, offers = set(), self.task.offers
    if "demonstrations" not in offers or self.policy.pretrained:
      gives |= {key for key in _WARM if operator.attrgetter(key)(self)}
    if "demonstrations" not in offers and self.reviewer.canary_every:
      gives.add("reviewer.canary_every")
    if "labels" not in offers:
      gives |= {"reviewer.name"} if _labelled(self.reviewer.first) else set()
      gives |= {"reviewer.escalate"} if _labelled(self.reviewer.second) else set()
    if self._unheard:
      gives.add("credit.scheme")
    return gives

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

  def fixed(self) -> dict[str, Any]:
    """All keys that change what is computed, and their values."""
    return {k: v for k, v in flatten(dataclasses.asdict(self)).items() if not _is_free(k, self)}


def _labelled(members: Sequence[ReviewerConfig]) -> list[str]:
  """Those of some reviewers that read a task's own step labels."""
  return [member.name for member in members if "labels" in member.reads_truth]


_WARM = ("warmstart.clean_steps", "warmstart.steps")

# Keys that a resumed run may change: they alter what is saved, measured and spent, not what is learnt from.
_FREE = (
  "checkpoint.",
  "evaluate.",
  "mesh.",
  "reviewer.canary_every",
  "reviewer.deadline",
  "reviewer.required",
  "reviewer.client.",
  "task.verifier_seconds",
)
# But for these, which decide what is asked.
_ASKED = ("model", "thinking", "base_url", "vertex", "rubric", "whole_group", "max_output_tokens")


def _is_free(key: str, config: Config) -> bool:
  if (
    key == "steps"
  ):  # More continue the same run, unless the learning rate depends on where the end is.
    return config.learner.schedule == "constant"
  return key.startswith(_FREE) and key.removeprefix("reviewer.client.") not in _ASKED


def build(given: ConfigDict, *overrides: Sequence[str]) -> Config:
  """Turns a recipe's ConfigDict into a Config.

  Each of `overrides` is a list of `--config.section.key=value` arguments, and goes before what
  stands on its left: the command line before the recipe, and an arm of a comparison before both.
  What was said earlier and is without effect beside them, or contradicts them, is left out, and a
  line on stderr says so.

  Raises:
    ConfigError: a key is unknown, has the wrong type or an impossible value, or differs from its default without having
      any effect.
  """
  layers = [_written(given)]
  for arguments in overrides:
    layers.append(_parsed(arguments, {k: v for layer in layers for k, v in layer.items()}))
  settings, left_out = _settled(layers)
  config = _from_flat(settings)
  check(config)
  if left_out:
    print(f"note: left out for {_causes(layers, left_out)}: {', '.join(left_out)}", file=sys.stderr)
  return config


def _written(given) -> dict[str, Any]:
  """The keys that a recipe sets, flat, with values of the right types."""
  if not isinstance(given, (ConfigDict, dict)):
    raise ConfigError(f"get_config() must return a ConfigDict, not {given!r}")
  sound = _section(Config(), given, "")
  return {key: operator.attrgetter(key)(sound) for key in flatten(ConfigDict(given).to_dict())}


def _parsed(arguments: Sequence[str], said: dict[str, Any]) -> dict[str, Any]:
  """The keys that `--config.section.key=value` arguments set, flat, with values of the right types.

  Args:
    said: the keys that were set before, of which the choices decide which keys there are.
  """
  chosen = _chosen(said)
  for argument in arguments:
    key, equals, value = argument.removeprefix("--config.").partition("=")
    if equals and key in CHOICES:
      chosen[key] = value
  config = _section(Config(), nested(chosen), "")
  full = dataclasses.asdict(config)
  known, keys = flatten(full), []
  for argument in arguments:
    key = argument.split("=")[0].removeprefix("--config.")
    if argument.startswith("--config."):
      if key not in known:
        raise ConfigError(_no_such(key, config, known))
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
  # What was in vain before is a mistake, which is not hidden.
  kept = last.keys() | (_moot(_settled(earlier)[0]) if earlier else set())
  settings = {key: value for layer in layers for key, value in layer.items()}
  left_out: list[str] = []
  while moot := sorted(_moot(settings) & settings.keys() - kept):
    left_out += moot
    settings = {key: value for key, value in settings.items() if key not in moot}
  return settings, left_out


def _moot(settings: dict[str, Any]) -> set[str]:
  """Keys without effect beside the others, or that contradict them."""
  fields = flatten(dataclasses.asdict(_section(Config(), nested(_chosen(settings)), "")))
  if foreign := {key for key in settings if key.startswith(_CHOSEN) and key not in fields}:
    return foreign
  config = _from_flat(settings)
  return config.gives_way() | _unused(config).keys()


def _causes(layers: Sequence[dict[str, Any]], left_out: Sequence[str]) -> str:
  """The overrides without which less would be left out; all, where no single one decides."""
  said = {key: value for layer in layers[1:] for key, value in layer.items() if key not in left_out}

  def decides(key: str) -> bool:
    without = [{k: v for k, v in layer.items() if k != key} for layer in layers[1:]]
    return not set(left_out) <= set(_settled([layers[0], *without])[1])

  causes = {key: value for key, value in said.items() if decides(key)} or said
  return " ".join(f"--config.{key}={value}" for key, value in causes.items())


def _from_flat(settings: dict[str, Any]) -> Config:
  config = _section(Config(), nested(settings), "")
  implied = {key: value for key, value in config.implied().items() if not settings.get(key)}
  return _section(Config(), nested({**settings, **implied}), "") if implied else config


def nested(flat: dict[str, Any]) -> dict[str, Any]:
  """The sections of flat settings; the opposite of `flatten`."""
  sections: dict[str, Any] = {}
  for key, value in flat.items():
    *path, name = key.split(".")
    place = sections
    for section in path:
      place = place.setdefault(section, {})
    place[name] = value
  return sections


def check(config: Config) -> None:
  """Raises ConfigError where a section has an impossible value, or one without effect."""
  for prefix, section in _sections(config, ""):
    for key, why in getattr(section, "check", dict)().items():
      raise ConfigError(f"{prefix}{key}: {why} (it is {operator.attrgetter(key)(section)!r})")
  for key, why in _unused(config).items():
    default = _default(config, key)
    raise ConfigError(f"{key}: has no effect, because {why}; leave it at its default ({default!r})")


def _unused(config: Config) -> dict[str, str]:
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


def load(path: str, overrides: Sequence[str] = ()) -> Config:
  """Reads the recipe at `path` and builds the Config, as the command line's `overrides` say."""
  recipe = read_recipe(path)
  try:
    return build(recipe.get_config(), overrides)
  except ConfigError as error:
    raise ConfigError(f"{error} (--config={path})") from None


def read_recipe(path: str):
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


def difference(ours: Config, saved: str) -> list[str]:
  """The keys in which `ours` differs from a saved config.json and that a resumed run may not change."""
  mine, theirs = flatten(json.loads(ours.to_json())), flatten(json.loads(saved))
  changes = []
  for key in {**theirs, **mine}:
    if key not in mine or key not in theirs:
      what = f"new ({mine[key]!r} here)" if key in mine else "not known"
      changes.append(f"{key} is {what} in this version of dca-jax")
    elif mine[key] != theirs[key]:
      changes.append(f"{key} was {theirs[key]!r} and is now {mine[key]!r}")
  return [change for change in changes if not _is_free(change.split()[0], ours)]


def read_saved(workdir: str) -> dict[str, Any]:
  """What the config.json of a run says, section by section; another version may have written it.

  Raises:
    ConfigError: there is no run, or the file is damaged.
  """
  path = locate(workdir) / "config.json"
  if not path.exists():
    raise ConfigError(f"--workdir={workdir} holds no run")
  return _read_json(path)


def _read_json(path: epath.Path) -> dict[str, Any]:
  try:
    saved = json.loads(path.read_bytes().decode())
    if not isinstance(saved, dict):
      raise ValueError("no settings in it")
  except (ValueError, RecursionError) as error:
    line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
    raise ConfigError(
      f"{path}{line} is damaged ({getattr(error, 'msg', error)}); the command that began the run writes it anew"
    ) from None
  return saved


def saved_config(workdir: str) -> Config:
  """The Config of a run.

  Raises:
    ConfigError: there is no run, or its config.json is damaged or of another version.
  """
  saved = read_saved(workdir)
  try:
    return build(saved)
  except ConfigError as error:
    path = locate(workdir) / "config.json"
    wrong = (
      ": " if error.__cause__ else " is not of this version of dca-jax: "
    )  # Something of the user's.
    raise ConfigError(f"{path}{wrong}{error}") from error.__cause__


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for key, value in nested.items():
    flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
  return flat


class Choice(NamedTuple):
  """A section whose keys depend on what is chosen in it."""

  base: type
  """What every choice extends: a frozen dataclass."""
  known: Mapping[str, type]
  """The built-in choices by their names."""


# By the key that chooses. What is no built-in name is MODULE:CLASS or path/to/file.py:CLASS.
CHOICES = {
  "task.name": Choice(TaskConfig, TASKS),
  "reviewer.name": Choice(ReviewerConfig, REVIEWERS),
  "credit.scheme": Choice(Scheme, SCHEMES),
  "value.source": Choice(Values, VALUES),
}
_CHOSEN = tuple(key.partition(".")[0] + "." for key in CHOICES)


def _chosen(settings: Mapping[str, Any]) -> dict[str, Any]:
  return {key: settings[key] for key in CHOICES if key in settings}


def _choice(section: str, default, given):
  """The section that `given` chooses, with its defaults; `default` where it says nothing."""
  key = next((key for key in CHOICES if key.startswith(f"{section}.")), None)
  if key is None or (name := given.get(key.partition(".")[2])) is None:
    return default
  try:
    kind = choose(absolute(name), key, *CHOICES[key])
  except UserError as error:
    raise ConfigError(str(error)) from error.__cause__
  return kind(**{key.partition(".")[2]: absolute(name)})


def _section(defaults, given, prefix: str):
  """The dataclass `defaults` with the values of `given`, a mapping of what differs."""
  if not isinstance(given, (ConfigDict, dict)):
    raise ConfigError(f"{prefix[:-1]}: must be a section with keys of its own, not {given!r}")
  known = {field.name: field for field in dataclasses.fields(defaults)}
  values = {}
  for key, value in given.items():
    if key not in known:
      chosen = Config(**{prefix[:-1]: defaults}) if prefix in _CHOSEN else Config()
      raise ConfigError(_no_such(prefix + key, chosen, [prefix + name for name in known]))
    default = getattr(defaults, key)
    if not prefix and isinstance(value, (ConfigDict, dict)):
      default = _choice(key, default, value)
    if dataclasses.is_dataclass(default):
      values[key] = _section(default, value, f"{prefix}{key}.")
      continue
    if (type(default), type(value)) in ((float, int), (tuple, list)):
      value = type(default)(value)
    if prefix + key in CHOICES or known[key].metadata.get("door"):
      value = absolute(value)
    if type(value) is not type(default):
      raise ConfigError(f"{prefix}{key}: must be of type {type(default).__name__}, not {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
      raise ConfigError(f"{prefix}{key}: must be a finite number, not {value!r}")
    values[key] = value
  return dataclasses.replace(defaults, **values)


def _no_such(key: str, config, known: Iterable[str]) -> str:
  """Why there is no such key: another choice has it, or nobody has."""
  section, first, *_ = *key.split("."), ""
  own = any(other.startswith(f"{section}.{first}.") for other in known)
  for choice, (_, kinds) in CHOICES.items():
    others = {field.name for kind in kinds.values() for field in dataclasses.fields(kind)}
    if choice.startswith(f"{section}.") and first in others and not own:
      return f"{key}: has no effect, because {choice} is {operator.attrgetter(choice)(config)!r}"
  return f"{key}: no such key{nearest(key, known)}"


def _sections(section, prefix: str):
  for field in dataclasses.fields(section):
    if dataclasses.is_dataclass(getattr(section, field.name)):
      yield from _sections(getattr(section, field.name), f"{prefix}{field.name}.")
  yield prefix, section  # Last, so that its checks can rely on sound values below.


def claim_workdir(config: Config, workdir: str, resume: str = "auto") -> epath.Path:
  """Makes `workdir` the home of this run, or checks that it already is.

  A config.json that is damaged or gone is written anew where there are checkpoints, which know
  their settings too.

  Raises:
    ConfigError: it holds a run, and `resume` is `never`; or a run with other settings or more steps, or files that are
      no run; or it cannot be reached.
  """
  folder = locate(workdir)
  try:
    wrong = _other_run(config, folder, resume)
    if not wrong:
      folder.mkdir(parents=True, exist_ok=True)
      write_whole(folder / "config.json", config.to_json())
  except ConfigError:
    raise
  except Exception as error:  # A bucket's client reports with types of its own.
    if not is_remote(folder):
      raise
    reason = f"({type(error).__name__}: {str(error)[:200]}); is there such a bucket, and are you signed in?"
    raise ConfigError(f"--workdir={workdir} cannot be written {reason}") from error
  if wrong:
    raise ConfigError(f"--workdir={workdir} {wrong}")
  return folder


def _other_run(config: Config, folder: epath.Path, resume: str) -> str:
  """Why the run of `config` cannot go on in `folder`, or begin there; empty if it can."""
  saved, checkpoints = folder / "config.json", folder / "checkpoints"
  done = (
    max((int(p.name) for p in checkpoints.iterdir() if p.name.isdigit()), default=0)
    if checkpoints.exists()
    else 0
  )
  elsewhere = "; choose another --workdir"
  if not saved.exists():
    if not done:
      there = folder.exists() and {path.name for path in folder.iterdir()} - {
        ".config.json",
        hold.NAME,
      }
      return f"holds files but no config.json, so no run{elsewhere}" if there else ""
    print(f"warning: {saved} is gone; it is written anew", file=sys.stderr)
  elif resume == "never":
    return f"already holds a run, and --resume is never{elsewhere}"
  else:
    try:
      changes = difference(config, json.dumps(_read_json(saved)))
      if not any((folder / name).exists() for name in ("start", "checkpoints", "metrics.jsonl")):
        # A reviewer that could not be reached ended it before it began.
        changes = [change for change in changes if not change.startswith("reviewer.")]
      if changes:
        return f"holds a different run: {changes[0]}{elsewhere}"
    except ConfigError as error:
      if not done:
        raise ConfigError(f"{str(error).split(';')[0]}, and no step is saved{elsewhere}") from None
      print(f"warning: {str(error).split(';')[0]}; it is written anew", file=sys.stderr)
  if (last := int(resume) if resume.isdigit() else done) > config.steps:
    asked = f"more than steps={config.steps}; give as many, or another --workdir"
    return f"holds {last} steps already, {asked}"
  return ""
