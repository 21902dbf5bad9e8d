"""Rollouts: prompts in, sampled completions cut into steps out."""

from dca_jax.rollout.prompts import encode_prompts
from dca_jax.rollout.sampler import RolloutConfig, Samples, sample
from dca_jax.rollout.steps import cut, cut_at_stops, step_texts, stop_length
from dca_jax.rollout.trajectory import Trajectory, read_trajectories, write_trajectories

__all__ = [
  "RolloutConfig",
  "Samples",
  "Trajectory",
  "cut",
  "cut_at_stops",
  "encode_prompts",
  "read_trajectories",
  "sample",
  "step_texts",
  "stop_length",
  "write_trajectories",
]
