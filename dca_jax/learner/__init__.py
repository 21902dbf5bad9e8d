"""The learner: optimizer, loss and the jitted update."""

from dca_jax.learner.loss import Batch, Rewrites, loss_sums
from dca_jax.learner.optimizer import Learner, LearnerConfig, make_optimizer
from dca_jax.learner.update import TrainState, init_state, reference_logprobs, update

__all__ = [
  "Batch",
  "Learner",
  "LearnerConfig",
  "Rewrites",
  "TrainState",
  "init_state",
  "loss_sums",
  "make_optimizer",
  "reference_logprobs",
  "update",
]
