"""The training loop: sample, verify, review, assign credit, update.

This file tells the whole story of a run; a training step continues in `batch.py`, `credit/schemes.py` and
`learner/update.py`. What a step does is a function of (config, step, train state) alone: problems are numbered, noise
is keyed by what it is for, a review by the sample that it judges. So a run that was killed and started again equals one
that was not. Several processes all run this, each with the problems of its own devices (`processes.py`).
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

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
  check_data,
  collect,
  cut_steps,
  make_canaries,
  make_requests,
  review_arrays,
  step_key,
  wait_for_reviews,
  worth_a_review,
)
from dca_jax.checkpoint import Checkpoints, put_aside
from dca_jax.config import Config, claim_workdir, difference, flatten
from dca_jax.errors import Terminated, UserError, reason
from dca_jax.evaluate import evaluate
from dca_jax.hold import held
from dca_jax.metrics import Reporter, dollars_spent, not_finite
from dca_jax.notices import Stops, notices
from dca_jax.plan import check_fits
from dca_jax.policy import Policy, join, pretrained, split
from dca_jax.processes import agree, check_alike, fetch, gather, mark, put, watched
from dca_jax.record import Clock, Tally, eval_metrics, merge, tally, trajectories
from dca_jax.review import Reviewer, Share, Trial, Truth, open_reviewer
from dca_jax.rollout import Sampler, forget_trajectories, write_trajectories
from dca_jax.source import package_digest, source_digest
from dca_jax.task import TASKS, Task
from dca_jax.task.tokenizer import end_ids as end_ids_of
from dca_jax.task.tokenizer import id_count
from dca_jax.value import fit_head, init_head, learned_values, monte_carlo
from dca_jax.warmstart import cache_folder, warm_start
from dca_jax.workdir import Growing, locate

_TRIAL_SECONDS = 60.0  # in which a reviewer that is overloaded or down for a moment may come back


def train(config: Config, workdir: str, resume: str = "auto", quiet: bool = False) -> None:
  """Runs `config` in `workdir`, or continues the run that is there.

  Args:
    workdir: a folder or a bucket (`gs://`), which all processes share.
    resume: `auto` goes on from the newest checkpoint, a number from that of a step; `never` refuses to.

  Raises:
    UserError: bad input, another run in `workdir`, a metric that is not finite, or a checkpoint that cannot be
      written; nothing that was saved is lost.
    Terminated: the run was asked to stop, by SIGTERM, as before a preemption, or by Ctrl-C. The last step that was
      finished is saved.
  """
  first = jax.process_index() == 0
  hold = held(locate(workdir)) if first else contextlib.nullcontext(lambda: None)
  with notices() as stops, watched(stops), hold as check_held:
    _train(config, workdir, resume, quiet or not first, stops, check_held)


def _train(
  config: Config, workdir: str, resume: str, quiet: bool, stops: Stops, check_held: Callable[[], None]
) -> None:
  use_compilation_cache()
  task: Task = TASKS[config.task.name](config.task)
  tokenizer = task.tokenizer()
  policy = Policy(pretrained.resolve(config.policy, id_count(tokenizer)), id_count(tokenizer))
  data = check_data(config, task, tokenizer, policy.rows)
  check_alike(alike(config, task, tokenizer))
  learned, overlap = config.value.source == "learned", bool(config.reviewer.overlap)
  head = init_head(config.value, policy.config.width, config.seed) if learned else None
  on = OnDevices(config, policy, tokenizer, head)

  folder = claim(config, workdir, resume)
  growing = Growing(folder)
  if jax.process_index() == 0:
    tokenizer.save_pretrained(growing.folder / "tokenizer")

  truth = Truth(lambda r: task.label_steps(r.problem, r.steps, r.truncated), lambda *a: task.prefix_values(*a))
  canaries = make_canaries(task) if config.reviewer.canary_every and jax.process_index() == 0 else []
  with (
    contextlib.closing(growing),
    contextlib.closing(tried_reviewer(config, truth, growing, quiet)) as reviewer,
    Checkpoints(config.checkpoint, folder, config.fixed()) as checkpoints,
  ):

    def begin(step: int, params) -> Begun:
      """Samples a batch and hands it to the reviewer, who reads it while the device goes on."""
      rollout = collect(on.sampler, config.seed, step, task, tokenizer, params)
      if config.learner.mask_truncated:
        rollout = rollout._replace(trained_B=rollout.trained_B & ~rollout.samples.truncated_B)
      spans, texts, uncut = cut_steps(rollout.samples, tokenizer, task)
      requests = make_requests(step, rollout, texts)
      asked = worth_a_review(config, rollout, requests)
      sent = [request for request, ask in zip(requests, asked, strict=True) if ask]
      return Begun(rollout, spans, requests, asked, reviewer.submit(sent, config.reviewer.deadline), uncut)

    restored = checkpoints.restore(on.state, resume)
    start = starting_policy(config, folder, policy, task, tokenizer, on)
    frozen, trained = split(start)
    done, state = restored or (0, on.init_state(copy(trained), put(head, on.everywhere)))
    whole = functools.partial(join, frozen)
    on_policy = put([np.bool_(False), np.bool_(True)], on.everywhere)
    if not config.learner.reference:
      del start, trained

    with Reporter(growing.folder, done, config.steps, quiet) as reporter:
      if jax.process_index() == 0:
        forget_trajectories(folder / "trajectories", done)

      def scores(step: int) -> dict[str, float]:
        """How good the policy is after a step that is to be evaluated."""
        if step not in (0, config.steps) and not (config.evaluate.every and step % config.evaluate.every == 0):
          return {}
        stops.phase("evaluation")
        params = on.for_sampler(whole(state.params))
        return eval_metrics(evaluate(config.evaluate, on.sampler, task, tokenizer, params)) | data

      checkpoints.hold(done, state)
      if not gather("evaluated", done in reporter.evaluated)[0] and (measured := scores(done)):
        reporter.amend(done, measured)

      ahead: Begun | None = None
      for step in range(done + 1, config.steps + 1):
        checkpoints.hold(step - 1, state)
        stops.phase("sampling")
        with jax.transfer_guard("disallow"):
          clock = Clock()
          params = on.for_sampler(whole(state.params))
          if overlap:
            # This batch was sampled a step ago; after a resume it is sampled anew, by the same policy.
            begun = ahead or begin(step, on.for_sampler(whole(state.behind)))
            ahead = begin(step + 1, params) if step < config.steps else None
          else:
            begun = begin(step, params)
          rollout, spans = begun.rollout, begun.spans
          clock.lap("sample")

          # The reference runs on the device while the host reviews.
          prompts, prompt_lengths, completions = put(
            (rollout.prompts_PxS, rollout.prompt_lengths_P, rollout.samples.tokens_BxT), on.rows
          )
          reference = None
          if config.learner.reference:
            reference = learner.reference_logprobs(
              on.policy, config.rollout.sampling, start, prompts, prompt_lengths, completions
            )
          stops.phase("reviews", seconds=config.reviewer.deadline)
          wait = functools.partial(wait_for_reviews, begun, config.reviewer.deadline)
          reviews = stops.wait(wait, then="values")
          continued = 0
          if config.value.source == "monte_carlo":
            reviews, continued = monte_carlo(
              config.value,
              on.sampler,
              task,
              tokenizer,
              params,
              value_key(config.seed, step, on.sampler.end_ids_E.sharding),
              rollout.problems,
              (rollout.prompts_PxS, rollout.prompt_lengths_P),
              rollout.samples,
              spans,
            )
          del params  # A layout of its own would stand beside the gradients.
          clock.lap("review")

          rewards_B = np.array([o.reward for o in rollout.outcomes], np.float32)
          said = review_arrays(reviews, spans, config.rollout.max_tokens)
          lengths, truncated, trained, behaviour, rewards, review = put(
            (
              rollout.samples.lengths_B,
              rollout.samples.truncated_B,
              rollout.trained_B,
              rollout.samples.logprobs_BxT,
              rewards_B.reshape(-1, config.rollout.group),
              said,
            ),
            on.rows,
          )
          if learned:
            review, hidden = learned_values(
              config.value,
              on.policy,
              state.value_head,
              whole(state.params),
              prompts,
              prompt_lengths,
              completions,
              review,
            )
          advantages = assign_credit(config.credit, rewards, lengths, truncated, review)
          batch = learner.Batch(
            prompts, prompt_lengths, completions, lengths, trained, advantages.tokens_BxT, behaviour, reference
          )
          check_held()
          stops.phase("update", at_once=False)  # From here on the step is finished.
          checkpoints.release()
          if overlap:
            state = state._replace(behind=copy(state.params))
          for i in range(config.learner.updates_per_batch):
            # One step behind, the ratio is against the policy that sampled, in every update.
            state, stats, logprobs = on.update(state, batch, on_policy[i == 0 and not overlap], frozen)
            if i == 0:
              first = stats
              batch = batch if overlap else batch._replace(logprobs_BxT=logprobs)
          stats["sampler/logprob_error"] = first["sampler/logprob_error"]
          if learned:
            head, stats["value/loss"] = fit_head(
              config.value, state.value_head, hidden, review.step_ids_BxT, lengths, rewards
            )
            state = state._replace(value_head=head)
          host_advantages = fetch(advantages, on.rows)
          values_BxK = fetch(review.values_BxK, on.rows) if learned else said.values_BxK
          records = trajectories(begun, reviews, values_BxK, host_advantages)
          write_trajectories(folder / "trajectories", step, jax.process_index(), records)
          stats = jax.device_get(stats)
          clock.lap("update")

        own = reviewer.stats()
        if canaries and step % config.reviewer.canary_every == 0:
          own["review/canary_accuracy"] = canary_accuracy(reviewer, canaries, config.reviewer.deadline)
        mine = tally(config.credit, begun, continued, rewards_B, reviews, values_BxK, host_advantages, own, clock)
        # The one place in a step where processes hear of each other's samples, beside the arrays.
        told = gather("metrics", [mine, reviewer.problem(), stops.reason])
        measured = merge([Tally(*said) for said, _, _ in told]) | {key: float(x) for key, x in stats.items()}
        if size := task.sizes.get("train"):
          measured["train/epoch"] = step * config.rollout.problems / size
        if bad := not_finite(measured):
          raise UserError(
            f"{bad} is not finite at step {step}; {checkpoints.describe()}. Lower learner.lr or set"
            " learner.max_grad_norm (with a new --workdir), or run again to repeat the steps since then"
          )
        problem = next((problem for _, problem, _ in told if problem), None)
        stop = next((reason for _, _, reason in told if reason), "")
        asked = stops.agreed(stop) if stop else None
        try:
          measured |= {} if asked else scores(step)
        except Terminated as error:  # Whoever goes on will evaluate.
          asked = error
        last = bool(problem or asked) or step == config.steps
        reporter.log(step, measured)
        if checkpoints.due(step, measured, last):
          growing.publish()
          checkpoints.save(step, state, measured, last)
        if problem:
          raise UserError(f"{problem}; {checkpoints.describe()}")
        if asked:
          raise asked


def value_key(seed: int, step: int, sharding) -> jax.Array:
  """The key of a step's continuations; sampling uses none of these, because seeds end below 2**31."""
  return step_key(seed + 2**31, step, sharding)


