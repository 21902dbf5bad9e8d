"""Reviewers: they read an answer step by step and say what every step did for the outcome. Free of jax."""

from dca_jax.review.builtin import REVIEWERS, ReviewerConfig, Truth, make_reviewer
from dca_jax.review.types import Request, Review, Reviewer

__all__ = ["REVIEWERS", "Request", "Review", "Reviewer", "ReviewerConfig", "Truth", "make_reviewer"]
