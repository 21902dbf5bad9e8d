"""An episode of several turns trains what the policy wrote, and reads the rest."""

import jax
import numpy as np
import pytest
from test_update import (
  LENGTHS,
  PARAMS,
  PLAIN,
  WITHIN,
  B,
  G,
  P,
  S,
  T,
  assert_same,
  batch,  # noqa: F401
  everything,
  flat,
  gradient,
  learner_logprobs,
  plain_grpo_loss,
)

from dca_jax.learner import Batch

# Given between two turns, before the first, and after the last.
GIVEN = np.zeros((B, T), bool)
for row, start, end in ((0, 2, 4), (2, 1, 2), (5, 1, 5), (6, 0, 1), (7, 1, 3)):
  GIVEN[row, start:end] = True
SAMPLED = WITHIN & ~GIVEN


@pytest.fixture(scope="module")
def turns(batch):  # noqa: F811
  return batch._replace(sampled_BxT=SAMPLED)


def last_turn(row: int) -> int:
  """Where the last turn of a row begins."""
  written = np.flatnonzero(SAMPLED[row])
  return next(int(t) for t in reversed(written) if t - 1 not in written)


def test_turns_have_the_gradient_of_a_fresh_computation(turns):
  loss, expected = jax.jit(jax.value_and_grad(lambda params: plain_grpo_loss(params, turns)))(
    PARAMS
  )
  got, metrics = gradient(PLAIN, turns)
  assert np.abs(flat(expected)).max() > 0.01
  assert_same(got, expected, rtol=1e-5, atol=1e-6)
  assert metrics["learner/policy_loss"] == pytest.approx(float(loss), rel=1e-5)
  assert metrics["learner/tokens"] == SAMPLED[np.asarray(turns.trained_B)].sum()


def test_the_last_turn_is_a_completion_of_all_before_it(turns):
  prompts, lengths = np.zeros((B, S + T), np.int32), np.zeros(B, np.int32)
  rest = {
    name: np.zeros((B, T), np.float32)
    for name in ("advantages_BxT", "logprobs_BxT", "reference_BxT")
  }
  tokens, sampled = np.zeros((B, T), np.int32), np.zeros((B, T), bool)
  for row in range(B):
    start, own = last_turn(row), turns.prompt_lengths_P[row // G]
    before = np.concatenate([turns.prompts_PxS[row // G, :own], turns.tokens_BxT[row, :start]])
    prompts[row, : len(before)], lengths[row] = before, len(before)
    n = int(SAMPLED[row, start:].sum())
    for array, whole in (
      *((rest[name], getattr(turns, name)) for name in rest),
      (tokens, turns.tokens_BxT),
    ):
      array[row, :n] = whole[row, start : start + n]
    sampled[row, :n] = True
  fresh = Batch(prompts, lengths, tokens, sampled, turns.trained_B, **rest)
  only = np.array([np.arange(T) >= last_turn(row) for row in range(B)])
  ours = turns._replace(sampled_BxT=SAMPLED & only)
  wanted, said = gradient(everything("tokens"), fresh, on_policy=False)
  got, metrics = gradient(everything("tokens"), ours, on_policy=False)
  assert np.abs(flat(wanted)).max() > 0.01
  assert_same(got, wanted, rtol=1e-4, atol=1e-6)
  assert metrics == pytest.approx(said, rel=1e-4, abs=1e-6)


def test_given_tokens_get_no_gradient_whatever_is_said_of_them(turns):
  beyond = ~SAMPLED
  changed = turns._replace(
    advantages_BxT=np.where(beyond, np.float32(1e6), turns.advantages_BxT),
    logprobs_BxT=np.where(beyond, np.float32(-1e6), turns.logprobs_BxT),
    reference_BxT=np.where(beyond, np.float32(1e6), turns.reference_BxT),
  )
  for config in (PLAIN, everything("tokens")):
    kept, metrics = gradient(config, turns, on_policy=False)
    got, other = gradient(config, changed, on_policy=False)
    jax.tree.map(np.testing.assert_array_equal, got, kept)
    assert other == metrics
  silent = turns._replace(advantages_BxT=np.where(GIVEN, turns.advantages_BxT, 0))
  assert not flat(gradient(PLAIN, silent)[0]).any()


def test_given_tokens_are_read(turns):
  """What was given after the last turn is not."""
  tokens = np.where(GIVEN, (turns.tokens_BxT + 1) % 20, turns.tokens_BxT)
  changed = turns._replace(tokens_BxT=tokens)
  moved = np.abs(learner_logprobs(PARAMS, changed) - learner_logprobs(PARAMS, turns))
  for row in range(B):
    first = int(np.argmax(GIVEN[row])) if GIVEN[row].any() else T
    after = SAMPLED[row] & (np.arange(T) > first)
    assert (moved[row, after] > 1e-4).all()
    assert not moved[row, : min(first, LENGTHS[row])].any()
  assert P * G == B
