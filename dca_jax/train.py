"""The training loop: sample, verify, review, assign credit, update.

This file tells the whole story of a run; a training step continues in `rollout/sampler.py`, `credit/schemes.py` and
`learner/update.py`. What a step does is a function of (config, step, train state) alone: problems are numbered, noise
is keyed by what it is for, a review by the sample that it judges. So a run that was killed and started again equals one
that was not.
"""

import contextlib
import functools
import math
import os
import pathlib
import time
from concurrent.futures import Future
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dca_jax import learner, mesh
from dca_jax.checkpoint import Checkpoints
from dca_jax.config import Config, claim_workdir
from dca_jax.credit import CreditConfig, Review, group_advantages, token_advantages
from dca_jax.errors import UserError
from dca_jax.evaluate import Estimate, evaluate
from dca_jax.metrics import Reporter, not_finite
from dca_jax.policy import Policy
from dca_jax.review import Request, Reviewer, Truth, open_reviewer
from dca_jax.review import Review as HostReview
from dca_jax.roles import ROLES
from dca_jax.rollout import (
  RolloutConfig,
  Samples,
  Trajectory,
  cut,
  encode_prompts,
  sample,
  token_pieces,
  write_trajectories,
)
from dca_jax.task import TASKS, Outcome, Problem, Task
from dca_jax.value import fit_head, init_head, learned_values, monte_carlo
from dca_jax.warmstart import cache_folder, warm_start


