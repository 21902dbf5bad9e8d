"""Problems, verifiers and, for synthetic tasks, exact step labels."""

from dca_jax.task.chains import Chains, ChainsConfig
from dca_jax.task.types import Outcome, Problem, Task

TASKS = {"chains": Chains}

__all__ = ["TASKS", "Chains", "ChainsConfig", "Outcome", "Problem", "Task"]
