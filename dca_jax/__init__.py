"""Reinforcement learning for language models with Deliberative Credit Assignment."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from dca_jax.api import Metrics, Run, evaluate, load, train
  from dca_jax.commands.audit import audit
  from dca_jax.commands.report import credit_html
  from dca_jax.config import Config
  from dca_jax.credit import Given, Scheme
  from dca_jax.episode import ROLES, Episode, Outcome, Problem, Review, Segment, Step
  from dca_jax.errors import Terminated, UserError
  from dca_jax.review import LanguageModel, Request, Reviewer, ReviewerConfig
  from dca_jax.rollout import Engine, EngineConfig, Sample, Values, Wanted
  from dca_jax.tasks import Task, TaskConfig

# Where each public name lives. They are imported when they are first used: jax takes seconds.
_HOMES = {
  "dca_jax.api": ("Metrics", "Run", "evaluate", "load", "train"),
  "dca_jax.commands.audit": ("audit",),
  "dca_jax.commands.report": ("credit_html",),
  "dca_jax.config": ("Config",),
  "dca_jax.credit": ("Given", "Scheme"),
  "dca_jax.episode": ("ROLES", "Episode", "Outcome", "Problem", "Review", "Segment", "Step"),
  "dca_jax.errors": ("Terminated", "UserError"),
  "dca_jax.review": ("LanguageModel", "Request", "Reviewer", "ReviewerConfig"),
  "dca_jax.rollout": ("Engine", "EngineConfig", "Sample", "Values", "Wanted"),
  "dca_jax.tasks": ("Task", "TaskConfig"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
  "ROLES",
  "Config",
  "Engine",
  "EngineConfig",
  "Episode",
  "Given",
  "LanguageModel",
  "Metrics",
  "Outcome",
  "Problem",
  "Request",
  "Review",
  "Reviewer",
  "ReviewerConfig",
  "Run",
  "Sample",
  "Scheme",
  "Segment",
  "Step",
  "Task",
  "TaskConfig",
  "Terminated",
  "UserError",
  "Values",
  "Wanted",
  "audit",
  "credit_html",
  "evaluate",
  "load",
  "train",
]


def __getattr__(name: str) -> Any:
  if name not in _HOME:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
