"""How good a reviewer is: measured on steps whose roles are known, with a verdict on training."""

import collections
import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from dca_jax import config as config_lib
from dca_jax.commands.audit_page import cells, confusion_rows, write_page
from dca_jax.commands.report import text_table
from dca_jax.commands.review import review_patiently, reviewer_config
from dca_jax.config import ASKED, Config, ConfigError
from dca_jax.credit import worth
from dca_jax.episode import ROLES, Check, Episode, Review
from dca_jax.intervals import Estimate, share
from dca_jax.policy import Policy, pretrained
from dca_jax.review import Request, Reviewer, Truth, open_reviewer
from dca_jax.review.audit import (
  Case,
  Judged,
  agreement,
  applause,
  favourite,
  said_of,
  usable,
)
from dca_jax.review.effects import Checked, effects
from dca_jax.review.faults import Pair, Planted, caught, plant, unchanged
from dca_jax.review.processbench import read_processbench
from dca_jax.review.reviewer import split_member
from dca_jax.rollout import Continues, collect
from dca_jax.rollout.spot import SpotConfig, measured
from dca_jax.run import Programs, check_data, starting_policy, use_compilation_cache
from dca_jax.store.trajectories import read_trajectories, shards, write_trajectories
from dca_jax.store.workdir import is_remote, locate, write_whole
from dca_jax.tasks.tokenizer import id_count

VERSION = 1
"""Of the row; it changes whenever a key changes its meaning."""
_SECONDS = 600.0
"""In which one portion of the questions is to be answered."""
_DRAWS = 12
"""Samples drawn again for the intervals of what a reviewer is worth."""


class Sizes(NamedTuple):
  """How much an audit looks at."""

  limit: int = 256
  """Answers to read."""
  planted: int = 12
  """Faults of each kind to plant in right answers."""
  repeat: float = 0.0
  """Share of the questions that is asked twice."""
  spot_checks: int = 0
  """With a recipe: answers that its policy writes from before and after every step of groups whose
  rewards differ, to measure what the steps did."""


class Source(NamedTuple):
  """Where the truth comes from."""

  name: str
  cases: list[Case]
  planted: list[Planted]
  checks: dict[Request, Mapping[int, Check]]
  """Measured effects of steps, where there are any."""
  truth: Truth
  """For reviewers that read it."""
  config: Config
  """Of the reviewer, and of the task where there is one."""


def from_recipe(
  recipe: str, member: str, overrides: Sequence[str], workdir: str, sizes: Sizes
) -> Source:
  """Episodes of the policy that a recipe's run would start from; they are kept in the workdir.

  Raises:
    UserError: the settings do not fit, or the workdir holds something else.
  """
  name, model = split_member(member)
  chosen = [f"--config.reviewer.name={name}", "--config.credit.scheme=calibrated"]
  chosen += [f"--config.reviewer.client.model={model}"] if model else []
  given = config_lib.read_recipe(recipe).get_config()
  config = config_lib.build(given, chosen, overrides)
  folder = config_lib.claim_workdir(config, workdir)
  sample_answers(config, folder, sizes)
  episodes = kept_answers(folder / "trajectories", sizes.limit)
  if sizes.spot_checks and not any(episode.checks for episode in episodes):
    raise ConfigError(
      f"--spot-checks={sizes.spot_checks}: the answers in {workdir} have none; take a new --workdir"
    )
  return _of_episodes(config, episodes, sizes.planted)


def from_trajectories(folder: str, member: str, overrides: Sequence[str], sizes: Sizes) -> Source:
  """Episodes that a run has kept.

  Raises:
    UserError: there are none, or nothing of them is known.
  """
  run = config_lib.read_saved(os.fspath(locate(folder).parent))
  config = reviewer_config(member, overrides, run.get("task", {}))
  episodes = kept_answers(locate(folder), sizes.limit)
  if not episodes:
    raise ConfigError(f"--trajectories={folder}: there are none (a run keeps WORKDIR/trajectories)")
  return _of_episodes(config, episodes, sizes.planted)


