"""Reinforcement learning for language models with Deliberative Credit Assignment."""