def train(config: Config, workdir: str, quiet: bool = False) -> None:
  """Runs `config` in `workdir`, or continues the run that is there.

  Raises:
    UserError: bad input, a metric that is not finite, or a checkpoint that cannot be written; nothing that was saved
      is lost.
  """
  folder = claim_workdir(config, workdir)
  use_compilation_cache()
  task: Task = TASKS[config.task.name](config.task)
  tokenizer = task.tokenizer()
  tokenizer.save_pretrained(folder / "tokenizer")
  policy = Policy(config.policy, len(tokenizer))
  optimizer = learner.make_optimizer(config.learner, config.steps)

  devices = mesh.make_mesh(config.mesh)
  rows = mesh.batch_sharding(devices)
  mesh.check_divisible(devices, config.rollout.problems // config.learner.micro_batches)
  learned, overlap = config.value.source == "learned", bool(config.reviewer.overlap)
  head = init_head(config.value, config.policy.width, config.seed) if learned else None
  shardings = mesh.state_shardings(devices, policy, optimizer, head, overlap)
  end_ids = jax.device_put(np.array([tokenizer.eos_token_id], np.int32), mesh.replicated(devices))
  update = functools.partial(
    learner.update, policy, config.learner, optimizer, config.rollout.sampling, config.rollout.group
  )
  on_policy = jax.device_put([np.bool_(False), np.bool_(True)], mesh.replicated(devices))
  truth = Truth(lambda r: task.label_steps(r.problem, r.steps, r.truncated), task.prefix_values)
  canaries = make_canaries(task)
  cache = pathlib.Path(folder / "reviews.sqlite")

  with (
    contextlib.closing(open_reviewer(config.reviewer, truth, cache)) as reviewer,
    Checkpoints(config.checkpoint, folder) as checkpoints,
  ):
    init_params = jax.jit(lambda key: nn.unbox(policy.init_params(key)), out_shardings=shardings.params)

    def new_state(params, head):
      return learner.init_state(optimizer, params, head, jax.tree.map(jnp.copy, params) if overlap else None)

    init_state = jax.jit(new_state, out_shardings=shardings)
    abstract = jax.eval_shape(lambda: new_state(init_params(jax.random.key(0)), head))
    abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)

    def make_start():
      params = init_params(jax.random.key(config.warmstart.seed))
      limits = config.rollout.max_prompt_tokens, config.rollout.max_tokens
      return warm_start(config.warmstart, task, config.task, tokenizer, policy, params, limits)

    def begin(step: int, params) -> Begun:
      """Samples a batch and hands it to the reviewer, who reads it while the device goes on."""
      rollout = collect(config.rollout, config.seed, step, task, tokenizer, policy, params, end_ids, rows)
      if config.learner.mask_truncated:
        rollout = rollout._replace(trained_B=rollout.trained_B & ~rollout.samples.truncated_B)
      spans, texts = cut_steps(rollout.samples, tokenizer, task)
      asked = worth_a_review(config, step, rollout, texts)
      requests = [r for r, ask in zip(make_requests(step, rollout, texts), asked, strict=True) if ask]
      return Begun(rollout, spans, texts, asked, reviewer.submit(requests, config.reviewer.deadline))

    start = starting_policy(folder, abstract.params, make_start)
    done, state = checkpoints.restore(abstract, config.hash()) or (0, init_state(jax.tree.map(jnp.copy, start), head))

    with Reporter(folder, done, config.steps, quiet) as reporter:
      if 0 not in reporter.steps:
        reporter.log(0, eval_metrics(evaluate(config.evaluate, config.rollout, task, tokenizer, policy, state.params)))

      ahead: Begun | None = None
      for step in range(done + 1, config.steps + 1):
        with jax.transfer_guard("disallow"):
          clock = Clock()
          if overlap:
            # This batch was sampled a step ago; after a resume it is sampled anew, by the same policy.
            begun = ahead or begin(step, state.behind)
            ahead = begin(step + 1, state.params) if step < config.steps else None
            state = state._replace(behind=copy_of(state.params))
          else:
            begun = begin(step, state.params)
          rollout, spans, texts = begun.rollout, begun.spans, begun.texts
          clock.lap("sample")

          # The reference runs on the device while the host reviews.
          prompts, prompt_lengths, completions = jax.device_put(
            (rollout.prompts_PxS, rollout.prompt_lengths_P, rollout.samples.tokens_BxT), rows
          )
          reference = None
          if config.learner.reference:
            reference = learner.reference_logprobs(
              policy, config.rollout.sampling, start, prompts, prompt_lengths, completions
            )
          reviews = wait_for_reviews(begun, config.reviewer.deadline)
          continued = 0
          if config.value.source == "monte_carlo":
            reviews, continued = monte_carlo(
              config.value,
              config.rollout,
              task,
              tokenizer,
              policy,
              state.params,
              step_key(*jax.device_put((np.uint32(config.seed + 2**31), np.uint32(step)))),  # Keys of no other use.
              end_ids,
              rows,
              rollout.problems,
              (rollout.prompts_PxS, rollout.prompt_lengths_P),
              rollout.samples,
              spans,
            )
          clock.lap("review")

          rewards_B = np.array([o.reward for o in rollout.outcomes], np.float32)
          lengths, truncated, trained, behaviour, rewards, review = jax.device_put(
            (
              rollout.samples.lengths_B,
              rollout.samples.truncated_B,
              rollout.trained_B,
              rollout.samples.logprobs_BxT,
              rewards_B.reshape(-1, config.rollout.group),
              review_arrays(reviews, spans, config.rollout.max_tokens),
            ),
            rows,
          )
          if learned:
            review, hidden = learned_values(
              config.value, policy, state.value_head, state.params, prompts, prompt_lengths, completions, review
            )
          advantages = assign_credit(config.credit, rewards, lengths, truncated, review)
          batch = learner.Batch(
            prompts, prompt_lengths, completions, lengths, trained, advantages.tokens_BxT, behaviour, reference
          )
          for i in range(config.learner.updates_per_batch):
            # One step behind, the ratio is against the policy that sampled, in every update.
            state, stats, logprobs = update(state, batch, on_policy[i == 0 and not overlap])
            if i == 0:
              first = stats
              batch = batch if overlap else batch._replace(logprobs_BxT=logprobs)
          stats["sampler/logprob_error"] = first["sampler/logprob_error"]
          if learned:
            head, stats["value/loss"] = fit_head(
              config.value, state.value_head, hidden, review.step_ids_BxT, lengths, rewards
            )
            state = state._replace(value_head=head)
          host_advantages, values_BxK = jax.device_get((advantages, review.values_BxK))
          write_trajectories(
            folder / "trajectories",
            step,
            trajectories(step, rollout, spans, texts, reviews, values_BxK, host_advantages),
          )
          stats = jax.device_get(stats)
          clock.lap("update")

        measured = step_metrics(
          config.credit, rollout, continued, rewards_B, begun.asked, reviews, values_BxK, host_advantages, stats, clock
        )
        if bad := not_finite(measured):
          raise UserError(
            f"{bad} is not finite at step {step}; {checkpoints.describe()}. Lower learner.lr or set"
            " learner.max_grad_norm (with a new --workdir), or run again to repeat the steps since then"
          )
        if config.reviewer.canary_every and step % config.reviewer.canary_every == 0:
          measured["review/canary_accuracy"] = canary_accuracy(reviewer, canaries, config.reviewer.deadline)
        measured |= reviewer.stats()
        problem = reviewer.problem()
        due = config.evaluate.every and step % config.evaluate.every == 0
        if due or step == config.steps:
          scores = evaluate(config.evaluate, config.rollout, task, tokenizer, policy, state.params)
          measured |= eval_metrics(scores)
        reporter.log(step, measured)
        checkpoints.save(step, state, config.hash(), last=bool(problem) or step == config.steps)
        if problem:
          raise UserError(f"{problem}; {checkpoints.describe()}")


