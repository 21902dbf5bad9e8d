"""An engine without a cache: every token takes a forward pass over all that stands before it."""

import dataclasses
import functools

import jax
import numpy as np

from dca_jax.policy import sampling_logits
from dca_jax.rollout import EngineConfig, Sample


@dataclasses.dataclass(frozen=True)
class Plainly(EngineConfig):
  def open(self, policy, rollout, tokenizer):
    return Forward(policy, rollout, tokenizer.eos_token_id)


@functools.partial(jax.jit, static_argnums=(0, 1))
def scores(policy, sampling, params, prompts, lengths, tokens):
  hidden_BxTxD = policy.completion_hidden(params, prompts, lengths, tokens)
  flat = hidden_BxTxD.reshape(-1, hidden_BxTxD.shape[-1])
  logits = sampling_logits(flat, policy.head(params), sampling)
  return jax.nn.log_softmax(logits).reshape(*tokens.shape, -1)


class Forward:
  def __init__(self, policy, rollout, end):
    self.policy, self.rollout, self.end = policy, rollout, end

  def stream(self, params, wanted, noise, further=None):
    first = 0
    while wanted:
      for row, sample in enumerate(self.samples(params, wanted, noise)):
        yield sample._replace(row=first + row)
      first += wanted.numbers_PxG.size
      wanted = further and further.take(wait=True)  # Episodes whose environments have answered.

  def samples(self, params, wanted, noise):
    p, g = wanted.numbers_PxG.shape
    tokens = np.zeros((p * g, self.rollout.max_tokens), np.int32)
    logprobs = np.zeros(tokens.shape, np.float32)
    # A run that goes on repeats it.
    rng = np.random.default_rng([*noise, *wanted.problems_P, *wanted.begun_P])
    for t in range(self.rollout.max_tokens):
      given = jax.device_put((wanted.prompts_PxS, wanted.prompt_lengths_P, tokens))
      all_BxTxV = scores(self.policy, self.rollout.sampling, params, *given)
      now = jax.device_get(all_BxTxV)[:, t]
      tokens[:, t] = (now + rng.gumbel(size=now.shape)).argmax(-1)
      logprobs[:, t] = now[np.arange(p * g), tokens[:, t]]
    for row in range(p * g):
      ends = np.flatnonzero(tokens[row, : wanted.limits_P[row // g]] == self.end)
      n = ends[0] + 1 if len(ends) else wanted.limits_P[row // g]
      yield Sample(row, tokens[row, :n], logprobs[row, :n], not len(ends))