@jax.jit
def copy(params):
  return jax.tree.map(jnp.copy, params)


# Before the first step.


class OnDevices:
  """What a run has on its devices: its programs, and how its arrays lie there. Nothing large is allocated yet: `start`
  and `state`, the parameters that it starts from and its train state, are shapes.

  Raises:
    UserError: the mesh does not fit the devices, the policy or the batch, or memory does not suffice.
  """

  def __init__(self, config: Config, policy: Policy, tokenizer, head):
    rollout, optimizer = config.rollout, learner.make_optimizer(config.learner, config.steps)
    devices = mesh.make_mesh(config.mesh)
    self.policy = policy = policy.clone(mesh=devices)
    self.rows, self.everywhere = mesh.batch_sharding(devices), mesh.replicated(devices)
    self.param_shardings = mesh.param_shardings(devices, policy)
    self.update = functools.partial(learner.update, policy, config.learner, optimizer, rollout.sampling, rollout.group)

    sampler_devices = mesh.sampler_mesh(config.mesh, devices)
    end_ids = put(np.array(end_ids_of(tokenizer), np.int32), mesh.replicated(sampler_devices))
    self.sampler = Sampler(policy.clone(mesh=sampler_devices), rollout, end_ids, mesh.batch_sharding(sampler_devices))
    self.for_sampler = mesh.relay(devices, sampler_devices, policy)
    mesh.check_rows(devices, sampler_devices, rollout.problems, config.learner.micro_batches)

    overlap = bool(config.reviewer.overlap)

    def new_state(params, head):
      return learner.init_state(optimizer, params, head, jax.tree.map(jnp.copy, params) if overlap else None)

    self.init_params = jax.jit(lambda key: nn.unbox(policy.init_params(key)), out_shardings=self.param_shardings)
    self.init_state = jax.jit(new_state, out_shardings=mesh.state_shardings(devices, policy, optimizer, head, overlap))
    # The shape of what a jitted function returns knows its sharding.
    self.start = jax.eval_shape(self.init_params, jax.random.key(0))
    frozen, trained = split(self.start)
    self.state = jax.eval_shape(self.init_state, trained, head)
    check_fits([self.state, frozen, trained if config.learner.reference else ()])


