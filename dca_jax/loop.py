"""The training loop.

A training step is in `step.py`; what it uses is opened in `run.py`. What a step does is a function
of (config, step, train state) alone: problems are numbered, noise is keyed by what it is for, a
review by the sample that it judges. So a run that was killed and started again equals one that was
not. Several processes all run this, each with the problems of its own devices
(`devices/processes.py`).
"""

import sys
from collections.abc import Callable, Mapping, Sequence

import jax

from dca_jax.config import Config
from dca_jax.devices.preemption import notices
from dca_jax.devices.processes import gather, watched
from dca_jax.errors import Terminated, UserError
from dca_jax.rollout.evaluate import evaluate
from dca_jax.run import Trainer, opened
from dca_jax.step import train_step
from dca_jax.store.metrics import Reporter, not_finite
from dca_jax.store.trajectories import forget_trajectories
from dca_jax.tally import eval_metrics

Callback = Callable[[int, Mapping[str, float]], None]
"""Called with a step and its metrics, when the step is recorded."""


def train(
  config: Config,
  workdir: str,
  resume: str = "auto",
  quiet: bool = False,
  callbacks: Sequence[Callback] = (),
) -> None:
  """Runs `config` in `workdir`, or continues the run that is there.

  Args:
    workdir: a folder or a bucket (`gs://`), which all processes share.
    resume: `auto` goes on from the newest checkpoint, a number from that of a step; `never` refuses
      to.
    callbacks: called by process 0 with a step and its metrics, when the step is recorded.

  Raises:
    UserError: bad input, another run in `workdir`, a metric that is not finite, or a checkpoint
      that cannot be written; nothing that was saved is lost.
    Terminated: the run was asked to stop, by SIGTERM, as before a preemption, or by Ctrl-C. The
      last step that was finished is saved.
  """
  quiet = quiet or jax.process_index() > 0
  with (
    notices() as stops,
    watched(stops),
    opened(config, workdir, resume, stops, quiet) as t,
    Reporter(t.growing.folder, t.done, config.steps, quiet, t.log) as reporter,
  ):
    if t.done and not quiet:
      print(f"goes on after step {t.done}", flush=True)
    if jax.process_index() == 0:
      forget_trajectories(t.folder / "trajectories", t.done)
    t.checkpoints.hold(t.done, t.state)
    evaluated = gather("evaluated", t.done in reporter.evaluated)[0]
    if not evaluated and (scores := scores_after(t, t.done)):
      reporter.amend(t.done, scores)
    for step in range(t.done + 1, config.steps + 1):
      t.checkpoints.hold(step - 1, t.state)
      one_step(t, step, reporter, callbacks if jax.process_index() == 0 else ())
    if config.asks and (steps := reporter.unheard) and jax.process_index() == 0:
      last = f"; last failure: {said}" if (said := t.reviewer.failures()) else ""
      why = f"no review of {steps} steps was usable, so the run was plain uniform credit{last}"
      print(f"warning: {why} (docs/reviewers.md says what each status means)", file=sys.stderr)


def one_step(t: Trainer, step: int, reporter: Reporter, callbacks: Sequence[Callback]) -> None:
  """Trains, evaluates where it is due, records and saves."""
  metrics, problem, stop, credit = train_step(t, step)
  if size := t.task.sizes.get("train"):
    metrics["train/epoch"] = step * t.config.rollout.problems / size
  if bad := not_finite(metrics):
    raise UserError(
      f"{bad} is not finite at step {step}; {t.checkpoints.describe()}. Lower learner.lr or set"
      " learner.max_grad_norm (with a new --workdir), or run again to repeat the steps since then"
    )
  asked = t.stops.agreed(stop) if stop else None
  try:
    metrics |= {} if asked else scores_after(t, step)
  except Terminated as error:  # Whoever goes on will evaluate.
    asked = error
  last = bool(problem or asked) or step == t.config.steps
  reporter.log(step, metrics, {"credit/token": credit})
  if t.checkpoints.due(step, metrics, last):
    t.growing.publish()
    t.checkpoints.save(step, t.state, metrics, last)
  for callback in callbacks:
    callback(step, metrics)
  if problem:
    raise UserError(f"{problem}; {t.checkpoints.describe()}")
  if asked:
    raise asked


def scores_after(t: Trainer, step: int) -> dict[str, float]:
  """How good the policy is after a step that is to be evaluated."""
  every = t.config.evaluate.every
  if step not in (0, t.config.steps) and not (every and step % every == 0):
    return {}
  t.stops.phase("evaluation")
  params = t.for_sampler(t.whole(t.state.params))
  return eval_metrics(evaluate(t.config.evaluate, t.sampler, params)) | t.data
