"""Values of prefixes from the policy itself: how likely is success before each step is written?

Two sources beside a reviewer's word, both blind to the rest of the answer, as `potential` credit needs:

* `monte_carlo` samples further answers from every step boundary and counts the successes (VinePPO, Kazemnejad et al.
  2024): unbiased, and paid for in generated tokens;
* `learned` reads a small head on the policy's hidden states, trained on the outcomes of earlier batches (the value
  baseline of PPO, Schulman et al. 2017).
"""

import dataclasses
import functools
import typing
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dca_jax.checks import at_least, one_of, positive
from dca_jax.credit import Review
from dca_jax.devices.processes import gather
from dca_jax.policy import Policy
from dca_jax.review import Review as HostReview
from dca_jax.rollout import Sampler, Samples, stop_length
from dca_jax.rollout.verify import verify
from dca_jax.tasks import Problem, Task
from dca_jax.tasks.tokenizer import text_of, token_bytes


@dataclasses.dataclass(frozen=True)
class ValueConfig:
  """The `value` section: where the prefix values of `potential` credit come from."""

  source: str = "reviewer"
  """`reviewer`, `monte_carlo` or `learned`."""
  continuations: int = 4
  """`monte_carlo`: answers sampled from each step boundary."""
  width: int = 128
  """`learned`: width of the head's hidden layer."""
  lr: float = 3e-3
  """`learned`: its learning rate (Adam)."""
  updates: int = 8
  """`learned`: optimizer steps on each batch, after the batch's values have been read."""

  def check(self) -> dict[str, str]:
    bad = at_least(1, self, "continuations", "width", "updates") | positive(self, "lr")
    return bad | one_of(self, "source", "reviewer", "monte_carlo", "learned")

  def unused(self) -> dict[str, str]:
    reads = {"monte_carlo": ("continuations",), "learned": ("width", "lr", "updates")}
    keys = [key for source, own in reads.items() if source != self.source for key in own]
    return dict.fromkeys(keys, f"value.source is '{self.source}'")


