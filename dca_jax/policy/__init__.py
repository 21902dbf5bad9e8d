"""The policy: a transformer, and the log-probabilities of what it writes."""

from dca_jax.policy.logprobs import Sampling, sampling_logits, token_logprobs
from dca_jax.policy.transformer import Policy, PolicyConfig

__all__ = ["Policy", "PolicyConfig", "Sampling", "sampling_logits", "token_logprobs"]
