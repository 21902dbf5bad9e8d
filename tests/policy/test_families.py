"""Every family against logits that transformers gave for tiny random checkpoints (see
make_reference.py)."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from policies import token_by_token

from dca_jax.devices.mesh import MeshConfig, make_mesh, state_shardings
from dca_jax.learner import LearnerConfig, make_optimizer
from dca_jax.policy import Policy, PolicyConfig, Sampling, sampling_logits
from dca_jax.policy.pretrained import load, resolve

FOLDER = pathlib.Path(__file__).with_name("reference")
MODELS = sorted(path.name for path in FOLDER.iterdir())
# Others of the same family are as these: what they have of their own, the other tests see.
WHOLE = ("gemma2", "gemma3", "llama_scaled", "qwen2_windowed", "qwen3")
PROMPTED = [name for name in MODELS if name != "olmo2"]
DECODED = [name for name in MODELS if name not in ("gemma", "gemma3_pictures", "gemma4_unified")]
VOCAB = 64
LENGTHS = (1, 7, 64, 200)
SPLITS = (
  1,
  3,
  40,
  21,
)  # Tokens of each row that are its prompt; all but the first row read on from there.
BOUND = 2e-4

# Quick to compile, and as exact.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def loaded(name):
  policy = Policy(resolve(PolicyConfig(pretrained=str(FOLDER / name)), VOCAB), VOCAB)
  shardings = state_shardings(
    make_mesh(MeshConfig()), policy, make_optimizer(LearnerConfig(), 1)
  ).params
  return policy, load(policy, FOLDER / name, shardings)


@functools.cache
def reference(name):
  """Rows of tokens, and the logits at each of their positions."""
  with np.load(FOLDER / name / "reference.npz") as file:
    return [file[f"tokens_{n}"] for n in LENGTHS], [file[f"logits_{n}"] for n in LENGTHS]


def stack(rows):
  return jnp.array([np.pad(row, (0, max(map(len, rows)) - len(row))) for row in rows])


def logits(policy, params, hidden):
  flat = sampling_logits(hidden.reshape(-1, hidden.shape[-1]), policy.head(params), Sampling())
  return flat.reshape(*hidden.shape[:-1], -1)


def split(name):
  """The reference rows as prompts and completions,
  and what must come out at each completion token and one further."""
  rows, expected = reference(name)
  prompts = [row[:n] for row, n in zip(rows, SPLITS, strict=True)]
  completions = [np.append(row[n:], 0) for row, n in zip(rows, SPLITS, strict=True)]
  return (
    stack(prompts),
    jnp.array(SPLITS),
    stack(completions),
    [x[n - 1 :] for x, n in zip(expected, SPLITS, strict=True)],
  )


def compare(got, expected):
  assert (
    max(np.abs(row[: len(x)] - x).max() for row, x in zip(np.asarray(got), expected, strict=True))
    < BOUND
  )


@pytest.mark.parametrize("name", WHOLE)
def test_whole_sequences(name):
  policy, params = loaded(name)
  rows, expected = reference(name)
  got = jit(lambda p, tokens: logits(policy, p, policy.apply({"params": p}, tokens)[0]))(
    params, stack(rows)
  )
  compare(got, expected)


@pytest.mark.parametrize("name", PROMPTED)
def test_completions_that_read_a_shared_prompt(name):
  policy, params = loaded(name)
  *batch, expected = split(name)
  got = jit(lambda p, *batch: logits(policy, p, policy.completion_hidden(p, *batch)))(
    params, *batch
  )
  compare(got, expected)


@pytest.mark.parametrize("name", DECODED)
def test_token_by_token(name):
  policy, params = loaded(name)
  prompts, lengths, completions, expected = split(name)

  @jit
  def decode(params, prompts, lengths, completions):
    hidden = token_by_token(policy, params, prompts, lengths, completions)
    return logits(policy, params, hidden)

  compare(decode(params, prompts, lengths, completions), expected)