def monte_carlo(
  config: ValueConfig,
  sampler: Sampler,
  task: Task,
  tokenizer,
  params,
  key: jax.Array,
  problems: Sequence[Problem],
  prompts: tuple[np.ndarray, np.ndarray],
  samples: Samples,
  spans: Sequence[Sequence[tuple[int, int]]],
) -> tuple[list[HostReview], int]:
  """Reviews that hold a value for each step of each completion, and how many tokens were generated for them.

  A prefix that several completions share is continued once. An answer gets as many tokens as it would have had.

  Args:
    prompts: token ids [P, S] and lengths [P] of the problems.
    samples: on the host, B = P * G rows.
    spans: for each completion the token spans of its steps.
  """
  group, tokens_BxT = len(spans) // len(problems), np.asarray(samples.tokens_BxT)
  numbers: dict[tuple[int, bytes], int] = {}  # of each distinct prefix: its problem and its tokens
  places = [
    [numbers.setdefault((i // group, tokens_BxT[i, :start].tobytes()), len(numbers)) for start, _ in steps]
    for i, steps in enumerate(spans)
  ]
  begun = [(p, np.frombuffer(prefix, tokens_BxT.dtype)) for p, prefix in numbers]

  # Of like lengths together, because a batch takes as long as its longest answer; the last batch is filled up.
  order = sorted(range(len(begun)), key=lambda n: -len(begun[n][1]))
  values, generated = np.zeros(len(begun)), 0
  rollout = sampler.config
  counts = gather(
    "prefixes", len(begun)
  )  # All processes sample together, as often as the one with most prefixes needs.
  before = sum(counts[: jax.process_index()])
  for first in range(0, max(counts), len(spans)):
    batch = np.resize(order[first : first + len(spans)] or [0], len(spans))
    ids = np.zeros((len(spans), prompts[0].shape[1] + rollout.max_tokens), np.int32)
    lengths = np.zeros(len(spans), np.int32)
    for row, n in enumerate(batch):
      p, tokens = begun[n]
      prompt = prompts[0][p, : prompts[1][p]]
      lengths[row] = len(prompt) + len(tokens)
      ids[row, : lengths[row]] = np.concatenate([prompt, tokens])
    tried: list[tuple[Problem, str, bool]] = []
    answers = sampler(params, ids, lengths, before + batch, key, np.arange(config.continuations))
    for row, n in enumerate(order[first : first + len(spans)]):
      p, tokens = begun[n]
      for a in range(row * config.continuations, (row + 1) * config.continuations):
        length, room = int(answers.lengths_B[a]), rollout.max_tokens - len(tokens)
        whole = np.concatenate([tokens, answers.tokens_BxT[a, : min(length, room)]])
        stop = stop_length(rollout.stop, token_bytes(tokenizer, whole)) if rollout.stop else None
        truncated = stop is None and (bool(answers.truncated_B[a]) or length > room)
        tried.append((problems[p], text_of(tokenizer, whole[:stop]), truncated))
        generated += min(length, room)
    for a, outcome in enumerate(verify(task, tried)):
      values[order[first + a // config.continuations]] += outcome.reward / config.continuations
  return [HostReview("ok", values=tuple(values[own].tolist())) for own in places], generated


class ValueHead(typing.NamedTuple):
  """Parameters and optimizer state of the head."""

  params: typing.Any
  opt_state: typing.Any


def _head(config: ValueConfig) -> nn.Module:
  # The last layer begins at 0, so the first values are one half.
  return nn.Sequential([nn.Dense(config.width), nn.gelu, nn.Dense(1, kernel_init=nn.initializers.zeros)])


def _logits(config: ValueConfig, params, hidden_BxTxD) -> jax.Array:
  return typing.cast(jax.Array, _head(config).apply(params, hidden_BxTxD))[..., 0]


def init_head(config: ValueConfig, width: int, seed: int) -> ValueHead:
  """A new head for hidden states of `width`."""
  params = _head(config).init(jax.random.key(seed), jnp.zeros((1, width)))
  return ValueHead(params, optax.adam(config.lr).init(params))


@functools.partial(jax.jit, static_argnames=("config", "policy"))
def learned_values(
  config: ValueConfig, policy: Policy, head: ValueHead, params, prompts_PxS, prompt_lengths_P, completions_BxT, review
) -> tuple[Review, jax.Array]:
  """The review with the head's values in it, and the hidden states [B, T, D] that they were read from.

  The hidden state that predicts a step's first token has seen the prompt and the steps before, and nothing else.
  """
  hidden_BxTxD = policy.completion_hidden(params, prompts_PxS, prompt_lengths_P, completions_BxT).astype(jnp.float32)
  values_BxT = jax.nn.sigmoid(_logits(config, head.params, hidden_BxTxD))
  rows_Bx1, k = jnp.arange(values_BxT.shape[0])[:, None], review.values_BxK.shape[1]
  first_BxT = jnp.where(_first_of_step(review.step_ids_BxT), review.step_ids_BxT, k)
  values_BxK = jnp.full(review.values_BxK.shape, jnp.nan).at[rows_Bx1, first_BxT].set(values_BxT, mode="drop")
  return review._replace(values_BxK=values_BxK, ok_B=jnp.ones_like(review.ok_B)), hidden_BxTxD


@functools.partial(jax.jit, static_argnames="config", donate_argnames="head")
def fit_head(
  config: ValueConfig, head: ValueHead, hidden_BxTxD, step_ids_BxT, lengths_B, rewards_PxG
) -> tuple[ValueHead, jax.Array]:
  """Trains the head to predict outcomes from step boundaries; returns it, and its loss (nats) before that."""
  t = step_ids_BxT.shape[1]
  counts_BxT = _first_of_step(step_ids_BxT) & (jnp.arange(t) < lengths_B[:, None])

  def loss(params):
    nats_BxT = optax.sigmoid_binary_cross_entropy(_logits(config, params, hidden_BxTxD), rewards_PxG.reshape(-1, 1))
    return nats_BxT.mean(where=counts_BxT)

  def update(head, _):
    value, grads = jax.value_and_grad(loss)(head.params)
    changes, opt_state = optax.adam(config.lr).update(grads, head.opt_state)
    return ValueHead(optax.apply_updates(head.params, changes), opt_state), value

  head, losses = jax.lax.scan(update, head, length=config.updates)
  return head, losses[0]


def _first_of_step(step_ids_BxT) -> jax.Array:
  return jnp.diff(step_ids_BxT, prepend=-1) > 0  # Beyond a completion's end the ids are 0 and do not rise.
