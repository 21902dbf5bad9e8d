"""Credit assignment: outcomes and reviews in, token advantages out. Pure functions on arrays that run under jit."""

from dca_jax.credit.schemes import SCHEMES, CreditConfig, Given, Review, RoleTable, group_advantages, token_advantages

__all__ = ["SCHEMES", "CreditConfig", "Given", "Review", "RoleTable", "group_advantages", "token_advantages"]
