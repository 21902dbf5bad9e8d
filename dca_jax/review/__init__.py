"""Reviewers: they read an answer step by step and say what every step did for the outcome. Free of jax."""

from dca_jax.review.builtin import REVIEWERS, Truth
from dca_jax.review.reviewer import ReviewerConfig, open_reviewer
from dca_jax.review.transports import TRANSPORTS
from dca_jax.review.types import Request, Review, Reviewer

__all__ = ["REVIEWERS", "TRANSPORTS", "Request", "Review", "Reviewer", "ReviewerConfig", "Truth", "open_reviewer"]
