"""Problems, verifiers, tokenizers and, for synthetic tasks, exact step labels."""

from dca_jax.tasks.chains import Chains, ChainsConfig
from dca_jax.tasks.text import Text, TextConfig
from dca_jax.tasks.types import Outcome, Problem, Task

TASKS: dict[str, type] = {"chains": Chains, "tfds": Text, "jsonl": Text}
CONFIGS = {"chains": ChainsConfig, "tfds": TextConfig, "jsonl": TextConfig}

__all__ = ["CONFIGS", "TASKS", "Chains", "ChainsConfig", "Outcome", "Problem", "Task", "Text", "TextConfig"]