# One step, in the order of the loop.


class Rollout(NamedTuple):
  """One batch on the host: P problems, B = P * G completions."""

  problems: list[Problem]
  prompts_PxS: np.ndarray
  prompt_lengths_P: np.ndarray
  samples: Samples
  outcomes: list[Outcome]
  trained_B: np.ndarray
  """False in groups that `rollout.zero_variance` leaves out, and where `learner.mask_truncated` does."""
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
    return len({outcome.reward for outcome in self.outcomes}) > 1


def collect(config: RolloutConfig, seed, step, task, tokenizer, policy, params, end_ids, rows) -> Rollout:
  """Samples and verifies the batch of `step`."""
  rounds = config.refill_rounds if config.zero_variance == "refill" else 1
  key = step_key(*jax.device_put((np.uint32(seed), np.uint32(step))))
  sampled: list[Group] = []
  for i in range((step - 1) * rounds, step * rounds):
    first = i * config.problems
    problems = [task.problem("train", (seed << 32) + first + p) for p in range(config.problems)]
    prompts, lengths = encode_prompts(tokenizer, problems, config.max_prompt_tokens)
    ids = np.arange(first, first + config.problems, dtype=np.uint32)
    arrays = jax.device_put((prompts, lengths, ids), rows)
    samples = sample(
      policy, params, *arrays, key, end_ids, sampling=config.sampling, group=config.group, max_tokens=config.max_tokens
    )
    by_group = [x.reshape(config.problems, config.group, *x.shape[1:]) for x in jax.device_get(samples)]
    for p, problem in enumerate(problems):
      own = Samples(*(x[p] for x in by_group))
      sampled.append(Group(problem, prompts[p], lengths[p], own, verify(task, tokenizer, problem, own)))
    if sum(group.mixed for group in sampled) >= config.problems:
      break
  kept = sampled
  if config.zero_variance == "refill":
    # Mixed groups first, each kind in the order of its problems.
    kept = sorted(sampled, key=lambda group: not group.mixed)[: config.problems]
  trained = [group.mixed or config.zero_variance == "keep" for group in kept]
  return Rollout(
    [group.problem for group in kept],
    np.stack([group.prompt_S for group in kept]),
    np.array([group.prompt_length for group in kept], np.int32),
    Samples(*(np.concatenate(x) for x in zip(*(group.samples for group in kept), strict=True))),
    [outcome for group in kept for outcome in group.outcomes],
    np.repeat(trained, config.group),
    [outcome for group in sampled for outcome in group.outcomes],
    sum(int(group.samples.lengths_B.sum()) for group in sampled),
  )


def verify(task: Task, tokenizer, problem: Problem, samples: Samples) -> list[Outcome]:
  pieces = token_pieces(tokenizer)
  return [
    task.verify(problem, "".join(pieces[t] for t in tokens[:length]), bool(truncated))
    for tokens, length, truncated in zip(samples.tokens_BxT, samples.lengths_B, samples.truncated_B, strict=True)
  ]


class Begun(NamedTuple):
  """A batch on its way: sampled and verified, and handed to the reviewer."""

  rollout: Rollout
  spans: list[list[tuple[int, int]]]
  texts: list[tuple[str, ...]]
  asked: list[bool]
  """Which completions the reviewer was asked about."""
  reviews: Future[list[HostReview]]


