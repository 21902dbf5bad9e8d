"""Supervised start on worked solutions, for a policy that begins from nothing."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import sys
import uuid
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
from jax.sharding import Sharding
from tqdm import tqdm

from dca_jax.checks import at_least, positive
from dca_jax.devices.processes import gather, mark, put
from dca_jax.errors import UserError, reason
from dca_jax.policy import Policy, Sampling, token_logprobs
from dca_jax.rollout import encode_prompts
from dca_jax.source import package_digest, source_digest
from dca_jax.tasks import Demonstrated, Problem, Task, TaskConfig
from dca_jax.tasks.tokenizer import unspelt

# Demonstrations, spread over all, by which a changed data file shows.
_SAMPLED = 256


@dataclasses.dataclass(frozen=True)
class WarmstartConfig:
  """The `warmstart` section."""

  clean_steps: int = 400
  """Steps on right solutions first, from which the procedure is learnt faster."""
  steps: int = 100
  """Steps on solutions with mistakes after that; 0
  and no clean_steps starts from random weights."""
  batch: int = 32
  """Demonstrations in a batch, one batch for each step."""
  lr: float = 6e-3
  """Highest learning rate (Muon): it rises to this over the first 20 steps at most, then falls
  along a cosine to a tenth of it."""
  seed: int = 0
  """Decides the initial weights."""

  def check(self) -> dict[str, str]:
    bad = at_least(0, self, "clean_steps", "steps") | at_least(1, self, "batch")
    return bad | positive(self, "lr")

  def unused(self) -> dict[str, str]:
    return {} if self.total else dict.fromkeys(("batch", "lr"), "there are no warm-start steps")

  @property
  def total(self) -> int:
    return self.clean_steps + self.steps


def cache_folder() -> pathlib.Path:
  """Where warm starts and compiled programs are kept: $DCA_JAX_CACHE, or ~/.cache/dca-jax."""
  folder = os.environ.get("DCA_JAX_CACHE") or os.path.expanduser("~/.cache/dca-jax")
  return pathlib.Path(folder).absolute()


@dataclasses.dataclass(frozen=True)
class Demonstrations:
  """A task's worked solutions, as the policy reads them."""

  task: Task
  section: TaskConfig
  """The task's settings."""
  tokenizer: Any
  limits: tuple[int, int]
  """Most prompt tokens and most completion tokens."""

  def batch(self, indices: range, mistakes: bool, rows: int) -> tuple[np.ndarray, ...]:
    """Prompts [B, S], prompt lengths [B], completions [B, T] and their lengths [B].

    Args:
      rows: of the policy's embedding, which no token may exceed.

    Raises:
      UserError: one is too long, or holds what the tokenizer cannot spell.
    """
    pairs = self.texts(indices, mistakes)
    problems = [Problem(i, prompt, "") for i, (prompt, _) in zip(indices, pairs, strict=True)]
    prompts = encode_prompts(self.tokenizer, problems, self.limits[0], rows)
    texts, most = [completion for _, completion in pairs], self.limits[1]
    ids_B = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
    completions = np.zeros((len(pairs), most), np.int32)
    for row, ids, text, i in zip(completions, ids_B, texts, indices, strict=True):
      if len(ids) > most:
        allowed = f"rollout.max_tokens allows {most}: raise it"
        raise UserError(f"demonstration {i} has {len(ids)} tokens; {allowed}")
      if why := unspelt(self.tokenizer, text, ids):
        raise UserError(f"task.tokenizer: demonstration {i}: {why}; add it ({text[:60]!r})")
      row[: len(ids)] = ids
    return *prompts, completions, np.array([len(ids) for ids in ids_B], np.int32)

  def texts(self, indices: range, mistakes: bool) -> list[tuple[str, str]]:
    """Prompts and worked solutions."""
    return [cast(Demonstrated, self.task).demonstration(i, mistakes) for i in indices]


def warm_start(
  config: WarmstartConfig,
  demonstrations: Demonstrations,
  policy: Policy,
  params: Any,
  everywhere: Sharding,
) -> Any:
  """Trains `params` on demonstrations, or loads the result of an earlier run that did the same.

  Args:
    params: freshly initialised; their shardings are kept.
    everywhere: the sharding of what every device has.

  Returns:
    The trained parameters.
  """
  if config.total == 0:
    return params
  folder = cache_folder() / "warmstart" / _digest(config, demonstrations, policy)
  cached = _load(
    folder,
    jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), params),
  )
  if cached is not None:
    return cached
  params = _train(config, demonstrations, policy, params, everywhere)
  # The caches of several hosts would each hold only parts of them.
  if jax.process_count() == 1:
    _keep(folder, params)
  return params


