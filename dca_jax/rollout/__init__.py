"""Rollouts: prompts in, sampled completions cut into steps out."""

from dca_jax.rollout.prompts import encode_prompts
from dca_jax.rollout.sampler import RolloutConfig, Sampler, Samples, sample
from dca_jax.rollout.steps import cut, token_pieces
from dca_jax.rollout.trajectory import Trajectory, forget_trajectories, read_trajectories, write_trajectories

__all__ = [
  "RolloutConfig",
  "Sampler",
  "Samples",
  "Trajectory",
  "cut",
  "encode_prompts",
  "forget_trajectories",
  "read_trajectories",
  "sample",
  "token_pieces",
  "write_trajectories",
]
