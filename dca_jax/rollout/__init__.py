"""Rollouts: prompts in, verified episodes that are cut into steps out."""

from dca_jax.rollout.collect import Rollout, collect, step_key
from dca_jax.rollout.prefixes import Continues, Values
from dca_jax.rollout.prompts import encode_prompts
from dca_jax.rollout.sampler import GREEDY, RolloutConfig, Sampler, Samples, sample
from dca_jax.rollout.steps import cut, cut_at_stops, step_texts, stop_length

__all__ = [
  "GREEDY",
  "Continues",
  "Rollout",
  "RolloutConfig",
  "Sampler",
  "Samples",
  "Values",
  "collect",
  "cut",
  "cut_at_stops",
  "encode_prompts",
  "sample",
  "step_key",
  "step_texts",
  "stop_length",
]
