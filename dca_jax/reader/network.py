"""The reader's network: a policy, and small heads on its hidden states."""

import collections
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dca_jax.episode import ROLES, Review
from dca_jax.policy import Policy, Sampling, sampling_logits, token_logprobs
from dca_jax.policy.sharding import batch_sharding, replicated
from dca_jax.reader.texts import Ids, Targets, Texts, encoded, fits, stacked
from dca_jax.review import Request
from dca_jax.tasks.tokenizer import text_of

_WIDTH, _LAYERS, _HEADS = 64, 2, 4
"""Of the part that looks at steps."""
_SCALE = 4.0
"""Weight of a step that changes the chance of success by 1; a quarter is an ordinary step's."""


class Reading(NamedTuple):
  """What the reader says, as arrays."""

  roles_BxKxR: jax.Array
  """Logits."""
  effects_BxK: jax.Array
  values_BxK: jax.Array
  """Logits of the chance of success before each step, read from what stands before it."""
  hidden_BxTxD: jax.Array
  """From which the policy's head predicts each token."""


class _Steps(nn.Module):
  """Looks at the steps of an episode together: at what the policy's causal reading has made of
  each."""

  outputs: int

  @nn.compact
  def __call__(self, read_BxKxF: jax.Array, more_Bx1xF: jax.Array, mask_BxKxK: Any) -> jax.Array:
    """What is said of each step, [B, K, outputs].

    Args:
      more_Bx1xF: what is known of the whole episode.
      mask_BxKxK: which steps each step looks at.
    """
    x_BxKxW = nn.Dense(_WIDTH)(read_BxKxF) + nn.Dense(_WIDTH)(more_Bx1xF)
    x_BxKxW += _waves(jnp.arange(read_BxKxF.shape[1]), _WIDTH)
    for _ in range(_LAYERS):
      look = nn.MultiHeadDotProductAttention(_HEADS)
      x_BxKxW += look(nn.LayerNorm()(x_BxKxW), mask=mask_BxKxK[:, None])
      x_BxKxW += nn.Dense(_WIDTH)(nn.gelu(nn.Dense(2 * _WIDTH)(nn.LayerNorm()(x_BxKxW))))
    last = nn.Dense(self.outputs, kernel_init=nn.initializers.zeros)
    return cast(jax.Array, last(nn.LayerNorm()(x_BxKxW)))


_WHOLE, _BEFORE = _Steps(len(ROLES) + 1), _Steps(1)
"""The one looks at all steps and at how the episode ended, the other at those before."""


