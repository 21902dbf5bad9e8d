"""A batch on its way to the learner: sampled, verified, cut into steps, reviewed, credit assigned.

Where several processes share a run, each has the problems of its own devices here, and no others.
"""

import contextlib
import functools
import itertools
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np

from dca_jax import patterns
from dca_jax.config import Config
from dca_jax.credit import Review, group_advantages, token_advantages
from dca_jax.errors import UserError
from dca_jax.processes import gather, put
from dca_jax.review import Request, Reviewer
from dca_jax.review import Review as HostReview
from dca_jax.roles import ROLES
from dca_jax.rollout import Sampler, Samples, cut, cut_at_stops, encode_prompts, step_texts
from dca_jax.rollout.verify import attempts, neutral, verify
from dca_jax.task import Outcome, Problem, Task
from dca_jax.task.tokenizer import end_ids, text_of, token_bytes


class Rollout(NamedTuple):
  """One batch on the host, or this process's part of it: P problems, B = P * G completions."""

  problems: list[Problem]
  prompts_PxS: np.ndarray
  prompt_lengths_P: np.ndarray
  samples: Samples
  outcomes: list[Outcome]
  trained_B: np.ndarray
  """False in groups that `rollout.zero_variance` leaves out, where `learner.mask_truncated` does, and
  where the verifier gave no verdict."""
  sampled: list[Outcome]
  """Of everything sampled for this step, groups that were replaced included."""
  generated: int
  """Tokens sampled for this step, for such groups too."""


class Group(NamedTuple):
  """One problem and its G completions."""

  problem: Problem
  prompt_S: np.ndarray
  prompt_length: int
  samples: Samples
  outcomes: list[Outcome]

  @property
  def mixed(self) -> bool:
    return len({outcome.reward for outcome in self.outcomes if outcome.judged}) > 1


# Problems that groups are refilled from are counted from here on. No run comes so far with the
# others, so an epoch of these has an order of its own, and a sample noise of its own.
_FURTHER = 2**31


def collect(sampler: Sampler, seed: int, step: int, task: Task, tokenizer, params) -> Rollout:
  """Samples and verifies the batch of `step`.

  Its problems are the next ones of the training split, whatever earlier steps were refilled with, so that all
  have their turn in every epoch. Groups are refilled from an order of their own.
  """
  config = sampler.config
  refill = config.zero_variance == "refill"
  rounds = config.refill_rounds if refill else 1
  key, own = step_key(seed, step, sampler.end_ids_E.sharding), sampler.own(config.problems)
  sampled: list[Group] = []
  further = ((step - 1) * (rounds - 1) + i for i in range(rounds - 1))
  for first in ((step - 1) * config.problems, *(_FURTHER + i * config.problems for i in further)):
    numbers = first + own
    problems = [task.problem("train", (seed << 32) + int(n)) for n in numbers]
    prompts, lengths = encode_prompts(tokenizer, problems, config.max_prompt_tokens, sampler.policy.rows)
    samples = sampler(params, prompts, lengths, numbers, key, np.arange(config.group))
    samples = cut_at_stops(config.stop, tokenizer, samples)
    outcomes = verify(task, attempts(tokenizer, problems, samples))
    by_group = [x.reshape(len(own), config.group, *x.shape[1:]) for x in samples]
    for p, problem in enumerate(problems):
      mine = Samples(*(x[p] for x in by_group))
      judged = neutral(outcomes[p * config.group : (p + 1) * config.group])
      sampled.append(Group(problem, prompts[p], lengths[p], mine, judged))
    if refill and all(gather("refill", sum(group.mixed for group in sampled) >= len(own))):
      break
  # Mixed groups first, each kind in the order of its problems.
  kept = sorted(sampled, key=lambda group: not group.mixed)[: len(own)] if refill else sampled
  trained = [group.mixed or config.zero_variance == "keep" for group in kept]
  outcomes = [outcome for group in kept for outcome in group.outcomes]
  return Rollout(
    [group.problem for group in kept],
    np.stack([group.prompt_S for group in kept]),
    np.array([group.prompt_length for group in kept], np.int32),
    Samples(*(np.concatenate(x) for x in zip(*(group.samples for group in kept), strict=True))),
    outcomes,
    np.repeat(trained, config.group) & [outcome.judged for outcome in outcomes],
    [outcome for group in sampled for outcome in group.outcomes],
    sum(int(group.samples.lengths_B.sum()) for group in sampled),
  )


