"""Values of prefixes from the policy: continuations, and a learned head."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dca_jax import mesh
from dca_jax.credit import Review
from dca_jax.policy import Policy
from dca_jax.rollout import Samples, encode_prompts, sample, token_pieces
from dca_jax.task import TASKS
from dca_jax.train import cut_steps
from dca_jax.value import ValueConfig, fit_head, init_head, learned_values, monte_carlo
from dca_jax.warmstart import warm_start

CONFIG = tiny.make_config()
TASK = TASKS[CONFIG.task.name](CONFIG.task)
TOKENIZER = TASK.tokenizer()
POLICY = Policy(CONFIG.policy, len(TOKENIZER))
ROWS = mesh.batch_sharding(mesh.make_mesh(CONFIG.mesh))
END_IDS = np.array([TOKENIZER.eos_token_id], np.int32)
T = CONFIG.rollout.max_tokens


@functools.cache
def warm_params():
  """A policy that has seen demonstrations, so that it is right now and then."""
  params = jax.jit(lambda key: nn.unbox(POLICY.init_params(key)))(jax.random.key(0))
  limits = CONFIG.rollout.max_prompt_tokens, CONFIG.rollout.max_tokens
  return warm_start(CONFIG.warmstart, TASK, CONFIG.task, TOKENIZER, POLICY, params, limits)


class Batch:
  """Problems of the tiny task and completions, sampled or given as texts."""

  def __init__(self, count=2, group=2, texts=None):
    self.params = warm_params()
    self.problems = [TASK.problem("train", i) for i in range(count)]
    self.prompts = encode_prompts(TOKENIZER, self.problems, CONFIG.rollout.max_prompt_tokens)
    if texts:
      tokens = np.zeros((len(texts), T), np.int32)
      lengths = np.array([len(text) for text in texts], np.int32)
      for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
      self.samples = Samples(tokens, lengths, np.zeros(len(texts), bool), np.zeros((len(texts), T), np.float32))
    else:
      self.samples = jax.device_get(self.draw(group, key=0))
    self.spans, _ = cut_steps(self.samples, TOKENIZER, TASK)

  def draw(self, group, key):
    return sample(
      POLICY,
      self.params,
      *self.prompts,
      np.arange(len(self.problems), dtype=np.uint32),
      jax.random.key(key),
      END_IDS,
      sampling=CONFIG.rollout.sampling,
      group=group,
      max_tokens=T,
    )

  def values(self, continuations=4, key=9):
    reviews, generated = monte_carlo(
      ValueConfig(source="monte_carlo", continuations=continuations),
      CONFIG.rollout,
      TASK,
      TOKENIZER,
      POLICY,
      self.params,
      jax.random.key(key),
      END_IDS,
      ROWS,
      self.problems,
      self.prompts,
      self.samples,
      self.spans,
    )
    return [review.values for review in reviews], generated


# Monte Carlo.


def test_values_are_shares_of_the_continuations_and_shared_prefixes_have_one():
  batch = Batch(1, texts=["a1;b2;#3$", "a1;b3;#4$", "a2;b2;#3$"])
  values, generated = batch.values(4)
  assert [len(own) for own in values] == [3, 3, 3]
  assert all((4 * v).is_integer() and 0 <= v <= 1 for own in values for v in own)
  assert values[0][:2] == values[1][:2]
  assert values[0][0] == values[2][0]
  # Six distinct prefixes: none, a1, a2, a1b2, a1b3, a2b2.
  room = T + 2 * (T - 3) + 3 * (T - 6)
  assert 4 * 6 <= generated <= 4 * room


def test_the_value_of_the_prompt_is_the_policys_own_accuracy():
  batch = Batch(2, group=2)
  values, _ = batch.values(512)
  samples = jax.device_get(batch.draw(1024, key=5))
  pieces = token_pieces(TOKENIZER)
  for p, problem in enumerate(batch.problems):
    rows = range(p * 1024, (p + 1) * 1024)
    texts = ["".join(pieces[t] for t in samples.tokens_BxT[i, : samples.lengths_B[i]]) for i in rows]
    cut_off = samples.truncated_B[rows.start : rows.stop].tolist()
    truth = np.mean([TASK.verify(problem, x, cut).reward for x, cut in zip(texts, cut_off, strict=True)])
    assert 0.05 < truth < 0.95
    assert abs(values[2 * p][0] - truth) < 4 * np.sqrt(truth * (1 - truth) * (1 / 512 + 1 / 1024))


def test_a_continuation_gets_no_more_tokens_than_were_left():
  # Eleven tokens of twelve are written: only an end token now would finish, and then without an answer.
  batch = Batch(1, texts=["a1;a1;a1;a1#", "a1;a1;a1;#1$"])
  batch.spans[0] = [(0, 3), (3, 11), (11, 12)]
  values, generated = batch.values(8)
  assert values[0][2] == 0
  assert generated <= 8 * (T + (T - 3) + 1 + (T - 6) + (T - 9))


def test_monte_carlo_is_a_function_of_its_key_and_compiles_once():
  batch = Batch()
  one, _ = batch.values(4)
  compiled = sample._cache_size()
  assert batch.values(4)[0] == one
  Batch(2, texts=["a1;b2;#3$", "a1;b3;#4$", "b1;b0;a0;#1$", "#0$"]).values(4)
  assert sample._cache_size() == compiled


# A learned head.


def arrays(batch):
  ids = np.zeros(batch.samples.tokens_BxT.shape, np.int32)
  for row, steps in zip(ids, batch.spans, strict=True):
    for k, (start, end) in enumerate(steps):
      row[start:end] = k
  k = np.zeros(ids.shape)
  return Review(
    ids, k.astype(np.int32), k.astype(np.float32), np.full(ids.shape, np.nan, np.float32), np.zeros(len(ids), bool)
  )


HEAD = ValueConfig(source="learned", width=16, lr=0.02, updates=20)


def valued(batch, head):
  return learned_values(HEAD, POLICY, head, batch.params, *batch.prompts, batch.samples.tokens_BxT, arrays(batch))


def test_a_new_head_says_one_half_and_nothing_beyond_the_last_step():
  batch = Batch(1, texts=["a1;b2;#3$", "a1;#4$"])
  review, _ = valued(batch, init_head(HEAD, CONFIG.policy.width, 0))
  assert np.array_equal(np.isfinite(review.values_BxK).sum(1), [3, 2])
  assert np.array_equal(review.values_BxK[0, :3], [0.5] * 3)
  assert np.asarray(review.ok_B).all()


def trained_head(batch, rewards):
  head = init_head(HEAD, CONFIG.policy.width, 0)
  losses = []
  for _ in range(30):
    review, hidden = valued(batch, head)
    head, loss = fit_head(HEAD, head, hidden, review.step_ids_BxT, batch.samples.lengths_B, jnp.asarray([rewards]))
    losses.append(float(loss))
  return head, losses


def test_the_head_learns_what_a_prefix_is_worth():
  batch = Batch(1, texts=["a1;b2;#3$", "a2;b2;#3$"])
  head, losses = trained_head(batch, [1.0, 0.0])
  assert losses[0] == pytest.approx(np.log(2))
  values = np.asarray(valued(batch, head)[0].values_BxK)
  # Behind the first step the two differ; before it they are one prefix, worth one half.
  assert (values[0, 1:3] > 0.9).all()
  assert (values[1, 1:3] < 0.1).all()
  assert values[0, 0] == values[1, 0] == pytest.approx(0.5, abs=0.1)


def test_a_learned_value_does_not_read_its_own_step():
  batch = Batch(1, texts=["a1;b2;#3$", "a1;b7;#9$"])
  head, _ = trained_head(Batch(1, texts=["a1;b2;#3$", "a2;b2;#3$"]), [1.0, 0.0])
  values = np.asarray(valued(batch, head)[0].values_BxK)
  assert np.array_equal(values[0, :2], values[1, :2])
  assert values[0, 2] != values[1, 2]
