"""What a run has opened: everything that a training step uses, and the state that it changes."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dca_jax import learner
from dca_jax.config import Config, claim_workdir, difference, flatten
from dca_jax.credit import Scheme
from dca_jax.devices import mesh
from dca_jax.devices.memory import check_fits
from dca_jax.devices.preemption import Stops
from dca_jax.devices.processes import agree, check_alike, gather, mark, own_rows, put
from dca_jax.errors import UserError, reason
from dca_jax.learner.supervised import Demonstrations, cache_folder, warm_start
from dca_jax.policy import Policy, join, pretrained, split
from dca_jax.policy.sharding import batch_sharding, replicated
from dca_jax.review import Reviewer, Share, Trial, Truth, open_reviewer
from dca_jax.rollout import Rollout, Sampler, Values, encode_prompts, first_unfinished
from dca_jax.source import package_digest, source_digest
from dca_jax.store.checkpoints import Checkpoints, put_aside
from dca_jax.store.hold import held
from dca_jax.store.metrics import dollars_spent
from dca_jax.store.workdir import Growing, locate
from dca_jax.store.writers import Log, LogConfig
from dca_jax.tasks import Task
from dca_jax.tasks.tokenizer import end_ids, id_count, text_of

# In which a reviewer that is overloaded or down for a moment may come back.
_TRIAL_SECONDS = 60.0
_FIRST = 16
"""Problems of a task without end that are read before the first step."""


class Programs:
  """What a run has on its devices: its programs, and how its arrays lie there. Nothing large is
  allocated yet: `start` and `state`, the parameters that it starts from and its train state, are
  shapes.

  Raises:
    UserError: the mesh does not fit the devices, the policy or the batch, or memory does not
      suffice.
  """

  def __init__(self, config: Config, policy: Policy, task: Task, tokenizer: Any, head: Any):
    rollout, optimizer = config.rollout, learner.make_optimizer(config.learner, config.steps)
    devices = mesh.make_mesh(config.mesh)
    self.policy = policy = policy.clone(mesh=devices)
    self.rows, self.everywhere = batch_sharding(devices), replicated(devices)
    self.param_shardings = mesh.param_shardings(devices, policy)
    of_run = learner.Learner(policy, config.learner, rollout.sampling, optimizer)
    self.update = functools.partial(learner.update, of_run)

    sampling = mesh.sampler_mesh(config.mesh, devices)
    own = policy.clone(mesh=mesh.own_mesh(sampling))
    mesh.check_rows(devices, rollout.problems, rollout.carry)
    engine, mine = (
      config.engine.open(own, rollout, tokenizer),
      own_rows(self.rows, rollout.problems),
    )
    self.sampler = Sampler(engine, rollout, task, tokenizer, policy.rows, mine)
    self.for_sampler = mesh.relay(devices, sampling, policy)

    overlap = bool(config.reviewer.overlap)

    def new_state(params: Any, head: Any, credit: Any) -> learner.TrainState:
      behind = jax.tree.map(jnp.copy, params) if overlap else None
      state = learner.init_state(optimizer, params, head, behind, credit)
      return state._replace(unfinished=first_unfinished(rollout))

    self.init_params = jax.jit(
      lambda key: nn.unbox(policy.init_params(key)), out_shardings=self.param_shardings
    )
    credit = config.scheme.begin()
    unfinished = jax.eval_shape(lambda: first_unfinished(rollout))
    shardings = mesh.state_shardings(devices, policy, optimizer, head, overlap, credit, unfinished)
    self.init_state = jax.jit(new_state, out_shardings=shardings)
    # The shape of what a jitted function returns knows its sharding.
    self.start = jax.eval_shape(self.init_params, jax.random.key(0))
    frozen, trained = split(self.start)
    self.state = jax.eval_shape(self.init_state, trained, head, credit)
    check_fits([self.state, frozen, trained if config.learner.has_reference else ()])


@dataclasses.dataclass
class Trainer:
  """A run that is under way."""

  config: Config
  task: Task
  tokenizer: Any
  programs: Programs
  stops: Stops
  folder: epath.Path
  growing: Growing
  check_held: Callable[[], None]
  """Fails where another run has taken the workdir."""
  reviewer: Reviewer
  rewriter: Reviewer
  """What it says are rewrites."""
  checkpoints: Checkpoints
  done: int
  """The step that the run goes on from."""
  state: learner.TrainState
  frozen: Any
  """Parameters that stay as they are."""
  reference: Callable[[learner.Batch], learner.Batch]
  """Adds the log-probabilities of the policy that the run started from, where they are wanted."""
  data: dict[str, float]
  """Metrics of the data, which belong to every evaluation."""
  ahead: Rollout | None = None
  """The next batch, where it is sampled a step ahead."""

  def __post_init__(self) -> None:
    p = self.programs
    self.policy, self.rows, self.update = p.policy, p.rows, p.update
    self.sampler, self.for_sampler = p.sampler, p.for_sampler
    self.whole = functools.partial(join, self.frozen)
    self.on_policy = put([np.bool_(False), np.bool_(True)], p.everywhere)

  @property
  def scheme(self) -> Scheme:
    return self.config.scheme

  @property
  def values(self) -> Values:
    return self.config.value

  @property
  def log(self) -> Log:
    """Where its metrics go: process 0 alone writes them."""
    to = self.config.log if jax.process_index() == 0 else LogConfig(())
    return Log(to, self.folder, json.loads(self.config.to_json()))


@contextlib.contextmanager
def opened(
  config: Config,
  workdir: str,
  resume: str,
  stops: Stops,
  quiet: bool,
  start: "Start | None" = None,
) -> Iterator[Trainer]:
  """Opens a run, or the run that is in `workdir`; closes all of it at the end.

  Args:
    start: gives the parameters that a new run starts from; `starting_policy` if not given.

  Raises:
    UserError: bad input or circumstances, such as another run in `workdir`; no step has been begun.
  """
  first = jax.process_index() == 0
  hold = held(locate(workdir)) if first else contextlib.nullcontext(_free)
  given = config, workdir, resume, stops, quiet
  with hold as check_held, _opened(*given, check_held, start or starting_policy) as trainer:
    yield trainer


def _free() -> None:
  """Process 0 holds the workdir for all."""


@contextlib.contextmanager
def _opened(
  config: Config,
  workdir: str,
  resume: str,
  stops: Stops,
  quiet: bool,
  check_held: Callable[[], None],
  begin: "Start",
) -> Iterator[Trainer]:
  use_compilation_cache()
  if jax.process_index() == 0:
    config.log.kinds()
  task = config.task.open()
  tokenizer = task.tokenizer()
  ids = id_count(tokenizer)
  policy = Policy(pretrained.resolve(config.policy, ids), ids)
  data = check_data(config, task, tokenizer, policy.rows)
  check_alike(alike(config, task, tokenizer))
  head = config.value.init(policy.config.width, config.seed)
  programs = Programs(config, policy, task, tokenizer, head)

  folder = claim(config, workdir, resume)
  growing = Growing(folder)
  if jax.process_index() == 0:
    tokenizer.save_pretrained(growing.folder / "tokenizer")
  with (
    contextlib.closing(growing),
    contextlib.closing(tried_reviewer(config, task, growing, quiet)) as reviewer,
    contextlib.closing(opened_rewriter(config, task, growing)) as rewriter,
    Checkpoints(config.checkpoint, folder, config.fixed()) as checkpoints,
  ):
    restored = checkpoints.restore(programs.state, resume)
    start = begin(config, folder, policy, task, tokenizer, programs)
    frozen, trained = split(start)
    done, state = restored or (
      0,
      programs.init_state(copy(trained), *put((head, config.scheme.begin()), programs.everywhere)),
    )
    reference = _reference(config, programs, start)
    trainer = Trainer(
      config,
      task,
      tokenizer,
      programs,
      stops,
      folder,
      growing,
      check_held,
      reviewer,
      rewriter,
      checkpoints,
      done,
      state,
      frozen,
      reference,
      data,
    )
    # What only the beginning needed would lie on the devices for the whole run.
    del restored, start, trained, state
    yield trainer


def tried_reviewer(config: Config, task: Task, growing: Growing, quiet: bool) -> Reviewer:
  """The run's reviewer, after one real question to every language model in it: nothing costs device
  time yet.

  Raises:
    UserError: it cannot be opened, or one is `required` and gave no usable review.
  """
  # Process 0 keeps the metrics.
  spent = agree("spending so far", dollars_spent(growing.folder))
  share = Share(jax.process_count(), lambda own: sum(gather("spending", own)), spent)
  reviewer = open_reviewer(
    config.reviewer, Truth.of(task), growing.reviews, share, growing.workdir / "trajectories"
  )
  try:
    if config.reviewer.models:
      trial = Trial()
      finished = (growing.workdir / "checkpoints" / str(config.steps)).exists()
      if jax.process_index() == 0 and not finished:
        trial = reviewer.trial(_TRIAL_SECONDS)
      said, wrong = agree("first question", trial)
      if wrong and config.reviewer.required:
        raise UserError(
          f"no usable review from {wrong}. Correct reviewer.client (base_url, model) or the key, or"
          " start the server; reviewer.required=false begins all the same"
        )
      if wrong and not quiet:
        why = "what fails gets uniform credit"
        print(f"warning: no usable review from {wrong}; {why}", file=sys.stderr)
      if said and not quiet:
        print(said, flush=True)
  except BaseException:
    reviewer.close()
    raise
  return reviewer


def opened_rewriter(config: Config, task: Task, growing: Growing) -> Reviewer:
  """Whoever proposes rewrites; their replies lie where those of the reviewer do."""
  share = Share(jax.process_count(), lambda own: sum(gather("spending on rewrites", own)))
  return config.rewrite.open(Truth.of(task), growing.reviews, share)


def _reference(
  config: Config, programs: Programs, start: Any
) -> Callable[[learner.Batch], learner.Batch]:
  """Without a reference, `start` is not held."""
  if not config.learner.has_reference:
    return lambda batch: batch
  logprobs = functools.partial(
    learner.reference_logprobs, programs.policy, config.rollout.sampling, start
  )
  return lambda batch: batch._replace(reference_BxT=logprobs(batch))


@jax.jit
def copy(params: Any) -> Any:
  return jax.tree.map(jnp.copy, params)


def check_data(config: Config, task: Task, tokenizer: Any, rows: int) -> dict[str, float]:
  """Reads every problem of a task that has an end, and the first ones of another: a bad one is
  found now (UserError), not in the middle of a run.

  Args:
    rows: of the policy's embedding.

  Returns:
    A metric of such a task: the share of the held-out problems to be evaluated
    that are training problems too.
  """
  prompts: dict[str, list[str]] = {}
  if min(end_ids(tokenizer)) >= rows:
    ends = f"every end token of the tokenizer {list(end_ids(tokenizer))}"
    raise UserError(
      f"task.tokenizer: {ends} lies beyond the {rows} rows of the policy's embedding; take the"
      " model's own"
    )
  for part, size in task.sizes.items():
    for first in range(0, size, 512):
      problems = [task.problem(part, i) for i in range(first, min(first + 512, size))]
      encode_prompts(tokenizer, problems, config.rollout.max_prompt_tokens, rows)
      prompts.setdefault(part, []).extend("".join(problem.prompt.split()) for problem in problems)
  for part in ("train", "heldout"):
    if part in task.sizes:
      continue
    problems = [task.problem(part, i) for i in range(_FIRST)]
    encode_prompts(tokenizer, problems, config.rollout.max_prompt_tokens, rows)
  if config.evaluate.problems > task.sizes.get("heldout", config.evaluate.problems):
    raise UserError(
      f"evaluate.problems: must not exceed the {task.sizes['heldout']} held-out problems"
    )
  if config.checkpoint.best.startswith("eval/maj@") and not task.final_answer:
    raise UserError(
      "checkpoint.best: there is no majority vote where a verifier has no final_answer"
    )
  for string in (*config.rollout.stop, getattr(config.task, "thinking_end", "")):
    if string not in text_of(tokenizer, tokenizer(string, add_special_tokens=False)["input_ids"]):
      where = "rollout.stop or task.thinking_end"
      raise UserError(f"{where}: {string!r} is no text for this tokenizer, but special tokens")
  if not {"train", "heldout"} <= prompts.keys():
    return {}
  trained, heldout = set(prompts["train"]), prompts["heldout"][: config.evaluate.problems]
  return {"data/heldout_in_training": sum(prompt in trained for prompt in heldout) / len(heldout)}


def claim(config: Config, workdir: str, resume: str) -> epath.Path:
  """`claim_workdir` by process 0, whose work the others then find."""
  folder = locate(workdir)
  if jax.process_index() == 0:
    claim_workdir(config, workdir, resume)
  gather("claimed workdir", None)
  saved = folder / "config.json"
  if not saved.exists() or difference(config, saved.read_text()):
    raise UserError(
      f"--workdir={workdir}: process {jax.process_index()} does not find there what process 0"
      " wrote; it must be a bucket or a folder that all hosts share, and all processes need the"
      " same settings"
    )
  return folder


def starting_policy(
  config: Config, folder: epath.Path, policy: Policy, task: Task, tokenizer: Any, on: Programs
) -> Any:
  """The parameters that the run starts from; kept in the workdir, because they are also the
  reference policy."""
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
        print(
          f"warning: {kept} is damaged ({damage}); moved to {place} and made again", file=sys.stderr
        )
    mark("starting policy", 3600.0)  # Weights may come from far away.
    if config.policy.pretrained:
      saved = pretrained.folder(config.policy.pretrained, weights=True)
      params = pretrained.load(policy, saved, on.param_shardings)
    else:
      params = on.init_params(jax.random.key(config.warmstart.seed))
      limits = config.rollout.max_prompt_tokens, config.rollout.max_tokens
      demonstrations = Demonstrations(task, config.task, tokenizer, limits)
      params = warm_start(config.warmstart, demonstrations, policy, params, on.everywhere)
    try:
      checkpointer.save(kept, args=ocp.args.StandardSave(params))
    except Exception as error:  # Orbax and TensorStore report a full disk with types of their own.
      raise UserError(
        f"could not save {kept} ({reason(error)}); make room, then run again"
      ) from error
    return checkpointer.restore(kept, args=ocp.args.StandardRestore(on.start))


Start = Callable[[Config, epath.Path, Policy, Task, Any, Programs], Any]
"""See `starting_policy`."""


def alike(config: Config, task: Task, tokenizer: Any) -> dict[str, Any]:
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
  """Keeps compiled programs between processes, where JAX_COMPILATION_CACHE_DIR or else
  DCA_JAX_CACHE say."""
  folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache_folder() / "xla")
  try:
    if "://" not in folder:
      os.makedirs(folder, exist_ok=True)
      with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.write(b"room?")
  except OSError as error:
    why = "set DCA_JAX_CACHE to a folder that can be written"
    print(f"warning: compiled programs are not kept: {error}; {why}", file=sys.stderr)
    folder = ""
  jax.config.update("jax_compilation_cache_dir", folder or None)
  # Where the disk fills up later, JAX would say so of every program.
  warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry")
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