def from_processbench(path: str, member: str, overrides: Sequence[str], limit: int) -> Source:
  """Solutions of a file in the form of ProcessBench.

  Raises:
    UserError: it is of another form.
  """
  cases, truth = read_processbench(path, limit)
  return Source("processbench", cases, [], {}, truth, reviewer_config(member, overrides, {}))


def kept_answers(folder: epath.Path, limit: int) -> list[Episode]:
  found = (e for step in shards(folder) for e in read_trajectories(folder, step))
  return [*itertools.islice((e for e in found if e.steps), limit)]


def _of_episodes(config: Config, episodes: Sequence[Episode], planted: int) -> Source:
  """Labels where the task has them, and faults planted in right answers in any case."""
  name, requests = config.task.name, [*map(Request.of, episodes)]
  checks = {request: e.checks for request, e in zip(requests, episodes, strict=True) if e.checks}
  if "labels" in config.task.offers:
    truth = Truth.of(config.task.open())
    cases = [Case.of(request, truth.labels(request)) for request in requests]
    return Source(name, cases, plant(requests, planted, truth.labels), checks, truth, config)
  if not (made := plant(requests, planted)) and not checks:
    raise ConfigError(
      f"task '{name}' knows no true roles of steps, and no fault could be planted: that takes"
      " --planted above 0 and right answers of at least three steps"
    )
  nothing = Truth(lambda r: (), lambda _, answers: [()] * len(answers))
  return Source(name, [], made, checks, nothing, config)


def sample_answers(config: Config, folder: epath.Path, sizes: Sizes) -> None:
  """Samples until there are enough episodes; what was sampled before is not sampled again."""
  kept = folder / "trajectories"
  have = sum(1 for step in shards(kept) for _ in read_trajectories(kept, step))
  if have >= sizes.limit:
    return
  use_compilation_cache()
  task = config.task.open()
  tokenizer = task.tokenizer()
  ids = id_count(tokenizer)
  policy = Policy(pretrained.resolve(config.policy, ids), ids)
  check_data(config, task, tokenizer, policy.rows)
  programs = Programs(config, policy, task, tokenizer, None)
  start = starting_policy(config, folder, policy, task, tokenizer, programs)
  params = programs.for_sampler(start)
  step = max(shards(kept), default=0)
  while have < sizes.limit:
    step += 1
    rollout = collect(programs.sampler, config.seed, step, params)
    if sizes.spot_checks:
      further = Continues(programs.sampler, params, (config.seed + 2**31, 2**31 + step))
      every = SpotConfig(1.0, step, sizes.spot_checks)
      rollout, _ = measured(every, config.seed, step, further, rollout)
    blank = [dataclasses.replace(e, credit=[0.0] * len(e.tokens)) for e in rollout.episodes]
    write_trajectories(kept, step, 0, blank)
    have += len(blank)


class Audited(NamedTuple):
  """What an audit found, which is also in the workdir's audit.json and audit.html."""

  row: dict[str, Any]
  table: str
  """The row, for people."""


