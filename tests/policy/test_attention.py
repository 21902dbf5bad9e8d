"""The kernels of the accelerators against plain attention: values and gradients,
whole and windowed."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from policies import ROUNDS

from dca_jax.policy import Policy, PolicyConfig
from dca_jax.policy.attention import KeyValue, attend, choose_kernel, flash_attend

P, G, T, S, N, K, H = 2, 2, 140, 60, 4, 2, 8
SCALE = 0.3
LENGTHS = np.array([S, 17])


def arrays():
  rng = np.random.default_rng(0)
  shapes = (P * G, T, N, H), *[(P * G, K, T, H)] * 2, *[(P, K, S, H)] * 2, (P * G, T, N, H)
  return [jnp.float32(rng.normal(size=shape)) for shape in shapes]


def plain(q, own, prompt, window, soft_cap):
  near, steps = window or S + T, np.arange(T)
  back = steps[:, None] - steps
  prompt_mask = None
  if prompt:
    before = np.arange(S) < LENGTHS[:, None, None]
    prompt_mask = before & ((LENGTHS[:, None] + steps)[..., None] - np.arange(S) < near)
  return attend(q, own, (back >= 0) & (back < near), prompt, prompt_mask, SCALE, soft_cap)


# `xla` is what the call for cuDNN computes, by another implementation; splash is interpreted, which
# is slow.
@pytest.mark.parametrize(
  ("kernel", "window", "soft_cap", "prompted"),
  [
    ("xla", 0, 0.0, True),
    ("xla", 33, 0.0, True),
    ("xla", 33, 0.0, False),
    ("splash", 0, 0.0, False),
    ("splash", 33, 5.0, True),
  ],
)
def test_kernels_give_what_plain_attention_gives(kernel, window, soft_cap, prompted):
  *given, weights = arrays()

  def total(q, k, v, prompt_k, prompt_v, flash):
    own = KeyValue(k.swapaxes(2, 3), v)
    prompt = KeyValue(prompt_k.swapaxes(2, 3), prompt_v) if prompted else None
    if flash:
      lengths = jnp.repeat(jnp.array(LENGTHS), G) if prompted else None
      out = flash_attend(q, own, prompt, lengths, window, SCALE, soft_cap, kernel, None)
    else:
      out = plain(q, own, prompt, window, soft_cap)
    return (out * weights).sum(), out

  run = jax.jit(jax.grad(total, range(5), has_aux=True), static_argnums=5)
  for ours, theirs in zip(
    jax.tree.leaves(run(*given, True)), jax.tree.leaves(run(*given, False)), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize(
  "config",
  [
    PolicyConfig(width=16, depth=2, heads=N, kv_heads=K, head_dim=H, mlp=24, windowed=(0,)),
    ROUNDS,
  ],
  ids=["alike", "rounds"],
)
def test_a_policy_reads_the_same_through_a_kernel(config):
  # Layers that are windowed and that are not, prompts of several lengths.
  config = dataclasses.replace(config, window=9)
  rng = np.random.default_rng(1)
  batch = rng.integers(30, size=(P, S)), LENGTHS, rng.integers(30, size=(P * G, T))
  policy = Policy(config, 30)
  params = jax.jit(lambda key: nn.unbox(policy.init_params(key)))(jax.random.key(0))
  jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
  by_kernel = Policy(dataclasses.replace(config, attention="xla"), 30)
  expected, ours = (jit(one.completion_hidden)(params, *batch) for one in (policy, by_kernel))
  np.testing.assert_allclose(ours, expected, atol=2e-5)
  assert (
    np.abs(
      ours
      - jit(Policy(dataclasses.replace(config, window=S + T), 30).completion_hidden)(params, *batch)
    ).max()
    > 0.01
  )


class Chip:
  def __init__(self, platform):
    self.platform, *generation = platform.split()
    if generation:
      self.compute_capability = generation[0]


class Chips:
  def __init__(self, platform):
    self.devices = np.array([[[Chip(platform)]]])


@pytest.mark.parametrize(
  ("platform", "tokens", "dtype", "soft_cap", "kernel"),
  [
    ("tpu", 512, "float32", 50.0, "splash"),
    ("tpu", 100, "bfloat16", 0.0, "plain"),
    ("gpu 9.0", 512, "bfloat16", 0.0, "cudnn"),
    ("gpu 7.5", 512, "bfloat16", 0.0, "plain"),
    ("gpu gfx90a", 512, "bfloat16", 0.0, "plain"),
    ("gpu 10.0", 512, "float32", 0.0, "plain"),
    ("gpu 10.0", 512, "bfloat16", 50.0, "plain"),
    ("cpu", 512, "bfloat16", 0.0, "plain"),
  ],
)
def test_the_kernel_is_the_platforms(platform, tokens, dtype, soft_cap, kernel):
  assert choose_kernel(Chips(platform), tokens, 128, dtype, soft_cap) == kernel
