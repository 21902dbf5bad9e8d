"""Stored trajectories read again by another reviewer: how the two agree,
and what a run would cost."""

import collections
import contextlib
import functools
import json
import pathlib
import time
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dca_jax import config as config_lib
from dca_jax.commands.report import text_table
from dca_jax.config import ConfigError
from dca_jax.episode import ROLES, Episode
from dca_jax.review import Request, Review, Reviewer, Truth, open_reviewer
from dca_jax.review.audit import kappa
from dca_jax.review.client_config import ClientConfig
from dca_jax.review.contexts import is_long_enough
from dca_jax.review.language import form_of, price_of
from dca_jax.review.prices import THOUGHT, dollars, thinks_at
from dca_jax.review.prompt import LEAST_TOKENS, Form, Prompt, ask_about
from dca_jax.review.reviewer import split_member
from dca_jax.store.metrics import read_metrics
from dca_jax.store.trajectories import read_trajectories, shards
from dca_jax.store.workdir import is_remote, locate


def read_folder(folder: str, limit: int) -> list[Episode]:
  """The first `limit` trajectories of a run's `trajectories` folder that have been reviewed, or
  else the first ones."""
  path = locate(folder)
  found = [t for step in shards(path) for t in read_trajectories(path, step)]
  if not found:
    raise ConfigError(
      f"--trajectories={folder}: no trajectories there (a run keeps them in WORKDIR/trajectories)"
    )
  return ([t for t in found if t.review.status == "ok"] or found)[:limit]


def reviewer_config(member: str, overrides: Sequence[str], task: dict) -> config_lib.Config:
  """The config of NAME or NAME:MODEL with `--config.reviewer.key=value` arguments,
  for a run's `task` section."""
  name, model = split_member(member)
  given = ConfigDict({"reviewer": {"name": name}, "credit": {"scheme": "calibrated"}, "task": task})
  if model:
    given.reviewer.client = {"model": model}
  return config_lib.build(given, overrides)


def rereview(folder: str, member: str, limit: int, overrides: Sequence[str]) -> str:
  """Reviews stored trajectories again and says how far the two reviews agree;
  keeps the new ones next to the folder.

  Raises:
    UserError: there is nothing to read, or the reviewer cannot be opened.
  """
  trajectories = read_folder(folder, limit)
  run = locate(folder).parent
  config = reviewer_config(member, overrides, config_lib.read_saved(str(run)).get("task", {}))
  # The task is made only for a reviewer that reads its labels.
  task = functools.cache(config.task.open)
  truth = Truth(lambda r: Truth.of(task()).labels(r), lambda *a: Truth.of(task()).values(*a))
  cache = None if is_remote(run) else pathlib.Path(run / "reviews.sqlite")
  with contextlib.closing(open_reviewer(config.reviewer, truth, cache)) as reviewer:
    reviews = review_patiently(reviewer, [*map(Request.of, trajectories)], 600.0)
    stats, problem, failures = reviewer.stats(), reviewer.problem(), reviewer.failures()
  reviews = [review.checked(len(t.steps)) for review, t in zip(reviews, trajectories, strict=True)]
  counted = collections.Counter(review.status for review in reviews)
  statuses = ", ".join(f"{n} {status}" for status, n in counted.most_common())
  if not counted["ok"]:
    raise ConfigError(
      f"no usable review of {len(reviews)} ({statuses})" + (f": {failures}" if failures else "")
    )
  out = run / f"rereview_{member.replace(':', '_').replace('/', '_')}.jsonl"
  lines = [
    {"id": t.id, "review": r.status}
    | {k: getattr(r, k) for k in ("roles", "weights", "values", "reasons", "model")}
    for t, r in zip(trajectories, reviews, strict=True)
  ]
  out.write_text("".join(json.dumps(line) + "\n" for line in lines))
  parts = [f"{len(reviews)} completions: {statuses}"]
  parts += [f"failed: {failures}"] if counted["ok"] < len(reviews) and failures else []
  parts += [f"the reviewer says: {problem}"] if problem else []
  parts += [f"spent: ${stats['review/dollars']:.4f}"] if "review/dollars" in stats else []
  parts += [agreement(trajectories, reviews), *_differences(trajectories, reviews)]
  return "\n\n".join([*parts, f"reviews: {out}"])


def _differences(trajectories: Sequence[Episode], reviews: Sequence[Review]) -> list[str]:
  """The first steps where the two differ and the new reviewer says why."""
  rows = [
    [step.text.strip()[:60], old, new, why]
    for t, review in zip(trajectories, reviews, strict=True)
    for step, old, new, why in zip(
      t.steps, t.review.roles, review.roles, review.reasons, strict=False
    )
    if old != new and why
  ]
  return [text_table(["step", "stored", "new", "why"], rows[:8])] if rows else []