def check_data(config: Config, task: Task, tokenizer, rows: int) -> dict[str, float]:
  """Reads every problem of a task that has an end: a bad one is found now (UserError), not in the middle of a run.

  Args:
    rows: of the policy's embedding.

  Returns:
    A metric of such a task: the share of the held-out problems to be evaluated that are training problems too.
  """
  prompts: dict[str, list[str]] = {}
  if min(end_ids(tokenizer)) >= rows:
    ends = f"every end token of the tokenizer {list(end_ids(tokenizer))}"
    raise UserError(
      f"task.tokenizer: {ends} lies beyond the {rows} rows of the policy's embedding; take the model's own"
    )
  for split, size in task.sizes.items():
    for first in range(0, size, 512):
      problems = [task.problem(split, i) for i in range(first, min(first + 512, size))]
      encode_prompts(tokenizer, problems, config.rollout.max_prompt_tokens, rows)
      prompts.setdefault(split, []).extend("".join(problem.prompt.split()) for problem in problems)
  if config.evaluate.problems > task.sizes.get("heldout", config.evaluate.problems):
    raise UserError(f"evaluate.problems: must not exceed the {task.sizes['heldout']} held-out problems")
  if config.checkpoint.best.startswith("eval/maj@") and not task.final_answer:
    raise UserError("checkpoint.best: there is no majority vote where a verifier has no final_answer")
  for string in (*config.rollout.stop, getattr(config.task, "thinking_end", "")):
    if string not in text_of(tokenizer, tokenizer(string, add_special_tokens=False)["input_ids"]):
      where = "rollout.stop or task.thinking_end"
      raise UserError(f"{where}: {string!r} is no text for this tokenizer, but special tokens")
  if not {"train", "heldout"} <= prompts.keys():
    return {}
  trained, heldout = set(prompts["train"]), prompts["heldout"][: config.evaluate.problems]
  return {"data/heldout_in_training": sum(prompt in trained for prompt in heldout) / len(heldout)}


class Begun(NamedTuple):
  """A batch on its way: sampled and verified, and handed to the reviewer."""

  rollout: Rollout
  spans: list[list[tuple[int, int]]]
  requests: list[Request]
  """One for each completion."""
  asked: list[bool]
  """Which completions the reviewer was asked about."""
  reviews: Future[list[HostReview]]
  uncut: int
  """See `Steps`."""


