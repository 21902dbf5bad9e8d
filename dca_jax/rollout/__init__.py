"""Rollouts: prompts in, sampled completions cut into steps out."""

from dca_jax.rollout.prompts import encode_prompts
from dca_jax.rollout.sampler import GREEDY, RolloutConfig, Sampler, Samples, sample
from dca_jax.rollout.steps import cut, cut_at_stops, step_texts, stop_length
from dca_jax.store.trajectories import (
  Trajectory,
  forget_trajectories,
  read_trajectories,
  shards,
  write_trajectories,
)

__all__ = [
  "GREEDY",
  "RolloutConfig",
  "Sampler",
  "Samples",
  "Trajectory",
  "cut",
  "cut_at_stops",
  "encode_prompts",
  "forget_trajectories",
  "read_trajectories",
  "sample",
  "shards",
  "step_texts",
  "stop_length",
  "write_trajectories",
]