def worth_a_review(config: Config, step: int, rollout: Rollout, texts: list[tuple[str, ...]]) -> list[bool]:
  """Which completions a review can matter to, `reviewer.sample_frac` of them."""
  group = config.rollout.group
  asked = []
  for i, steps in enumerate(texts):
    own = {outcome.reward for outcome in rollout.outcomes[i // group * group : (i // group + 1) * group]}
    # Weights move nothing where the advantage is 0, and within a single step there is nothing to move.
    idle = config.credit.scheme == "weighted" and len(own) == 1
    single = len(steps) < 2 and config.credit.scheme not in ("potential", "capo")
    ask = bool(rollout.trained_B[i]) and not idle and not single
    if ask and config.reviewer.sample_frac < 1:
      ask = np.random.default_rng([config.seed, step, i]).random() < config.reviewer.sample_frac
    asked.append(ask)
  return asked


def wait_for_reviews(begun: Begun, deadline: float) -> list[HostReview]:
  """A review for every completion: what was not asked for is `skipped`, what does not fit its answer `invalid`."""
  try:
    came = iter(begun.reviews.result(deadline + 1.0))
  except TimeoutError:  # A client keeps its deadline; this is for one that does not.
    came = iter([HostReview("timeout")] * sum(begun.asked))
  return [
    next(came).checked(len(steps)) if ask else HostReview("skipped")
    for steps, ask in zip(begun.texts, begun.asked, strict=True)
  ]


def make_canaries(task: Task) -> list[tuple[Request, list[str]]]:
  """Demonstrations whose labels are known, to see how good a reviewer is while it works."""
  canaries = []
  for i in range(8):
    prompt, text = task.demonstration(i, True)
    steps = tuple(text[a:b] for a, b in cut(list(text), task.step_end))
    labels = task.label_steps(prompt, steps, False)
    # An answer is right exactly where the role of its last step is.
    correct = labels[-1] in ("necessary", "repair")
    canaries.append((Request(f"canary/{i}", prompt, steps, correct, False), labels))
  return canaries


def canary_accuracy(reviewer: Reviewer, canaries, deadline: float) -> float:
  """Share of the steps of canaries whose role the reviewer knew; those of failed reviews count as not known."""
  reviews = reviewer.submit([request for request, _ in canaries], deadline).result(deadline + 1.0)
  known = [
    role == true
    for review, (_, labels) in zip(reviews, canaries, strict=True)
    for role, true in zip(review.roles or [""] * len(labels), labels, strict=True)
  ]
  return float(np.mean(known))


@jax.jit
def copy_of(params):
  return jax.tree.map(jnp.copy, params)


@jax.jit
def step_key(seed: jax.Array, step: jax.Array) -> jax.Array:
  return jax.random.fold_in(jax.random.key(seed), step)


def cut_steps(samples: Samples, tokenizer, task: Task) -> tuple[list[list[tuple[int, int]]], list[tuple[str, ...]]]:
  """For each completion, the token spans of its steps and their texts."""
  pieces = token_pieces(tokenizer)
  spans, texts = [], []
  for tokens, length in zip(samples.tokens_BxT, samples.lengths_B, strict=True):
    words = [pieces[t] for t in tokens[:length]]
    spans.append(cut(words, task.step_end))
    texts.append(tuple("".join(words[start:end]) for start, end in spans[-1]))
  return spans, texts


def make_requests(step: int, rollout: Rollout, texts: list[tuple[str, ...]]) -> list[Request]:
  group = len(texts) // len(rollout.problems)
  return [
    Request(
      f"{step}/{rollout.problems[i // group].id}/{i % group}",
      rollout.problems[i // group].prompt,
      steps,
      rollout.outcomes[i].correct,
      rollout.outcomes[i].truncated,
    )
    for i, steps in enumerate(texts)
  ]


def review_arrays(reviews: list[HostReview], spans: list[list[tuple[int, int]]], tokens: int) -> Review:
  """Reviews as arrays of fixed shape; there are at most as many steps as tokens."""
  shape = (len(reviews), tokens)
  arrays = Review(
    np.zeros(shape, np.int32),
    np.zeros(shape, np.int32),
    np.zeros(shape, np.float32),
    np.full(shape, np.nan, np.float32),
    np.zeros(len(reviews), bool),
  )
  for i, (review, steps) in enumerate(zip(reviews, spans, strict=True)):
    for k, (start, end) in enumerate(steps):
      arrays.step_ids_BxT[i, start:end] = k
    if review.status == "ok":
      arrays.ok_B[i] = True
      arrays.roles_BxK[i, : len(review.roles)] = [ROLES.index(role) for role in review.roles]
      arrays.weights_BxK[i, : len(review.weights)] = review.weights
      arrays.values_BxK[i, : len(review.values)] = review.values
  return arrays


class Advantages(NamedTuple):
  completions_PxG: Any
  tokens_BxT: Any


@functools.partial(jax.jit, static_argnums=0)
def assign_credit(config, rewards_PxG, lengths_B, truncated_B, review) -> Advantages:
  tokens_BxT = token_advantages(config, rewards_PxG, lengths_B, truncated_B, review)
  return Advantages(group_advantages(config, rewards_PxG), tokens_BxT)


# What is recorded.


def trajectories(step, rollout: Rollout, spans, texts, reviews: list[HostReview], values_BxK, advantages: Advantages):
  completion_advantages = advantages.completions_PxG.reshape(-1)
  for i, request in enumerate(make_requests(step, rollout, texts)):
    problem = rollout.problems[i * len(rollout.problems) // len(reviews)]
    length, outcome, review = int(rollout.samples.lengths_B[i]), rollout.outcomes[i], reviews[i]
    steps: list[dict] = [{"start": a, "end": b, "text": text} for (a, b), text in zip(spans[i], texts[i], strict=True)]
    for described, role, weight in zip(steps, review.roles, review.weights, strict=False):
      described |= {"role": role, "weight": weight}
    for described, value in zip(steps, values_BxK[i].tolist(), strict=False):
      described |= {} if math.isnan(value) else {"value": value}
    yield Trajectory(
      id=request.id,
      problem=problem.id,
      prompt=problem.prompt,
      answer=problem.answer,
      tokens=rollout.samples.tokens_BxT[i, :length].tolist(),
      steps=steps,
      reward=outcome.reward,
      correct=outcome.correct,
      truncated=outcome.truncated,
      review=review.status,
      model=review.model,
      trained=bool(rollout.trained_B[i]),
      advantage=float(completion_advantages[i]),
      credit=advantages.tokens_BxT[i, :length].tolist(),
    )


class Clock:
  """Seconds between laps."""

  def __init__(self):
    self.seconds: dict[str, float] = {}
    self._last = time.perf_counter()

  def lap(self, name: str) -> None:
    now = time.perf_counter()
    self.seconds[name], self._last = now - self._last, now


def step_metrics(
  credit: CreditConfig,
  rollout: Rollout,
  continued: int,
  rewards_B,
  asked: list[bool],
  reviews,
  values_BxK,
  advantages: Advantages,
  stats,
  clock: Clock,
) -> dict[str, float]:
  samples, sampled = rollout.samples, rollout.sampled
  roles = [role for review in reviews for role in review.roles]
  counted = samples.lengths_B if credit.conserve == "tokens" else samples.tokens_BxT.shape[1]
  mass = advantages.completions_PxG.reshape(-1).astype(np.float64) * counted
  extra: dict[str, float] = {}
  if credit.scheme in ("uniform", "weighted", "signed"):  # The others keep sums of their own, or none.
    spread = np.abs(advantages.tokens_BxT.sum(1, dtype=np.float64) - mass)
    extra["credit/conservation_error"] = float((spread / np.maximum(1.0, np.abs(mass))).max())
  known = ~np.isnan(values_BxK)
  if known.any():
    extra["value/brier"] = float(np.square(values_BxK - rewards_B[:, None]).mean(where=known))
  total = sum(clock.seconds.values())
  group = len(rewards_B) // len(rollout.problems)
  return {
    "train/reward": float(np.mean([o.reward for o in sampled])),
    "train/accuracy": float(np.mean([o.correct for o in sampled])),
    "train/truncated": float(np.mean([o.truncated for o in sampled])),
    "train/length": float(samples.lengths_B.mean()),
    "train/completions": float(len(sampled)),
    "train/generated_tokens": float(rollout.generated + continued),
    "train/mixed_groups": float(np.mean([len(set(g)) > 1 for g in rewards_B.reshape(-1, group).tolist()])),
    "train/tokens_per_second": float(samples.lengths_B.sum() / total),
    "review/asked": float(np.mean(asked)),
    "review/ok": sum(review.status == "ok" for review in reviews) / max(1, sum(asked)),
    **{f"review/{role}": roles.count(role) / max(1, len(roles)) for role in ROLES},
    "credit/moved": float(np.abs(advantages.tokens_BxT).sum() / max(1e-9, np.abs(mass).sum())),
    **extra,
    **{key: float(value) for key, value in stats.items()},
    **{f"seconds/{key}": value for key, value in clock.seconds.items()},
    "seconds/step": total,
  }


def eval_metrics(scores: dict[str, Estimate]) -> dict[str, float]:
  flat: dict[str, float] = {}
  for name, e in scores.items():
    flat |= {f"eval/{name}": e.value, f"eval/{name}_low": e.low, f"eval/{name}_high": e.high}
  return flat


# Before the first step.


def starting_policy(folder: epath.Path, abstract, make):
  """The parameters that the run starts from; kept in the workdir, because they are also the reference policy."""
  with ocp.StandardCheckpointer() as checkpointer:
    if not (folder / "start").exists():
      params = make()
      try:
        checkpointer.save(folder / "start", params)
        checkpointer.wait_until_finished()
      except Exception as error:  # Orbax and TensorStore report a full disk with types of their own.
        raise UserError(f"could not save {folder / 'start'} ({str(error)[:200]}); make room, then run again") from error
    return checkpointer.restore(folder / "start", abstract)


def use_compilation_cache() -> None:
  """Keeps compiled programs between processes, unless JAX_COMPILATION_CACHE_DIR already says where."""
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