def claim(config: Config, workdir: str, resume: str) -> epath.Path:
  """`claim_workdir` by process 0, whose work the others then find."""
  folder = locate(workdir)
  if jax.process_index() == 0:
    claim_workdir(config, workdir, resume)
  gather("claimed workdir", None)
  if not (folder / "config.json").exists() or difference(config, (folder / "config.json").read_text()):
    raise UserError(
      f"--workdir={workdir}: process {jax.process_index()} does not find there what process 0 wrote; it must be a"
      " bucket or a folder that all hosts share, and all processes need the same settings"
    )
  return folder


def tried_reviewer(config: Config, truth: Truth, growing: Growing, quiet: bool) -> Reviewer:
  """The run's reviewer, after one real question to every language model in it: nothing costs device time yet.

  Raises:
    UserError: it cannot be opened, or one is `required` and gave no usable review.
  """
  spent = agree("spending so far", dollars_spent(growing.folder))  # Process 0 keeps the metrics.
  share = Share(jax.process_count(), lambda own: sum(gather("spending", own)), spent)
  reviewer = open_reviewer(config.reviewer, truth, growing.reviews, share)
  try:
    if config.reviewer.models:
      trial = Trial()
      finished = (growing.workdir / "checkpoints" / str(config.steps)).exists()
      if jax.process_index() == 0 and not finished:
        trial = reviewer.trial(_TRIAL_SECONDS)
      said, wrong = agree("first question", trial)
      if wrong and config.reviewer.required:
        raise UserError(
          f"no usable review from {wrong}. Correct reviewer.client (base_url, model) or the key, or start the server;"
          " reviewer.required=false begins all the same"
        )
      if wrong and not quiet:
        print(f"warning: no usable review from {wrong}; what fails gets uniform credit", file=sys.stderr)
      if said and not quiet:
        print(said, flush=True)
  except BaseException:
    reviewer.close()
    raise
  return reviewer


