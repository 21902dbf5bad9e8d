"""Policies without training: random parameters, and given completions read token by token."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dca_jax.policy import PolicyConfig, by_layer
from dca_jax.policy.transformer import Context

# Layers of several shapes: two rounds, the second without keys of its own.
ROUNDS = PolicyConfig(
  width=16,
  depth=4,
  heads=2,
  kv_heads=2,
  head_dim=8,
  mlp=24,
  window=40,
  windowed=(0, 2),
  global_head_dim=16,
  global_kv_heads=1,
  global_k_eq_v=True,
  kv_shared=2,
  shared_mlp_double=True,
  layer_embedding=4,
  layer_scale=True,
  qk_norm=True,
  v_norm=True,
)


def token_by_token(policy, params, prompts, lengths, completions) -> jax.Array:
  """What `completion_hidden` gives for the same arguments."""
  rows, most = completions.shape
  read = policy.read_prompts(params, prompts, lengths)
  empty = policy.empty_cache(rows, most)
  start = Context(by_layer(read.cache), lengths, empty, jnp.int32(0), jnp.zeros(rows, jnp.int32))

  def one(context, tokens):
    hidden, cache = policy.decode(params, policy.layers(params), context, tokens)
    return Context(*context[:2], cache, context.clock + 1, context.read_B + 1), hidden

  _, rest = jax.lax.scan(one, start, completions.T[:-1])
  first = jnp.repeat(read.last_PxD, rows // len(lengths), 0)[:, None]
  return jnp.concatenate([first, rest.swapaxes(0, 1)], 1)


def random_params(policy, scale: float, seed: int = 0):
  """Made with numpy, which needs no compiling; norms do not scale by 1, so that they count too."""
  rng = np.random.default_rng(seed)
  shapes = nn.unbox(jax.eval_shape(policy.init_params, jax.random.key(0)))
  return jax.tree.map_with_path(
    lambda path, a: np.float32(
      scale * rng.normal(size=a.shape) + ("scale" in jax.tree_util.keystr(path))
    ),
    shapes,
  )
