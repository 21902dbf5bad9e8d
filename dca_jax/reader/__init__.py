"""A trained reviewer: a policy's own start weights that read a finished episode and say of every
step what it did.

The policy reads the episode once, as a causal model does, and says what should stand in the place
of every token. A few layers then look at all steps together, in both directions, and at the
outcome: roles and effects come from there. Prefix values come from what stands before a step and
from nothing else. Nothing is decoded.
"""

from dca_jax.reader.fit import FitConfig, fit, refit
from dca_jax.reader.folder import base, bytes_of, load, own_policy, save
from dca_jax.reader.network import Reader
from dca_jax.reader.texts import Labelled, by_checks

__all__ = [
  "FitConfig",
  "Labelled",
  "Reader",
  "base",
  "by_checks",
  "bytes_of",
  "fit",
  "load",
  "own_policy",
  "refit",
  "save",
]
