"""The training loop: sample, verify, review, assign credit, update.

This file tells the whole story of a run; a training step continues in `batch.py`, `credit/schemes.py` and
`learner/update.py`. What a step does is a function of (config, step, train state) alone: problems are numbered, noise
is keyed by what it is for, a review by the sample that it judges. So a run that was killed and started again equals one
that was not.
"""

import contextlib
import functools
import os
import pathlib
import signal
import threading
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dca_jax import learner, mesh
from dca_jax.batch import (
  Begun,
  assign_credit,
  canary_accuracy,
  collect,
  cut_steps,
  make_canaries,
  make_requests,
  review_arrays,
  step_key,
  wait_for_reviews,
  worth_a_review,
)
from dca_jax.checkpoint import Checkpoints
from dca_jax.config import Config, claim_workdir
from dca_jax.errors import Terminated, UserError
from dca_jax.evaluate import evaluate
from dca_jax.metrics import Reporter, not_finite
from dca_jax.policy import Policy, pretrained
from dca_jax.record import Clock, eval_metrics, step_metrics, trajectories
from dca_jax.review import Truth, open_reviewer
from dca_jax.rollout import write_trajectories
from dca_jax.task import TASKS, Task
from dca_jax.value import fit_head, init_head, learned_values, monte_carlo
from dca_jax.warmstart import cache_folder, warm_start


def train(config: Config, workdir: str, quiet: bool = False) -> None:
  """Runs `config` in `workdir`, or continues the run that is there.

  Raises:
    UserError: bad input, a metric that is not finite, or a checkpoint that cannot be written; nothing that was saved
      is lost.
    Terminated: SIGTERM came, as it does before a preemption; the step under way was finished and saved.
  """
  use_compilation_cache()
  task: Task = TASKS[config.task.name](config.task)
  tokenizer = task.tokenizer()
  policy = Policy(pretrained.resolve(config.policy, len(tokenizer)), len(tokenizer))
  folder = claim_workdir(config, workdir)
  tokenizer.save_pretrained(folder / "tokenizer")
  optimizer = learner.make_optimizer(config.learner, config.steps)

  devices = mesh.make_mesh(config.mesh)
  rows = mesh.batch_sharding(devices)
  mesh.check_divisible(devices, config.rollout.problems // config.learner.micro_batches)
  learned, overlap = config.value.source == "learned", bool(config.reviewer.overlap)
  head = init_head(config.value, policy.config.width, config.seed) if learned else None
  shardings = mesh.state_shardings(devices, policy, optimizer, head, overlap)
  end_ids = jax.device_put(np.array([tokenizer.eos_token_id], np.int32), mesh.replicated(devices))
  update = functools.partial(
    learner.update, policy, config.learner, optimizer, config.rollout.sampling, config.rollout.group
  )
  on_policy = jax.device_put([np.bool_(False), np.bool_(True)], mesh.replicated(devices))
  truth = Truth(lambda r: task.label_steps(r.problem, r.steps, r.truncated), task.prefix_values)
  canaries = make_canaries(task) if config.reviewer.canary_every else []
  cache = pathlib.Path(folder / "reviews.sqlite")

  with (
    sigterm_noted() as sigterm,
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
      if config.policy.pretrained:
        return pretrained.load(policy, pretrained.folder(config.policy.pretrained, weights=True), shardings.params)
      params = init_params(jax.random.key(config.warmstart.seed))
      limits = config.rollout.max_prompt_tokens, config.rollout.max_tokens
      return warm_start(config.warmstart, task, config.task, tokenizer, policy, params, limits)

    def begin(step: int, params) -> Begun:
      """Samples a batch and hands it to the reviewer, who reads it while the device goes on."""
      rollout = collect(config.rollout, config.seed, step, task, tokenizer, policy, params, end_ids, rows)
      if config.learner.mask_truncated:
        rollout = rollout._replace(trained_B=rollout.trained_B & ~rollout.samples.truncated_B)
      spans, texts = cut_steps(rollout.samples, tokenizer, task)
      requests = make_requests(step, rollout, texts)
      asked = worth_a_review(config, step, rollout, requests)
      sent = [request for request, ask in zip(requests, asked, strict=True) if ask]
      return Begun(rollout, spans, requests, asked, reviewer.submit(sent, config.reviewer.deadline))

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
          rollout, spans = begun.rollout, begun.spans
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
              value_key(config.seed, step, end_ids.sharding),
              end_ids,
              rows,
              rollout.problems,
              (rollout.prompts_PxS, rollout.prompt_lengths_P),
              rollout.samples,
              spans,
            )
          clock.lap("review")

          rewards_B = np.array([o.reward for o in rollout.outcomes], np.float32)
          said = review_arrays(reviews, spans, config.rollout.max_tokens)
          lengths, truncated, trained, behaviour, rewards, review = jax.device_put(
            (
              rollout.samples.lengths_B,
              rollout.samples.truncated_B,
              rollout.trained_B,
              rollout.samples.logprobs_BxT,
              rewards_B.reshape(-1, config.rollout.group),
              said,
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
          values = review.values_BxK if learned else said.values_BxK
          host_advantages, values_BxK = jax.device_get((advantages, values))
          records = trajectories(begun, reviews, values_BxK, host_advantages)
          write_trajectories(folder / "trajectories", step, records)
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
        stop = bool(problem) or sigterm.is_set()
        checkpoints.save(step, state, config.hash(), last=stop or step == config.steps)
        if problem:
          raise UserError(f"{problem}; {checkpoints.describe()}")
        if stop:
          raise Terminated(f"stopped by SIGTERM; {checkpoints.describe()}")


def value_key(seed: int, step: int, sharding) -> jax.Array:
  """The key of a step's continuations; sampling uses none of these, because seeds end below 2**31."""
  return step_key(*jax.device_put((np.uint32(seed + 2**31), np.uint32(step)), sharding))


@contextlib.contextmanager
def sigterm_noted() -> Iterator[threading.Event]:
  """Within it SIGTERM ends nothing, but sets the event."""
  noted = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield noted  # Python hands signals to the main thread only.
    return
  before = signal.signal(signal.SIGTERM, lambda *_: noted.set())
  try:
    yield noted
  finally:
    signal.signal(signal.SIGTERM, before)


@jax.jit
def copy_of(params):
  return jax.tree.map(jnp.copy, params)


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
