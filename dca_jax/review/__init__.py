"""Reviewers: they read an answer step by step and say what every step did for the outcome. Free of jax."""

from dca_jax.review.builtin import REVIEWERS, Truth
from dca_jax.review.reviewer import TRANSPORTS, ReviewerConfig, open_reviewer
from dca_jax.review.types import Request, Review, Reviewer, Share, Trial

__all__ = [
  "REVIEWERS",
  "TRANSPORTS",
  "Request",
  "Review",
  "Reviewer",
  "ReviewerConfig",
  "Share",
  "Trial",
  "Truth",
  "open_reviewer",
]