def _digest(config: WarmstartConfig, demonstrations: Demonstrations, policy: Policy) -> str:
  """Of all that decides what the parameters become."""
  read = config, demonstrations.section, policy.config
  sections = [dataclasses.asdict(section) for section in read]
  ours = [package_digest("learner/supervised.py"), package_digest("policy/*.py")]
  count, clean = config.total * config.batch, config.clean_steps * config.batch
  every = max(1, count // _SAMPLED)
  sample = demonstrations.texts(range(0, clean, every), False)
  sample += demonstrations.texts(range(-(-clean // every) * every, count, every), True)
  theirs = [source_digest(demonstrations.task), sample]
  settings = [*ours, *theirs, *sections, demonstrations.limits, jax.default_backend()]
  return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def _load(folder: pathlib.Path, abstract: Any) -> Any:
  """What `_keep` kept, or None."""
  if not all(gather("cached warm start", os.path.exists(folder))):
    return None
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      return checkpointer.restore(folder, abstract)
  except Exception as error:  # Damage shows as any of a dozen types; the cache can be made again.
    why = f"is unreadable ({type(error).__name__}); training it again"
    print(f"the cached warm start {folder} {why}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _keep(folder: pathlib.Path, params: Any) -> None:
  """Puts the parameters into the cache; where that fails the run goes on,
  as it does not need it."""
  partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}")
  try:
    # Not in the background: threads of a save that failed would keep the process from ending.
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
      checkpointer.save(partial, args=ocp.args.StandardSave(params))
    partial.rename(folder)
  except Exception as error:  # Orbax and TensorStore report a full disk with types of their own.
    shutil.rmtree(partial, ignore_errors=True)
    if not os.path.exists(folder):  # Otherwise another process finished first, with the same bits.
      print(f"warning: the warm start is not kept for other runs: {reason(error)}", file=sys.stderr)


def _train(
  config: WarmstartConfig,
  demonstrations: Demonstrations,
  policy: Policy,
  params: Any,
  everywhere: Sharding,
) -> Any:
  lr, total = config.lr, config.total
  schedule = optax.warmup_cosine_decay_schedule(0.0, lr, min(20, total // 2), total, lr * 0.1)
  # Muon (Jordan et al. 2024) learns the procedure in far fewer steps than Adam, which moves what is
  # no matrix; `consistent_rms` gives its updates Adam's size (Liu et al. 2025), so that one
  # learning rate serves both.
  muon = optax.contrib.muon(
    schedule, adam_b2=0.99, consistent_rms=0.4, muon_weight_dimension_numbers=_contracted_axes
  )
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), muon)

  def loss(
    params: Any,
    prompts_BxS: jax.Array,
    prompt_lengths_B: jax.Array,
    completions_BxT: jax.Array,
    lengths_B: jax.Array,
  ) -> jax.Array:
    hidden = policy.completion_hidden(params, prompts_BxS, prompt_lengths_B, completions_BxT)
    logp, _ = token_logprobs(hidden, policy.head(params), completions_BxT, Sampling())
    mask = jnp.arange(completions_BxT.shape[1]) < lengths_B[:, None]
    return -jnp.where(mask, logp, 0.0).sum() / mask.sum()

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
    value, grads = jax.value_and_grad(loss)(params, *batch)
    changes, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, changes), opt_state, value

  def make_batch(i: int) -> tuple[np.ndarray, ...]:
    indices = range(i * config.batch, (i + 1) * config.batch)
    return demonstrations.batch(indices, i >= config.clean_steps, policy.rows)

  opt_state = optimizer.init(params)
  # The next batch is made while the device works on this one.
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    bar = tqdm(range(config.total), "warm start", unit="step", disable=None, leave=False)
    following = pool.submit(make_batch, 0)
    for i in bar:
      mark("warm start")
      batch = put(following.result(), everywhere)
      following = pool.submit(make_batch, i + 1)
      params, opt_state, value = step(params, opt_state, batch)
      told = i % 50 == 0 or i == config.total - 1
      if told and "TQDM_DISABLE" not in os.environ:
        tqdm.write(f"warm start {i + 1}/{config.total}  loss {float(value):.3f}", file=sys.stdout)
        sys.stdout.flush()
  return params


def _contracted_axes(params: Any) -> Any:
  """For each weight matrix of the policy, which axes are contracted and which are made; None for
  everything else."""

  def axes(path: Any, x: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
    if path[-1].key != "kernel":
      return None
    inputs = 2 if path[-2].key == "o" else 1
    matrix = tuple(range(1, x.ndim))  # Axis 0 counts the layers.
    return optax.contrib.MuonDimensionNumbers(matrix[:inputs], matrix[inputs:])

  return jax.tree_util.tree_map_with_path(axes, params)
