"""The learner's settings and its optimizer."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import optax

from dca_jax.checks import at_least, one_of, positive
from dca_jax.policy import Policy, Sampling


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
  """The `learner` section."""

  loss: str = "reinforce"
  """`reinforce` (Williams 1992) or `ppo` (Schulman et al. 2017): the importance ratio against the
  policy that sampled, clipped."""
  clip_low: float = 0.2
  """`ppo`: a ratio below 1 - clip_low is clipped to that."""
  clip_high: float = 0.2
  """`ppo`: a ratio above 1 + clip_high is clipped to that; a larger bound than `clip_low` keeps
  rare tokens alive (DAPO, Yu et al. 2025)."""
  updates_per_batch: int = 1
  """Optimizer steps on each batch, every one on the whole batch."""
  micro_batches: int = 1
  """Parts that a batch is cut into at least, to save memory; the gradient is the same."""
  normalizer: str = "constant"
  """The loss is a sum over tokens divided by completions x rollout.max_tokens (`constant`, Liu et
  al. 2025) or by the number of tokens that are trained on (`tokens`)."""
  mask_truncated: bool = False
  """Leave completions that ran out of tokens out of the loss."""
  kl: float = 0.0
  """Weight of the k3 estimate (Schulman 2020) of the KL divergence from the policy to the
  reference, as in GRPO. Its value is unbiased; its gradient on samples of the policy is that of the
  opposite divergence, from the reference to the policy, token by token (Tang and Munos 2025)."""
  reference: bool = False
  """Measure the KL divergence to the policy that the run started from where `kl` is 0 too. It takes
  a forward pass over every batch."""
  entropy: float = 0.0
  """Weight of the entropy bonus."""
  lr: float = 1e-3
  """Full learning rate of the optimizer, AdamW: that of the end of the warm-up, from which
  `schedule` goes on."""
  schedule: str = "constant"
  """How the learning rate goes on from `lr`: `constant`, `linear` or `cosine`, the latter two down
  to 0 at the last step."""
  warmup_updates: int = 0
  """Optimizer steps below the full learning rate, which rises evenly; the first of n has
  1 / (n + 1)."""
  adam_b1: float = 0.9
  """Share that Adam keeps of its running mean of the gradients at each update."""
  adam_b2: float = 0.98
  """Share that Adam keeps of its running mean of the squared gradients at each update."""
  weight_decay: float = 0.0
  """Share of each weight, times the learning rate, that an update takes away: decoupled (Loshchilov
  and Hutter 2019). Scales of norms and of layers, and biases, do not decay."""
  max_grad_norm: float = 0.0
  """Gradients are clipped to this global norm; 0 does not clip."""

  def check(self) -> dict[str, str]:
    bad = one_of(self, "loss", "reinforce", "ppo")
    bad |= one_of(self, "normalizer", "constant", "tokens")
    bad |= one_of(self, "schedule", "constant", "linear", "cosine") | positive(self, "lr")
    bad |= at_least(1, self, "updates_per_batch", "micro_batches")
    bad |= at_least(0, self, "clip_high", "kl", "entropy", "warmup_updates", "weight_decay")
    bad |= at_least(0, self, "max_grad_norm")
    for key in ("clip_low", "adam_b1", "adam_b2"):
      if not 0 <= getattr(self, key) < 1:
        bad[key] = "must be at least 0 and below 1"
    if self.loss == "reinforce" and self.updates_per_batch > 1:
      bad["updates_per_batch"] = (
        "needs learner.loss 'ppo' above 1: after the first update the batch is off-policy"
      )
    return bad

  def unused(self) -> dict[str, str]:
    moot = {"reference": "learner.kl is not 0"} if self.kl else {}
    if self.loss == "ppo":
      return moot
    return moot | dict.fromkeys(("clip_low", "clip_high"), "learner.loss is 'reinforce'")

  @property
  def has_reference(self) -> bool:
    """Whether the policy that the run started from is kept."""
    return self.reference or self.kl > 0


class Learner(NamedTuple):
  """What decides how a batch changes the policy, and stays the same in a run."""

  policy: Policy
  config: LearnerConfig
  sampling: Sampling
  optimizer: optax.GradientTransformation


@functools.lru_cache
def make_optimizer(config: LearnerConfig, steps: int) -> optax.GradientTransformation:
  """Adam with the configured schedule, clipping and decoupled weight decay; `steps` batches end the
  schedule.

  Cached, so that equal settings give the same object and a jitted function that closes over it is
  compiled once.
  """
  updates = steps * config.updates_per_batch
  after = max(1, updates - config.warmup_updates)
  rate = {
    "constant": optax.constant_schedule(config.lr),
    "linear": optax.linear_schedule(config.lr, 0.0, after),
    "cosine": optax.cosine_decay_schedule(config.lr, after),
  }[config.schedule]
  if config.warmup_updates:
    # The first batch was sampled and reviewed like all others: no rate of 0 may waste it.
    lowest = config.lr / (config.warmup_updates + 1)
    rising = optax.linear_schedule(lowest, config.lr, config.warmup_updates)
    rate = optax.join_schedules([rising, rate], [config.warmup_updates])
  most = config.max_grad_norm
  clip = optax.clip_by_global_norm(most) if most else optax.identity()
  decay, decayed = config.weight_decay, _decayed if config.weight_decay else None
  adam = optax.adamw(rate, config.adam_b1, config.adam_b2, weight_decay=decay, mask=decayed)
  return optax.chain(clip, adam)


def _decayed(params: Any) -> Any:
  """Which parameters decay: not norms, biases and layers' scales, which set levels."""

  def decays(path: Any, _: Any) -> bool:
    return jax.tree_util.keystr(path[-1:], simple=True) not in ("scale", "bias", "layer_scale")

  return jax.tree.map_with_path(decays, params)
