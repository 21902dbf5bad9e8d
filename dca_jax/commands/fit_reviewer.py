"""Trains a reviewer for a task: labels in, a folder that `reviewer.name="trained"` uses out."""

import collections
import dataclasses
import itertools
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dca_jax import config as config_lib
from dca_jax import reader
from dca_jax.commands.audit import Sizes, kept_answers, sample_answers
from dca_jax.commands.audit_page import cells
from dca_jax.commands.report import text_table
from dca_jax.config import Config, ConfigError
from dca_jax.episode import Episode
from dca_jax.intervals import Estimate, bootstrap, share
from dca_jax.policy import Policy, pretrained
from dca_jax.reader import FitConfig, Labelled, Reader, by_checks
from dca_jax.review import Request, Truth
from dca_jax.review.builtin import true_reviews
from dca_jax.review.faults import Labels, Planted, plant
from dca_jax.review.trained import FILE
from dca_jax.run import Programs, starting_policy, use_compilation_cache
from dca_jax.store.workdir import locate
from dca_jax.tasks.tokenizer import id_count

_HELD_OUT = 10
"""Every so many problems one is held out, to measure the reviewer with."""


class From(NamedTuple):
  """Where answers come from, and how many."""

  labels: str
  """`oracle`, the task's own; `planted`, faults planted in right answers; `reviews`, what another
  reviewer said; `spot-checks`, what steps were measured to do."""
  config: str = ""
  """A recipe, whose policy answers."""
  trajectories: str = ""
  """Or answers that a run has kept."""
  limit: int = 2000
  spot_checks: int = 1
  """Answers from before and after every step, where they are measured for this."""


def fit_reviewer(
  source: From, workdir: str, settings: Sequence[str], how: FitConfig, lora_rank: int = 8
) -> str:
  """Trains a reviewer and writes it to `workdir`; returns how good it is on held-out problems.

  Args:
    settings: `--config.section.key=value`, as in a shell.
    lora_rank: of the adapters, where the policy is a published model, which stays as it is.

  Raises:
    UserError: there are no such labels, or the folder holds a reviewer already.
  """
  folder = locate(workdir)
  if (folder / FILE).exists():
    raise ConfigError(f"--workdir={workdir} holds a trained reviewer already; choose another")
  config, home, episodes = _answers(source, workdir, settings)
  known = _SOURCES[source.labels](config, episodes)
  if not known:
    raise ConfigError(f"--from={source.labels}: none of the {len(episodes)} answers has any")
  held = [one for one in known if _is_held_out(one.request)]
  rest = [one for one in known if not _is_held_out(one.request)]
  if len(rest) < how.batch or not held:
    raise ConfigError(
      f"{len(known)} labelled answers are too few for --batch={how.batch} and a tenth to measure"
      " with; raise --limit"
    )
  limit = config.rollout.max_prompt_tokens + config.rollout.max_tokens
  begun = Reader.new(*_start(config, home, lora_rank), _gives(known), limit, how.seed)
  made = reader.fit(how, begun, rest)
  measures, seconds = measured(made, held)
  told = {name: e.value for name, e in measures.items()}
  reader.save(pathlib.Path(folder), made, {"answers": len(rest), **told})
  table = text_table(["held out", "measured", "95 %"], [cells(*pair) for pair in measures.items()])
  use = f"--config.reviewer.name=trained --config.reviewer.path={os.fspath(folder)}"
  return (
    f"trained on {len(rest)} answers, measured on {len(held)} of other problems\n\n{table}\n\n"
    f"{1000 * seconds / len(held):.1f} s for 1,000 reviews; use it with\n  {use}"
  )


def _answers(
  source: From, workdir: str, settings: Sequence[str]
) -> tuple[Config, Any, list[Episode]]:
  """The settings of the answers' policy, where its start is kept, and the answers."""
  if source.config:
    given = config_lib.read_recipe(source.config).get_config()
    plain = ["--config.reviewer.name=none", "--config.credit.scheme=uniform"]
    config = config_lib.build(given, plain, settings)
    folder = config_lib.claim_workdir(config, workdir)
    checks = source.spot_checks if source.labels == "spot-checks" else 0
    sample_answers(config, folder, Sizes(source.limit, spot_checks=checks))
    return config, folder, kept_answers(folder / "trajectories", source.limit)
  kept = locate(source.trajectories)
  config = config_lib.saved_config(os.fspath(kept.parent))
  return config, kept.parent, kept_answers(kept, source.limit)


def _start(config: Config, home: Any, lora_rank: int) -> tuple[Policy, Any, Any]:
  """The reader's policy, the parameters that it starts from, and its tokenizer."""
  use_compilation_cache()
  task = config.task.open()
  tokenizer = task.tokenizer()
  ids = id_count(tokenizer)
  plain = pretrained.resolve(config.policy, ids)
  if config.policy.pretrained:
    adapted = dataclasses.replace(
      plain, pretrained=config.policy.pretrained, lora_rank=lora_rank, weights="float32"
    )
    policy = reader.own_policy(adapted, ids)
    return policy, reader.base(policy), tokenizer
  whole = Policy(plain, ids)
  programs = Programs(config, whole, task, tokenizer, None)
  start = starting_policy(config, home, whole, task, tokenizer, programs)
  return reader.own_policy(plain, ids), jax.device_get(start), tokenizer


