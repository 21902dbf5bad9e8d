"""What a script or a notebook calls: `train`, `load`, `evaluate`, and the `Run` that they give."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from dca_jax import config as config_lib
from dca_jax import learner
from dca_jax.config import CHOICES, Config, ConfigError, flatten, nested
from dca_jax.credit import Scheme
from dca_jax.devices import mesh
from dca_jax.devices.processes import put
from dca_jax.episode import Episode
from dca_jax.intervals import Estimate
from dca_jax.loop import train as run_training
from dca_jax.policy import Policy, join, pretrained, split
from dca_jax.policy.sharding import replicated
from dca_jax.review import ReviewerConfig
from dca_jax.rollout import GREEDY, EngineConfig, Sampler, Wanted, in_order
from dca_jax.rollout import evaluate as evaluation
from dca_jax.store.checkpoints import read_params, read_start
from dca_jax.store.metrics import read_metrics
from dca_jax.store.trajectories import read_trajectories
from dca_jax.store.workdir import locate
from dca_jax.tasks import Problem, TaskConfig
from dca_jax.tasks.tokenizer import id_count, text_of, unspelt

Callback = Callable[["Run", int, Mapping[str, float]], None]
"""Called with the run, a step and its metrics, when the step is recorded."""


class Metrics(list[dict[str, Any]]):
  """The lines of metrics.jsonl: a list of rows, each with its `step`."""

  def column(self, name: str) -> tuple[list[int], list[float]]:
    """The steps that measured `name`, and what they measured."""
    rows = [row for row in self if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]

  @property
  def names(self) -> list[str]:
    return sorted({name for row in self for name in row} - {"step"})


@dataclasses.dataclass(frozen=True)
class Run:
  """A run, from what it left in its workdir; also while it is under way."""

  workdir: str
  config: Config

  @property
  def metrics(self) -> Metrics:
    return Metrics(read_metrics(locate(self.workdir)))

  def episodes(self, step: int) -> list[Episode]:
    """What was trained on in a step, with what credit."""
    return [*read_trajectories(locate(self.workdir) / "trajectories", step)]

  @functools.cached_property
  def policy(self) -> "SavedPolicy":
    """That of the newest checkpoint, at the time when it is first asked for."""
    return SavedPolicy(self.config, self.workdir)


_STREAMED = 16
"""Tokens that a streamed answer gives at once."""


class SavedPolicy:
  """A policy that can be asked, on this process's devices."""

  def __init__(self, config: Config, workdir: str, step: int | None = None):
    """That of a checkpoint, the newest or the one of `step`; with an empty `workdir`, the policy
    that training would start from.

    Raises:
      UserError: there is no such checkpoint that can be read, or no `policy.pretrained`.
    """
    self._config, self.task = config, config.task.open()
    self.tokenizer = self.task.tokenizer()
    ids = id_count(self.tokenizer)
    devices = mesh.make_mesh(mesh.MeshConfig(), jax.local_devices()[:1])
    policy = Policy(pretrained.resolve(config.policy, ids), ids, devices)
    self._policy, self._everywhere = policy, replicated(devices)
    if workdir:
      self.step, trained = read_params(locate(workdir), step)
      frozen = split(read_start(locate(workdir)))[0] if config.policy.lora_rank else {}
      self._params = put(join(frozen, trained), self._everywhere)
    else:
      self.step, self._params = 0, self._published()
    engine = config.engine.open(policy, config.rollout, self.tokenizer)
    own = np.arange(config.rollout.problems)
    self._sampler = Sampler(engine, config.rollout, self.task, self.tokenizer, policy.rows, own)

  def _published(self) -> Any:
    if not (name := self._config.policy.pretrained):
      raise ConfigError("policy.pretrained: must be given where there is no --workdir")
    shapes = nn.unbox(jax.eval_shape(self._policy.init_params, jax.random.key(0)))
    shardings = jax.tree.map(lambda _: self._everywhere, shapes)
    return pretrained.load(self._policy, pretrained.folder(name, weights=True), shardings)

  def sample(
    self, prompts: Sequence[str], samples: int = 1, greedy: bool = False, seed: int = 0
  ) -> list[list[str]]:
    """Answers to each prompt, as the task would ask it, sampled as in training.

    Args:
      greedy: gives the likeliest token each time instead.
      seed: other seeds give other answers; a prompt's answers depend on its place too.
    """
    problems = [self._problem(i, prompt) for i, prompt in enumerate(prompts)]
    encoded, ids = self._sampler.encode(problems), range(len(prompts))
    numbers = np.full(samples, GREEDY) if greedy else np.arange(samples)
    drawn = in_order(self._sampler.stream(self._params, encoded, ids, numbers, (seed,)))
    texts = [text_of(self.tokenizer, sample.tokens) for sample in drawn]
    return [texts[i : i + samples] for i in range(0, len(texts), samples)]

  def score(self, prompt: str, completion: str) -> list[tuple[str, float]]:
    """The tokens of a completion, each with its log-probability (nats) after what stands before it,
    under the distribution that training samples from."""
    prompts, lengths = self._sampler.encode([self._problem(0, prompt)])
    ids = self.tokenizer(completion, add_special_tokens=False)["input_ids"]
    if why := unspelt(self.tokenizer, completion, ids):
      raise ConfigError(f"the completion: {why}")
    if not 1 <= len(ids) <= self._config.rollout.max_tokens:
      most = self._config.rollout.max_tokens
      raise ConfigError(
        f"the completion has {len(ids)} tokens; rollout.max_tokens allows 1 to {most}"
      )
    tokens_1xT = np.zeros((1, self._config.rollout.max_tokens), np.int32)
    tokens_1xT[0, : len(ids)] = ids
    counted_1xT = np.arange(tokens_1xT.size)[None] < len(ids)
    row = tokens_1xT, counted_1xT, np.ones(1, bool), np.zeros(tokens_1xT.shape, np.float32)
    batch = learner.Batch(*put((prompts, lengths, *row), self._everywhere))
    scored = learner.reference_logprobs(
      self._policy,
      self._config.rollout.sampling,
      self._params,
      batch,
    )
    pieces = [text_of(self.tokenizer, [token]) for token in ids]
    return list(zip(pieces, np.asarray(scored)[0, : len(ids)].tolist(), strict=True))

  def stream(self, problem: Problem, seed: int) -> Iterator[tuple[list[int], bool]]:
    """The tokens of a sampled answer, a few at a time, and whether it has ended with them; it is
    cut off where it never does."""
    prompts, lengths = self._sampler.encode([problem])
    ids_1xS = np.pad(prompts, ((0, 0), (0, self._config.rollout.max_tokens)))
    start, written, one = int(lengths[0]), 0, np.zeros(1, np.int32)
    while (room := self._config.rollout.max_tokens - written) > 0:
      limit, end = min(_STREAMED, room), start + written
      wanted = Wanted(ids_1xS, one + end, one, one[None], one + limit, one + written)
      (sample,) = self._sampler.engine.stream(self._params, wanted, (seed, written))
      yield sample.tokens.tolist(), not sample.truncated
      if not sample.truncated:
        return
      ids_1xS[0, end : end + len(sample.tokens)] = sample.tokens
      written += len(sample.tokens)

  def answers(self) -> evaluation.Answers:
    """To the task's held-out problems, as config.evaluate says."""
    return evaluation.answer(self._config.evaluate, self._sampler, self._params)

  def evaluate(self) -> dict[str, Estimate]:
    """Scores on the task's held-out problems, as config.evaluate says."""
    return evaluation.evaluate(self._config.evaluate, self._sampler, self._params)

  def _problem(self, i: int, prompt: str) -> Problem:
    return Problem(i, prompt, "", self.task.render(prompt))