def review_patiently(
  reviewer: Reviewer, requests: Sequence[Request], seconds: float, pause: float = 2.0
) -> list[Review]:
  """The reviews of `requests`; not hurried as a training step is, it outlasts an outage."""
  end = time.monotonic() + seconds
  reviews = reviewer.submit(requests, seconds).result()
  while (left := end - time.monotonic()) > pause:
    again = [i for i, review in enumerate(reviews) if review.status == "circuit_open"]
    if not again:
      break
    time.sleep(pause)
    asked = reviewer.submit([requests[i] for i in again], left - pause).result()
    for i, review in zip(again, asked, strict=True):
      reviews[i] = review
  return reviews


def agreement(trajectories: Sequence[Episode], reviews: Sequence[Review]) -> str:
  """How the stored roles and the new ones compare, step by step: share, Cohen's kappa (1960),
  and the table."""
  pairs = [
    pair
    for t, review in zip(trajectories, reviews, strict=True)
    for pair in zip(t.review.roles, review.roles, strict=False)
  ]
  if not pairs:
    return "no step was reviewed both times"
  counts = np.zeros((len(ROLES), len(ROLES)), int)
  for pair in pairs:
    counts[*map(ROLES.index, pair)] += 1
  agreed = f"same role in {np.trace(counts) / len(pairs):.3f} of {len(pairs)} steps"
  rows = [
    [f"{role} ({own.sum()})", *map(str, own)]
    for role, own in zip(ROLES, counts, strict=True)
    if own.any()
  ]
  table = text_table(["stored \\ new", *ROLES], rows)
  return f"{agreed}; kappa {kappa(counts[None])[0]:.3f}\n\n{table}"


def estimate(folder: str, member: str, limit: int, overrides: Sequence[str]) -> str:
  """What reviewing like these stored trajectories costs; calls nobody.

  A token is taken to be four characters of prose or two of digits and symbols, and output to be 30
  tokens a reply and three fifths of what its steps may take. Thought is as the run measured it,
  where it had the same reviewer, or else as `prices.THOUGHT` supposes.
  """
  config = reviewer_config(member, overrides, {}).reviewer.client
  price, form, run = price_of(config), form_of(config), locate(folder).parent
  trajectories = read_folder(folder, limit)
  every = [p for t in trajectories for p in _questions(form, Request.of(t))]
  prompts = [*{p.key: p for p in every}.values()] * config.samples
  prompt = sum((len(p.system) + len(json.dumps(p.schema))) / 4 + len(p.user()) / 2 for p in prompts)
  kept = [p for p in prompts if config.keep_instructions and is_long_enough(config.model, p.system)]
  cached = sum(len(p.system) / 4 for p in kept)
  each_thought, known = _thought(run, config)
  output = sum(30 + 0.6 * (p.tokens - LEAST_TOKENS) + each_thought for p in prompts)
  n = len(trajectories)
  lines = [
    f"a review: about {len(prompts) / n:.1f} calls, {prompt / n:,.0f} tokens of prompt and"
    f" {output / n:,.0f} of output, {each_thought:,.0f} a call of them thought ({known})"
  ]
  if price:
    each = dollars(price, round(prompt), round(cached), round(output)) / n
    saved = config_lib.saved_config(str(run))
    batch = saved.rollout.problems * saved.rollout.group
    lines.append(f"1,000 reviews with {config.model}: about ${1000 * each:.2f}")
    lines.append(
      f"this run, {saved.steps} steps of {batch} completions, all of them reviewed: about"
      f" ${saved.steps * batch * each:,.2f} (with `weighted` credit, groups that all fare alike are"
      " skipped)"
    )
  return "\n".join(lines)


def _questions(form: Form, request: Request) -> Iterator[Prompt]:
  """All that is asked about an answer; what depends on earlier replies without those."""
  asking = ask_about(form, [request])
  with contextlib.suppress(StopIteration):
    prompts = next(asking)
    while True:
      yield from prompts
      prompts = asking.send([["not answered"]] * len(prompts))


def _thought(run: epath.Path, config: ClientConfig) -> tuple[float, str]:
  """Tokens of thought for a call, and how they are known."""
  client = config_lib.read_saved(str(run)).get("reviewer", {}).get("client", {})
  rows = [row for row in read_metrics(run) if row.get("review/calls")]
  if rows and all(client.get(k) == getattr(config, k) for k in ("model", "thinking", "level")):
    thought, calls = (sum(row[f"review/{k}"] for row in rows) for k in ("thought_tokens", "calls"))
    return thought / calls, "as this run measured"
  level = config.thinking or thinks_at(config.model)
  return THOUGHT.get(level, 0), f"supposed at level {level}" if level else "unknown, not counted"
