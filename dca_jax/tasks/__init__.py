"""Problems, verifiers, tokenizers and, for synthetic tasks, exact step labels."""

from dca_jax.tasks.chains import Chains, ChainsConfig
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
}

__all__ = [
  "SPLITS",
  "TASKS",
  "Chains",
  "ChainsConfig",
  "Demonstrated",
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
  "Valued",
  "character_tokenizer",
]