def _waves(places_K: jax.Array, width: int) -> jax.Array:
  """Sines and cosines of places (Vaswani et al. 2017)."""
  angles = places_K[:, None] * 1000.0 ** -jnp.linspace(0, 1, width // 2)
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def devices(policy: Policy) -> Mesh:
  """Where a reader reads: it always has a mesh."""
  return cast(Mesh, policy.mesh)


@functools.partial(jax.jit, static_argnums=(0, 1))
def init_heads(width: int, seed: int) -> dict[str, Any]:
  """New heads for hidden states of `width`; they begin knowing nothing."""
  keys = jax.random.split(jax.random.key(seed))
  given = jnp.zeros((1, 1, 2 * width + 2)), jnp.zeros((1, 1, 3)), jnp.ones((1, 1, 1), bool)
  return {"whole": _WHOLE.init(keys[0], *given), "before": _BEFORE.init(keys[1], *given)}


def read(policy: Policy, params: Any, texts: Texts) -> Reading:
  """Reads episodes once.

  Args:
    params: `body`, the policy's, and `heads`.
  """
  body, heads = params["body"], params["heads"]
  prompts = texts.prompts_PxS, texts.prompt_lengths_P
  hidden_BxTxD = policy.completion_hidden(body, *prompts, texts.tokens_BxT)
  logprobs_BxT, _ = token_logprobs(hidden_BxTxD, policy.head(body), texts.tokens_BxT, Sampling())

  def at(places_BxK: Any) -> jax.Array:
    return jnp.take_along_axis(hidden_BxTxD, places_BxK[..., None], 1).astype(jnp.float32)

  belongs_BxTxK = texts.step_ids_BxT[..., None] == jnp.arange(texts.ends_BxK.shape[1])
  own_BxTxK = jnp.where(belongs_BxTxK, logprobs_BxT[..., None], 0.0)
  # A step is as likely as its least likely token; the whole of it less so.
  likely = jnp.stack([jnp.tanh(own_BxTxK.min(1) / 4), jnp.exp(own_BxTxK.sum(1))], -1)
  before_BxKxD = at(texts.starts_BxK)
  done = jnp.concatenate([at(texts.ends_BxK), likely], -1)
  places_K = jnp.arange(texts.ends_BxK.shape[1])
  real_BxK = places_K < texts.steps_B[:, None]
  ended_Bx1x3 = jax.nn.one_hot(texts.outcomes_B, 3)[:, None]
  seen = jnp.concatenate([before_BxKxD, done], -1)
  said = cast(jax.Array, _WHOLE.apply(heads["whole"], seen, ended_Bx1x3, real_BxK[:, None]))
  # Of the step before it, and nothing of itself, of what follows or of the end.
  last = jnp.roll(done, 1, 1) * (places_K > 0)[:, None]
  seen, order_1xKxK = jnp.concatenate([before_BxKxD, last], -1), jnp.tri(len(places_K))[None]
  values = cast(jax.Array, _BEFORE.apply(heads["before"], seen, 0 * ended_Bx1x3, order_1xKxK))
  return Reading(said[..., :-1], said[..., -1], values[..., 0], hidden_BxTxD)


def loss(policy: Policy, params: Any, texts: Texts, known: Targets) -> jax.Array:
  """Mean nats of roles, of expected tokens and of values, and mean squared error of effects; what
  is not known counts nothing."""
  said = read(policy, params, texts)
  roles = optax.softmax_cross_entropy_with_integer_labels(
    said.roles_BxKxR, jnp.maximum(known.roles_BxK, 0)
  )
  wanted_BxT = jnp.maximum(known.tokens_BxT, 0)
  head = policy.head(params["body"])
  logprobs, _ = token_logprobs(said.hidden_BxTxD, head, wanted_BxT, Sampling())
  values = optax.sigmoid_binary_cross_entropy(said.values_BxK, jnp.nan_to_num(known.values_BxK))
  effects = (said.effects_BxK - jnp.nan_to_num(known.effects_BxK)) ** 2
  terms = (
    (roles, known.roles_BxK >= 0),
    (-logprobs, known.tokens_BxT >= 0),
    (values, ~jnp.isnan(known.values_BxK)),
    (effects, ~jnp.isnan(known.effects_BxK)),
  )
  means = [jnp.where(count, x, 0).sum() / jnp.maximum(count.sum(), 1) for x, count in terms]
  return jnp.stack(means).sum()


@functools.partial(jax.jit, static_argnames=("policy", "expects"))
def _said(policy: Policy, params: Any, texts: Texts, expects: bool) -> tuple[Any, ...]:
  said = read(policy, params, texts)
  expected_BxT = texts.tokens_BxT
  if expects:
    head = policy.head(params["body"])

    def likely(hidden_BxD: jax.Array, tokens_B: jax.Array) -> jax.Array:
      chances_BxV = jax.nn.softmax(sampling_logits(hidden_BxD, head, Sampling()))
      return jnp.where(chances_BxV.max(-1) > 0.5, chances_BxV.argmax(-1), tokens_B)

    # One column after the other, so that no logits of all exist, and each device has its own rows.
    columns = said.hidden_BxTxD.swapaxes(0, 1), texts.tokens_BxT.swapaxes(0, 1)
    expected_BxT = jax.lax.map(lambda column: likely(*column), columns).swapaxes(0, 1)
  roles = jax.nn.softmax(said.roles_BxKxR)
  return roles, said.effects_BxK, jax.nn.sigmoid(said.values_BxK), expected_BxT


class Reader(NamedTuple):
  """A reader that is ready to read."""

  policy: Policy
  params: Any
  """Laid out on the devices of the policy's mesh, whole on each."""
  tokenizer: Any
  gives: tuple[str, ...]
  """What it was trained on: some of `roles`, `effects`, `values`, `expected` (steps)."""
  limit: int
  """Most tokens of an episode."""

  @classmethod
  def new(
    cls, policy: Policy, body: Any, tokenizer: Any, gives: tuple[str, ...], limit: int, seed: int
  ) -> "Reader":
    """One that has learnt nothing yet, on the parameters `body` of its policy."""
    params = {"body": body, "heads": init_heads(policy.config.width, seed)}
    return cls(policy, jax.device_put(params, replicated(devices(policy))), tokenizer, gives, limit)

  def reviews(self, requests: Sequence[Request]) -> list[Review]:
    """A review for each request; `invalid` where the episode is too long for the reader."""
    reviews = [Review("invalid")] * len(requests)
    groups: dict[str, list[int]] = collections.defaultdict(list)
    read = encoded(self.tokenizer, requests)
    for i, (request, ids) in enumerate(zip(requests, read, strict=True)):
      if fits(ids, self.limit):
        groups[request.problem].append(i)
    # Programs are for a prompt on each device, with a power of two of answers.
    prompts, queue = devices(self.policy).size, [*groups.values()]
    for begin in range(0, len(queue), prompts):
      part = queue[begin : begin + prompts]
      each = 1 << (max(map(len, part)) - 1).bit_length()
      texts = stacked([[(requests[i], read[i]) for i in own] for own in part], prompts, each)
      laid_out = jax.device_put(texts, batch_sharding(devices(self.policy)))
      expects = "expected" in self.gives
      said = jax.device_get(_said(self.policy, self.params, laid_out, expects))
      for p, own in enumerate(part):
        for row, i in enumerate(own, p * each):
          reviews[i] = self._review(requests[i].steps, read[i], *[x[row] for x in said])
    return reviews

  def _review(
    self,
    steps: Sequence[str],
    ids: Ids,
    roles_KxR: np.ndarray,
    effects_K: np.ndarray,
    values_K: np.ndarray,
    expected_T: np.ndarray,
  ) -> Review:
    n = len(steps)
    names: list[str] = []
    weights: list[float] = []
    if "roles" in self.gives:
      names = [ROLES[r] for r in roles_KxR[:n].argmax(-1)]
      weights = roles_KxR[:n].max(-1).tolist()
    elif "effects" in self.gives:
      names = ["necessary" if effect > 0 else "error" for effect in effects_K[:n]]
      weights = (_SCALE * np.abs(effects_K[:n])).tolist()
    values = values_K[:n].tolist() if "values" in self.gives else []
    reasons: list[str] = []
    if "expected" in self.gives:
      texts = [text_of(self.tokenizer, expected_T[start:end]) for start, end in ids.spans]
      pairs = zip(texts, steps, strict=True)
      reasons = ["" if text == step else f"should have been {text}" for text, step in pairs]
    return Review("ok", tuple(names), tuple(weights), tuple(values), reasons=tuple(reasons))
