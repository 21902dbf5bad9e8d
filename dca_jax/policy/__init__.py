"""The policy: a transformer, and the log-probabilities of what it writes."""

from dca_jax.policy.attention import KeyValue
from dca_jax.policy.config import PolicyConfig
from dca_jax.policy.logprobs import Head, Sampling, sampling_logits, token_logprobs
from dca_jax.policy.lora import join, merge, split
from dca_jax.policy.transformer import Policy, Prompts, by_layer, by_round

__all__ = [
  "Head",
  "KeyValue",
  "Policy",
  "PolicyConfig",
  "Prompts",
  "Sampling",
  "by_layer",
  "by_round",
  "join",
  "merge",
  "sampling_logits",
  "split",
  "token_logprobs",
]
