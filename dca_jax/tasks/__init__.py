"""Problems, verifiers, tokenizers and, for synthetic tasks, exact step labels."""

from dca_jax.tasks.chains import Chains, ChainsConfig
from dca_jax.tasks.environments import Environment, EnvironmentConfig, Turn
from dca_jax.tasks.gym import GymConfig
from dca_jax.tasks.openenv import OpenEnvConfig
from dca_jax.tasks.sources import HubConfig, JsonlConfig, TfdsConfig
from dca_jax.tasks.text import Text, TextConfig
from dca_jax.tasks.tokenizer import character_tokenizer
from dca_jax.tasks.types import (
  SPLITS,
  Demonstrated,
  Labelled,
  Outcome,
  Problem,
  Task,
  TaskConfig,
  Valued,
)

TASKS: dict[str, type[TaskConfig]] = {
  "chains": ChainsConfig,
  "tfds": TfdsConfig,
  "jsonl": JsonlConfig,
  "hub": HubConfig,
  "openenv": OpenEnvConfig,
  "reasoning_gym": GymConfig,
}

__all__ = [
  "SPLITS",
  "TASKS",
  "Chains",
  "ChainsConfig",
  "Demonstrated",
  "Environment",
  "EnvironmentConfig",
  "HubConfig",
  "JsonlConfig",
  "Labelled",
  "Outcome",
  "Problem",
  "Task",
  "TaskConfig",
  "Text",
  "TextConfig",
  "TfdsConfig",
  "Turn",
  "Valued",
  "character_tokenizer",
]
