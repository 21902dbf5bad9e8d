"""Rollouts: prompts in, sampled completions cut into steps out."""

from dca_jax.rollout.prompts import encode_prompts
from dca_jax.rollout.sampler import RolloutConfig, Samples, sample
from dca_jax.rollout.steps import cut, token_pieces
from dca_jax.rollout.trajectory import Trajectory, read_trajectories, write_trajectories

__all__ = [
  "RolloutConfig",
  "Samples",
  "Trajectory",
  "cut",
  "encode_prompts",
  "read_trajectories",
  "sample",
  "token_pieces",
  "write_trajectories",
]