def audit(
  reviewer: str,
  workdir: str | os.PathLike[str],
  *,
  config: str = "",
  trajectories: str = "",
  processbench: str = "",
  settings: Sequence[str] = (),
  **sizes: Any,
) -> Audited:
  """Measures how good a reviewer is, as `dca-jax audit` does; the same call again goes on.

  Args:
    reviewer: NAME or NAME:MODEL.
    workdir: where answers, replies and results are kept.
    config, trajectories, processbench: one of them, where the answers come from: a recipe, whose
      policy writes them, a run's folder of trajectories, or a file of solutions.
    settings: `--config.section.key=value`, as in a shell.
    sizes: see `Sizes`.

  Raises:
    UserError: bad input, or a language model without a usable review.
  """
  how, own, folder = (reviewer, settings), Sizes(**sizes), os.fspath(workdir)
  if [bool(x) for x in (config, trajectories, processbench)].count(True) != 1:
    raise ConfigError("one of config, trajectories and processbench says where answers come from")
  if own.spot_checks and not config:
    raise ConfigError(f"--spot-checks={own.spot_checks}: only with --config, whose policy answers")
  if config:
    source = from_recipe(config, *how, folder, own)
  elif trajectories:
    source = from_trajectories(trajectories, *how, own)
  else:
    source = from_processbench(processbench, *how, own.limit)
  offers = source.config.task.offers
  if not source.checks and source.config.reviewer.gives_of(offers) == {"values"}:
    raise ConfigError(f"{reviewer} gives values alone, which only --spot-checks can tell right")
  told = [said for said in settings if said.startswith("--config.reviewer.")]
  return _audit(source, reviewer, told, folder, own.repeat)


