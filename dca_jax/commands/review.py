"""Stored trajectories read again by another reviewer: how the two agree,
and what a run would cost."""

import collections
import contextlib
import functools
import json
import pathlib
import time
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from dca_jax import config as config_lib
from dca_jax.commands.report import text_table
from dca_jax.config import ConfigError
from dca_jax.episode import ROLES, Episode
from dca_jax.review import Request, Review, Reviewer, Truth, open_reviewer
from dca_jax.review.audit import kappa
from dca_jax.review.language import price_of, read_rubric
from dca_jax.review.prices import dollars
from dca_jax.review.prompt import make_prompt
from dca_jax.review.reviewer import split_member
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
  given = ConfigDict({"reviewer": {"name": name}, "credit": {"scheme": "weighted"}, "task": task})
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
    {"id": t.id, "review": r.status, "roles": r.roles, "weights": r.weights, "model": r.model}
    for t, r in zip(trajectories, reviews, strict=True)
  ]
  out.write_text("".join(json.dumps(line) + "\n" for line in lines))
  parts = [f"{len(reviews)} completions: {statuses}"]
  parts += [f"failed: {failures}"] if counted["ok"] < len(reviews) and failures else []
  parts += [f"the reviewer says: {problem}"] if problem else []
  parts += [f"spent: ${stats['review/dollars']:.4f}"] if "review/dollars" in stats else []
  return "\n\n".join([*parts, agreement(trajectories, reviews), f"reviews: {out}"])


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

  A token is taken to be four characters of prose or two of digits and symbols, and output to be 25
  tokens a step and 30 an answer. Thought is not in it, and with a model that thinks it is most of
  the price.
  """
  config = reviewer_config(member, overrides, {}).reviewer.client
  price = price_of(config)
  trajectories = read_folder(folder, limit)
  prompts = [make_prompt(read_rubric(config), [Request.of(t)]) for t in trajectories]
  prompt = sum((len(p.system) + len(json.dumps(p.schema))) / 4 + len(p.user) / 2 for p in prompts)
  output = sum(30 + 25 * sum(p.counts) for p in prompts)
  n = len(trajectories)
  lines = [
    f"a review: about {prompt / n:,.0f} tokens of prompt and {output / n:,.0f} of output, thought"
    " not counted"
  ]
  if price:
    each = dollars(price, round(prompt), 0, round(output)) / n
    run = config_lib.saved_config(str(locate(folder).parent))
    batch = run.rollout.problems * run.rollout.group
    lines.append(f"1,000 reviews with {config.model}: about ${1000 * each:.2f}")
    lines.append(
      f"this run, {run.steps} steps of {batch} completions, all of them reviewed: about"
      f" ${run.steps * batch * each:,.2f} (with `weighted` credit, groups that all fare alike are"
      " skipped)"
    )
  return "\n".join(lines)