def worth_a_review(config: Config, rollout: Rollout, requests: list[Request]) -> list[bool]:
  """Which completions a review can matter to, `reviewer.sample_frac` of them."""
  group, asked = config.rollout.group, []
  for i, request in enumerate(requests):
    own = {outcome.reward for outcome in rollout.outcomes[i // group * group : (i // group + 1) * group]}
    # Weights move nothing where the advantage is 0, and within a single step there is nothing to move.
    idle = config.credit.scheme == "weighted" and len(own) == 1
    single = len(request.steps) < 2 and config.credit.scheme not in ("potential", "capo")
    dice = np.random.default_rng([rollout.problems[i // group].id, i % group])
    chosen = dice.random() < config.reviewer.sample_frac
    asked.append(bool(rollout.trained_B[i]) and chosen and not idle and not single)
  return asked


def wait_for_reviews(begun: Begun, deadline: float) -> list[HostReview]:
  """A review for every completion; what was not asked for is `skipped`."""
  requests = [request for request, ask in zip(begun.requests, begun.asked, strict=True) if ask]
  came = iter(usable(begun.reviews, requests, deadline))
  return [next(came) if ask else HostReview("skipped") for ask in begun.asked]


def usable(reviews: Future[list[HostReview]], requests: list[Request], deadline: float) -> list[HostReview]:
  """The reviews when they have come; one that does not fit its answer is `invalid`."""
  came = [HostReview("timeout")] * len(requests)
  with contextlib.suppress(TimeoutError):  # A client keeps its deadline; this is for one that does not.
    came = reviews.result(deadline + 1.0)
  return [review.checked(len(request.steps)) for review, request in zip(came, requests, strict=True)]


def make_canaries(task: Task) -> list[tuple[Request, list[str]]]:
  """Demonstrations whose labels are known, to see how good a reviewer is while it works."""
  canaries = []
  for i in range(8):
    prompt, text = task.demonstration(i, True)
    steps = tuple(text[a:b] for a, b in cut([c.encode() for c in text], task.step_end))
    labels = task.label_steps(prompt, steps, False)
    # An answer is right exactly where the role of its last step is.
    correct = labels[-1] in ("necessary", "repair")
    canaries.append((Request(f"canary/{i}", prompt, steps, correct, False), labels))
  return canaries


def canary_accuracy(reviewer: Reviewer, canaries, deadline: float) -> float:
  """Share of the steps of canaries whose role the reviewer knew; those of failed reviews count as not known."""
  requests = [request for request, _ in canaries]
  reviews = usable(reviewer.submit(requests, deadline), requests, deadline)
  known = [
    role == true
    for review, (_, labels) in zip(reviews, canaries, strict=True)
    for role, true in zip(review.roles or [""] * len(labels), labels, strict=True)
  ]
  return float(np.mean(known))


_fold_in = jax.jit(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))


def step_key(seed: int, step: int, sharding) -> jax.Array:
  """The key of a step; `sharding` says on which devices it lies."""
  return _fold_in(*put((np.uint32(seed), np.uint32(step)), sharding))


class Steps(NamedTuple):
  """How completions are cut."""

  spans: list[list[tuple[int, int]]]
  """Of each completion, the token spans of its steps."""
  texts: list[tuple[str, ...]]
  uncut: int
  """How many are a single step because `task.steps` took too long on them."""


def cut_steps(samples: Samples, tokenizer, task: Task) -> Steps:
  steps = Steps([], [], 0)
  for tokens, length in zip(samples.tokens_BxT, samples.lengths_B, strict=True):
    pieces = token_bytes(tokenizer, tokens[:length])
    try:
      spans = cut(pieces, task.step_end, *task.step_limits)
    except TimeoutError:
      patterns.warn_slow("task.steps", task.step_end, "then is a single step")
      spans, steps = [(0, len(pieces))], steps._replace(uncut=steps.uncut + 1)
    steps.spans.append(spans)
    steps.texts.append(step_texts(pieces, spans))
  if steps.uncut and steps.uncut == len(steps.spans):
    said = f"{task.step_end!r} takes over {patterns.SECONDS:g} s on every completion of a step"
    raise UserError(f"task.steps: {said}; write it without nested repetition")
  return steps


def make_requests(step: int, rollout: Rollout, texts: list[tuple[str, ...]]) -> list[Request]:
  samples = itertools.product(rollout.problems, range(len(texts) // len(rollout.problems)))
  return [
    Request(f"{step}/{problem.id}/{i}", problem.prompt, steps, outcome.correct, outcome.truncated)
    for (problem, i), steps, outcome in zip(samples, texts, rollout.outcomes, strict=True)
  ]


def review_arrays(reviews: list[HostReview], spans: list[list[tuple[int, int]]], tokens: int) -> Review:
  """Reviews as arrays of fixed shape; there are at most as many steps as tokens."""
  shape = (len(reviews), tokens)
  ids, roles = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  weights, values = np.zeros(shape, np.float32), np.full(shape, np.nan, np.float32)
  arrays = Review(ids, roles, weights, values, np.array([review.status == "ok" for review in reviews]))
  for i, (review, steps) in enumerate(zip(reviews, spans, strict=True)):
    for k, (start, end) in enumerate(steps):
      ids[i, start:end] = k
    if review.status == "ok":
      roles[i, : len(review.roles)] = [ROLES.index(role) for role in review.roles]
      weights[i, : len(review.weights)] = review.weights
      values[i, : len(review.values)] = review.values
  return arrays


class Advantages(NamedTuple):
  completions_PxG: Any
  tokens_BxT: Any


@functools.partial(jax.jit, static_argnums=0)
def assign_credit(config, rewards_PxG, lengths_B, truncated_B, review) -> Advantages:
  tokens_BxT = token_advantages(config, rewards_PxG, lengths_B, truncated_B, review)
  return Advantages(group_advantages(config, rewards_PxG), tokens_BxT)
