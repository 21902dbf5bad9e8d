"""A run's settings: typed sections made from a ConfigDict; every mistake is found before the first
step."""

from dca_jax.config.levels import Arm, build, build_arm, load, read_recipe
from dca_jax.config.saved import claim_workdir, difference, read_saved, saved_config
from dca_jax.config.sections import CHOICES
from dca_jax.config.tree import ASKED, Config, ConfigError, flatten, nested

__all__ = [
  "ASKED",
  "CHOICES",
  "Arm",
  "Config",
  "ConfigError",
  "build",
  "build_arm",
  "claim_workdir",
  "difference",
  "flatten",
  "load",
  "nested",
  "read_recipe",
  "read_saved",
  "saved_config",
]