def _audit(
  source: Source, member: str, settings: Sequence[str], workdir: str, repeat: float
) -> Audited:
  """Has the cases reviewed, measures, and writes what it finds."""
  folder = locate(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  questions = [*(case.request for case in source.cases), *source.checks]
  for planted in source.planted:
    questions += [planted.case.request, planted.twin]
  requests = [*dict.fromkeys(questions)]
  reviews, stats = _reviewed(source, requests, folder, repeat)
  said = dict(zip(requests, reviews, strict=True))
  judged = [Judged(case, said[case.request]) for case in source.cases]
  pairs = [Pair(p, said[p.case.request], said[p.twin]) for p in source.planted]
  pairs = [pair for pair in pairs if usable(pair.edited) and usable(pair.twin)]
  checked = [Checked(request, checks, said[request]) for request, checks in source.checks.items()]
  checked = [one for one in checked if _told(one.review)]
  by_faults = [Judged(p.planted.case, p.edited) for p in pairs] + [*map(unchanged, pairs)]
  measures = {"usable": share([_told(review) for review in reviews])} | effects(checked)
  measures |= agreement(judged) | caught(pairs) | learning(judged or by_faults)
  row = {
    "version": VERSION,
    "reviewer": split_member(member)[0],
    # A server that names a model by its file names the file alone here.
    "model": next((r.model.rpartition("/")[2] for r in reviews if r.model), ""),
    "settings": " ".join(_telling(settings)),
    "source": source.name,
    "n": len(requests),
    "steps": sum(len(request.steps) for request in requests),
    **dict.fromkeys(_ALWAYS),
    **flat(measures),
    **stats,
    "verdict": worth.verdict(*map(measures.get, _DECIDING)),
  }
  write_whole(folder / "audit.json", json.dumps(row, indent=2, allow_nan=False) + "\n")
  sections = sectioned(measures)
  verdict = _VERDICTS[str(row["verdict"])]
  write_page(folder, f"dca-jax audit: {_title(row)}", verdict, sections, judged, pairs)
  return Audited(row, table(row, sections, judged))


def _told(review: Review) -> bool:
  """Whether a review says what an audit can use: values only where it has no roles."""
  return usable(review) if review.roles else review.status == "ok" and len(review.values) > 0


def _telling(settings: Sequence[str]) -> list[str]:
  """Those that decide what a reviewer says, without where it is called and how often."""
  said = [one.removeprefix("--config.reviewer.") for one in settings]
  kept = {f"client.{key}" for key in ASKED} - {"client.model", "client.base_url", "client.vertex"}
  return [one for one in said if not one.startswith("client.") or one.partition("=")[0] in kept]


_ALWAYS = ("role_accuracy", "kappa", "first_error_f1", "errors_in_wins", "predicted_speedup")
"""Keys that every row has; null where the truth does not tell."""


def _reviewed(
  source: Source, requests: Sequence[Request], folder: epath.Path, repeat: float
) -> tuple[list[Review], dict[str, float | None]]:
  """The reviews, and what they cost."""
  cache = None if is_remote(folder) else pathlib.Path(folder / "reviews.sqlite")
  config = source.config.reviewer
  if repeat and config.models:
    client = dataclasses.replace(config.client, repeat_frac=repeat)
    config = dataclasses.replace(config, client=client)
  longest = max(_SECONDS, 8 * config.client.attempt_seconds)
  begins = not (folder / "reviews.sqlite").exists()
  with contextlib.closing(open_reviewer(config, source.truth, cache)) as reviewer:
    if begins and (wrong := reviewer.trial(60.0).wrong):
      raise ConfigError(f"no usable review from {wrong}")
    reviewer.stats()  # What the first question took does not count.
    began = time.monotonic()
    reviews = _asked(reviewer, requests, 8 * config.client.concurrency, longest)
    seconds = time.monotonic() - began
    stats = reviewer.stats()
    if repeat and not config.models:
      part = requests[: math.ceil(repeat * len(requests))]
      again = _asked(reviewer, part, len(requests), longest)
      stats["review/repeat_agreement"] = _same(reviews, again)
    failures = reviewer.failures()
  reviews = [r.checked(len(asked.steps)) for r, asked in zip(reviews, requests, strict=True)]
  if config.models and not any(map(_told, reviews)):
    statuses = collections.Counter(review.status for review in reviews)
    said = ", ".join(f"{n} {status}" for status, n in statuses.most_common())
    raise ConfigError(f"no usable review of {len(reviews)} ({said}){failures and f': {failures}'}")
  return reviews, costs(stats, len(requests), seconds)


def _asked(reviewer: Reviewer, requests: Sequence[Request], portion: int, seconds: float):
  reviews = []
  for i in range(0, len(requests), portion):
    reviews += review_patiently(reviewer, requests[i : i + portion], seconds)
    if len(requests) > portion:
      print(f"reviewed {len(reviews)} of {len(requests)}", file=sys.stderr)
  return reviews


def _same(reviews, again) -> float:
  """The share of steps that have the same role both times; 0 where none has been reviewed twice."""
  pairs = [
    a == b
    for one, other in zip(reviews, again, strict=False)
    for a, b in zip(one.roles, other.roles, strict=False)
  ]
  return float(np.mean(pairs)) if pairs else 0.0


def learning(judged: Sequence[Judged]) -> dict[str, Estimate]:
  """What the reviewer is worth for training: the update it induces on the exact task, and the
  speed-up on `chains` that is read off the surface. Empty where the cases do not tell."""
  labelled = [j for j in judged if j.case.labels]
  favoured = favourite([j for j in labelled if usable(j.review)])

  def numbers(own: Sequence[Judged], seed: int) -> list[float] | None:
    told = [j for j in own if usable(j.review)]
    part = len(told) / len(own)
    words = said_of(told, favoured)
    said = {name: [worth.Word(*word) for word in own] for name, own in words.items()}
    found = worth.worth(said, part, seed)
    liked = applause(told, favoured)
    if found is None or liked is None:
      return None
    return [*found, worth.predicted_speedup(found.snr, part * liked)]

  if not favoured or (value := numbers(labelled, 0)) is None:
    return {}
  dice = np.random.default_rng(0)
  drawn = [
    numbers([labelled[i] for i in dice.integers(len(labelled), size=len(labelled))], seed)
    for seed in range(1, 1 + _DRAWS)
  ]
  spread = 1.96 * np.std([x for x in drawn if x] or [value], axis=0)
  names = ("gradient_cosine", "gradient_snr", "performing", "calibrated_gain", "predicted_speedup")
  measures = {
    name: Estimate(x, x - s, x + s)
    for name, x, s in zip(names, value, spread.tolist(), strict=True)
  }
  speedup = measures["predicted_speedup"]
  return measures | {"predicted_speedup": speedup._replace(low=max(0.0, speedup.low))}


def flat(measures: Mapping[str, Estimate]) -> dict[str, float | None]:
  """Each measure and the ends of its interval, as keys of a row; null where an end is unknown."""
  return {
    f"{name}{end}": round(x, 6) if math.isfinite(x) else None
    for name, e in measures.items()
    for end, x in zip(("", "_low", "_high"), e, strict=True)
  }


def costs(stats: Mapping[str, float], n: int, seconds: float) -> dict[str, float | None]:
  """What 1,000 reviews take, however many calls each; tokens and seconds only of those that this
  process asked for, because a cache does not keep them."""
  calls = stats.get("review/calls", 0.0)
  tokens = sum(stats.get(f"review/{kind}_tokens", 0.0) for kind in ("prompt", "output"))
  made = stats.get("review/status_ok", 1.0) - stats.get("review/cached", 0.0)
  fresh = n * made if calls or "review/calls" not in stats else 0.0
  return {
    "seconds_per_1000": round(1000 * seconds / fresh, 3) if fresh else None,
    "tokens_per_1000": round(1000 * tokens / fresh) if fresh and calls else None,
    "dollars_per_1000": round(1000 * stats.get("review/dollars_spent", 0.0) / n, 6),
    "self_agreement": stats.get("review/repeat_agreement"),
  }


_SECTIONS = {
  "reviews": ("usable",),
  "roles": ("role_accuracy", "kappa", "recall_", "precision_"),
  "errors": ("first_error", "no_error", "errors_in_wins"),
  "needless steps": ("needless", "applause"),
  "planted faults": ("planted", "false_alarms", "premium_", "suffix_leak"),
  "what does not matter": ("position", "length"),
  "measured effects": ("effect_",),
  "training": ("gradient", "performing", "calibrated", "predicted"),
}


def sectioned(measures: Mapping[str, Estimate]) -> dict[str, list[tuple[str, Estimate]]]:
  """The measures under headings."""
  return {
    title: [(k, e) for k, e in measures.items() if k.startswith(beginnings)]
    for title, beginnings in _SECTIONS.items()
  }


def _title(row: Mapping[str, Any]) -> str:
  who = " ".join(filter(None, (row["reviewer"], row["model"], row["settings"])))
  return f"{who} on {row['n']} answers of {row['source']}, {row['steps']} steps"


def table(
  row: Mapping[str, Any],
  sections: Mapping[str, Sequence[tuple[str, Estimate]]],
  judged: Sequence[Judged],
) -> str:
  """The row for people."""
  lines: list[list[str]] = []
  for title, own in sections.items():
    lines += [["", "", ""]] * bool(lines and own) + [[title, "", ""]] * bool(own)
    lines += [cells(f"  {name}", e) for name, e in own]
  parts = [_title(row), text_table(["", "measured", "95 %"], lines)]
  if rows := confusion_rows([j for j in judged if usable(j.review) and j.case.labels]):
    parts.append(text_table(["true \\ said", *ROLES], rows))
  parts.append(_MEANING)
  spent = [f"{k.replace('_', ' ')}: {row[k]:g}" for k in _COSTS if row[k] is not None]
  return "\n\n".join([*parts, "; ".join(spent), f"verdict: {_VERDICTS[row['verdict']]}"])


_MEANING = (
  "docs/reviewers.md says what each measure means. Faults are planted in right answers, and read"
  " beside their untouched twins; predicted_speedup is what such a reviewer brought on `chains`."
)
_DECIDING = "predicted_speedup", "calibrated_gain", "premium_wrong_number"
_COSTS = ("seconds_per_1000", "tokens_per_1000", "dollars_per_1000", "self_agreement")
_VERDICTS = {
  "train": "train (credit.scheme=weighted, credit.lam=0.5)",
  "calibrated": "calibrated (only where outcomes decide what its roles are worth)",
  "no": "no (it says nothing that training could use)",
}