def train(
  config: Config | ConfigDict | dict[str, Any] | str | os.PathLike[str],
  workdir: str | os.PathLike[str],
  resume: str = "auto",
  quiet: bool = False,
  *,
  callbacks: Sequence[Callback] = (),
  **chosen: TaskConfig | ReviewerConfig | Scheme | EngineConfig,
) -> Run:
  """Trains, or continues the run that is in `workdir`.

  Args:
    config: a Config, the settings of one, or a recipe's path.
    resume, quiet: see `dca_jax.loop.train`.
    callbacks: for process 0. What one raises ends the run; the step is recorded.
    chosen: `task`, `reviewer`, `scheme`, `engine`: objects in the place of what `config` chooses.
      They are recorded by their classes' names, so `load` finds them where those can be imported;
      those of a script or a notebook, where that has been run.

  Raises:
    UserError: bad input or circumstances; nothing that was saved is lost.
    Terminated, KeyboardInterrupt: the run was stopped; the same call again continues.
  """
  made = _config(config, chosen)
  run = Run(os.fspath(workdir), made)
  told = [functools.partial(callback, run) for callback in callbacks]
  run_training(made, run.workdir, resume, quiet, told)
  return run


def load(workdir: str | os.PathLike[str]) -> Run:
  """The run in a workdir.

  Raises:
    UserError: there is none, it is damaged, or what it chose cannot be imported here.
  """
  return Run(os.fspath(workdir), config_lib.saved_config(os.fspath(workdir)))


def evaluate(run: Run | str | os.PathLike[str]) -> dict[str, Estimate]:
  """Scores of a run's newest policy on the held-out problems of its task."""
  return (run if isinstance(run, Run) else load(run)).policy.evaluate()


_SECTIONS = {
  "task": "task.name",
  "reviewer": "reviewer.name",
  "scheme": "credit.scheme",
  "engine": "engine.name",
}


def _config(
  given: Config | ConfigDict | dict[str, Any] | str | os.PathLike[str], chosen: Mapping[str, Any]
) -> Config:
  """The config, with the settings of objects in the place of the sections that they stand for."""
  if isinstance(given, Config):
    if not chosen:
      return given
    given = dataclasses.asdict(given)
  elif not isinstance(given, ConfigDict | dict):
    path = os.fspath(given)
    if not chosen:
      return config_lib.load(path)
    given = config_lib.read_recipe(path).get_config()
  settings = flatten(ConfigDict(given).to_dict())
  for argument, thing in chosen.items():
    if argument not in _SECTIONS:
      raise TypeError(f"train() has no argument {argument!r}")
    section = _SECTIONS[argument].partition(".")[0] + "."
    settings = {key: value for key, value in settings.items() if not key.startswith(section)}
    settings |= _settings_of(argument, thing)
  return config_lib.build(ConfigDict(nested(settings)))


def _settings_of(argument: str, given: Any) -> dict[str, Any]:
  """What a recipe would say in the place of an object."""
  chooser = _SECTIONS[argument]
  section, _, key = chooser.partition(".")
  base, known = CHOICES[chooser]
  kind: type[Any] = type(given)
  if not isinstance(given, base):
    what = f"an object of a class that extends {base.__name__}"
    raise ConfigError(f"{argument}: must be {what}, not {given!r}")
  name = getattr(given, key)
  if kind not in known.values() and ":" not in name:
    name = f"{kind.__module__}:{kind.__qualname__}"
  thing: Any = given
  own = flatten(dataclasses.asdict(thing), f"{section}.")
  default = flatten(dataclasses.asdict(kind()), f"{section}.")
  return {k: v for k, v in own.items() if v != default[k]} | {chooser: name}