def starting_policy(config: Config, folder: epath.Path, policy: Policy, task: Task, tokenizer, on: OnDevices):
  """The parameters that the run starts from; kept in the workdir, because they are also the reference policy."""
  kept = folder / "start"
  with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
    if all(gather("starting policy", kept.exists())):
      start, damage = None, ""
      try:
        start = checkpointer.restore(kept, args=ocp.args.StandardRestore(on.start))
      except Exception as error:  # Damage shows as any of a dozen types.
        damage = reason(error)
      if not (damage := next(filter(None, gather("starting policy read", damage)), "")):
        return start
      if jax.process_index() == 0:
        place = put_aside(kept, folder, "start")
        print(f"warning: {kept} is damaged ({damage}); moved to {place} and made again", file=sys.stderr)
    mark("starting policy", 3600.0)  # Weights may come from far away.
    if config.policy.pretrained:
      saved = pretrained.folder(config.policy.pretrained, weights=True)
      params = pretrained.load(policy, saved, on.param_shardings)
    else:
      params = on.init_params(jax.random.key(config.warmstart.seed))
      limits = config.rollout.max_prompt_tokens, config.rollout.max_tokens
      params = warm_start(config.warmstart, task, config.task, tokenizer, policy, params, limits, on.everywhere)
    try:
      checkpointer.save(kept, args=ocp.args.StandardSave(params))
    except Exception as error:  # Orbax and TensorStore report a full disk with types of their own.
      raise UserError(f"could not save {kept} ({reason(error)}); make room, then run again") from error
    return checkpointer.restore(kept, args=ocp.args.StandardRestore(on.start))


def alike(config: Config, task: Task, tokenizer) -> dict[str, Any]:
  """What all processes of a run must share."""
  settings = {f"setting {key}": value for key, value in flatten(dataclasses.asdict(config)).items()}
  return {
    "dca-jax": f"{importlib.metadata.version('dca-jax')} ({package_digest('**/*.py')})",
    **settings,
    "the task's code": source_digest(task),
    "numbers of problems": task.sizes,
    "tokens": id_count(tokenizer),
  }


def use_compilation_cache() -> None:
  """Keeps compiled programs between processes, where JAX_COMPILATION_CACHE_DIR or our cache is."""
  folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache_folder() / "xla")
  try:
    if "://" not in folder:
      os.makedirs(folder, exist_ok=True)
      tempfile.TemporaryFile(dir=folder).close()
  except OSError as error:
    why = "set DCA_JAX_CACHE to a folder that can be written"
    print(f"warning: compiled programs are not kept: {error}; {why}", file=sys.stderr)
    folder = ""
  jax.config.update("jax_compilation_cache_dir", folder or None)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
