"""Rollouts: prompts in, verified episodes that are cut into steps out."""

from dca_jax.rollout.carry import collect_whole, first_unfinished
from dca_jax.rollout.collect import Group, Rollout, collect
from dca_jax.rollout.config import RolloutConfig
from dca_jax.rollout.engine import GREEDY, Begun, Engine, EngineConfig, Sample, Wanted
from dca_jax.rollout.prefixes import Continues, Spent, Values
from dca_jax.rollout.prompts import encode_prompts
from dca_jax.rollout.sampler import Sampler, in_order
from dca_jax.rollout.slots import ENGINES, SlotsConfig
from dca_jax.rollout.steps import cut, step_texts

__all__ = [
  "ENGINES",
  "GREEDY",
  "Begun",
  "Continues",
  "Engine",
  "EngineConfig",
  "Group",
  "Rollout",
  "RolloutConfig",
  "Sample",
  "Sampler",
  "SlotsConfig",
  "Spent",
  "Values",
  "Wanted",
  "collect",
  "collect_whole",
  "cut",
  "encode_prompts",
  "first_unfinished",
  "in_order",
  "step_texts",
]