def _by_oracle(config: Config, episodes: Sequence[Episode]) -> list[Labelled]:
  if "labels" not in config.task.offers:
    raise ConfigError(f"--from=oracle: task '{config.task.name}' knows no true roles of steps")
  truth = Truth.of(config.task.open())
  requests = [*map(Request.of, episodes)]
  reviews = true_reviews(truth, requests)
  return [
    Labelled(r, review.roles, truth.expected(r), review.values or _outcome(e))
    for r, review, e in zip(requests, reviews, episodes, strict=True)
  ]


def _by_faults(config: Config, episodes: Sequence[Episode]) -> list[Labelled]:
  known = "labels" in config.task.offers
  return with_faults(
    [*map(Request.of, episodes)], Truth.of(config.task.open()).labels if known else None
  )


def with_faults(requests: Sequence[Request], labels: Labels | None) -> list[Labelled]:
  """Right answers with a fault, as many of each kind, and without; together no more than there are
  requests. Not every kind can be planted in the answers of every task."""
  half = len(requests) // 2
  kinds: dict[tuple[str, int], list[Planted]] = collections.defaultdict(list)
  for one in plant(requests, half, labels):
    if any(one.case.labels):
      kinds[one.fault, one.tier].append(one)
  found = []
  for one in itertools.chain(*(own[: half // len(kinds)] for own in kinds.values())):
    roles, before, behind = one.case.labels, one.first, one.first + one.new
    steps, twin = one.case.request.steps, one.twin.steps
    # What was not touched is right, but need not be needed.
    right = [*steps[:before], *twin[before : before + one.old], *steps[behind:]]
    expected = right if len(right) == len(steps) else ()
    found.append(Labelled(one.case.request, roles, expected))
    plain = [""] * len(twin)
    plain[before] = "necessary"
    found.append(Labelled(one.twin, plain, twin))
  return found


_RIGHT = ("necessary", "inherits", "repair")
"""Of a step with such a role the reviewer says that it is what should stand there, given what it
reads; so what is right is learnt too, and over many steps single mistakes of the reviewer fade."""


def _by_reviews(config: Config, episodes: Sequence[Episode]) -> list[Labelled]:
  found = []
  for e in (e for e in episodes if e.review.status == "ok" and e.review.roles):
    request, roles = Request.of(e), e.review.roles
    steps = zip(request.steps, roles, strict=True)
    expected = [step if role in _RIGHT else "" for step, role in steps]
    values = e.values if len(e.values) else _outcome(e)
    found.append(Labelled(request, roles, expected, values))
  return found


_SOURCES: dict[str, Callable[[Config, Sequence[Episode]], list[Labelled]]] = {
  "oracle": _by_oracle,
  "planted": _by_faults,
  "reviews": _by_reviews,
  "spot-checks": lambda _, episodes: by_checks(episodes),
}


def _outcome(episode: Episode) -> list[float]:
  """What became of the episode, as the value of each of its prefixes: right on average."""
  return [episode.outcome.reward] * len(episode.steps)


def _is_held_out(request: Request) -> bool:
  problem = int(request.id.split("/")[1])
  return problem % _HELD_OUT == 0


def _gives(known: Sequence[Labelled]) -> tuple[str, ...]:
  return tuple(
    name
    for name in ("roles", "expected", "values", "effects")
    if any(len(getattr(one, name)) for one in known)
  )


def measured(made: Reader, held: Sequence[Labelled]) -> tuple[dict[str, Estimate], float]:
  """How far the reader is right about labelled requests, and the seconds that it takes for them.

  `read`: share of the requests that it can read. `roles`: share of the steps with the role that
  their label says. `values` and `effects`: correlation with the labels.
  """
  requests = [one.request for one in held]
  reviews = made.reviews(requests)
  began = time.monotonic()
  made.reviews(requests)  # Once more, with everything compiled.
  seconds = time.monotonic() - began
  read = [(one, r) for one, r in zip(held, reviews, strict=True) if r.status == "ok"]
  found = {"read": share([r.status == "ok" for r in reviews])}
  if any(len(one.roles) for one, _ in read):
    right = [[a == b for a, b in zip(one.roles, r.roles, strict=True) if a] for one, r in read]
    found["roles"] = share([sum(own) for own in right], [len(own) for own in right])
  signed = [
    [w if role == "necessary" else -w for role, w in zip(r.roles, r.weights, strict=True)]
    for _, r in read
  ]
  problems = [one.request.problem for one, _ in read]
  for name, said in (("values", [r.values for _, r in read]), ("effects", signed)):
    labels = [getattr(one, name) for one, _ in read]
    if any(map(len, labels)):
      found[name] = _correlation(problems, labels, said)
  return found, seconds


def _correlation(
  problems: Sequence[str], labels: Sequence[Sequence[float]], said: Sequence[Sequence[float]]
) -> Estimate:
  """Pearson's, with an interval from problems drawn again, because answers to one are alike."""
  moments: dict[str, np.ndarray] = {}
  for problem, own_labels, own_said in zip(problems, labels, said, strict=True):
    x, y = np.array([own_labels, own_said], float)
    x, y = x[~np.isnan(x)], y[~np.isnan(x)]
    sums = np.array([len(x), x.sum(), y.sum(), x @ x, y @ y, x @ y])
    moments[problem] = moments.get(problem, 0) + sums

  def pearson(totals_Rx6: np.ndarray) -> np.ndarray:
    n, x, y, xx, yy, xy = totals_Rx6.T
    spread = np.sqrt(np.maximum((n * xx - x**2) * (n * yy - y**2), 0))
    return np.divide(n * xy - x * y, spread, out=np.full_like(n, np.nan), where=spread > 0)

  return bootstrap([*moments.values()], pearson)
