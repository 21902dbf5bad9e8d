"""Reviewers: they read an answer step by step and say what every step did for the outcome.
Free of jax, except for what a trained one opens when it is asked for."""

from dca_jax.review.builtin import (
  Fooled,
  Lexical,
  NaN,
  Nobody,
  Noisy,
  Oracle,
  PanelConfig,
  Random,
  Silent,
  Stale,
  Suffix,
  Thief,
)
from dca_jax.review.language import GeminiModel, LanguageModel, OpenAIModel
from dca_jax.review.reviewer import ReviewerConfig, Uses, open_reviewer
from dca_jax.review.rewriter import REWRITERS, Proposing, Rewriter
from dca_jax.review.trained import Trained
from dca_jax.review.transports import CallFailed, Reply, Transport
from dca_jax.review.types import Request, Review, Reviewer, Share, Trial, Truth

_KINDS = (
  *(Nobody, Oracle, Noisy, Fooled, Random, Lexical, Thief, Suffix, Stale, NaN, Silent),
  *(PanelConfig, GeminiModel, OpenAIModel, Trained),
)
REVIEWERS: dict[str, type[ReviewerConfig]] = {kind.name: kind for kind in _KINDS}

__all__ = [
  "REVIEWERS",
  "REWRITERS",
  "CallFailed",
  "LanguageModel",
  "Nobody",
  "Proposing",
  "Reply",
  "Request",
  "Review",
  "Reviewer",
  "ReviewerConfig",
  "Rewriter",
  "Share",
  "Transport",
  "Trial",
  "Truth",
  "Uses",
  "open_reviewer",
]
