"""Values of prefixes from the policy: continuations, and a learned head."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from dca_jax import learner
from dca_jax.credit import ReviewArrays
from dca_jax.devices import mesh
from dca_jax.episode import Episode, Outcome, Review, Segment, Step
from dca_jax.learner.supervised import Demonstrations, warm_start
from dca_jax.learner.values import Learned, ValueHead, fit_head, init_head, learned_values
from dca_jax.loop import train
from dca_jax.policy import Policy
from dca_jax.rollout import Rollout, Sampler, Samples, encode_prompts, sample, sampler
from dca_jax.rollout.collect import cut_steps, rows_of
from dca_jax.rollout.prefixes import Continues, monte_carlo
from dca_jax.store.trajectories import read_trajectories
from dca_jax.tasks.tokenizer import text_of

CONFIG = tiny.make_config()
TASK = CONFIG.task.open()
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
  demonstrations = Demonstrations(TASK, CONFIG.task, TOKENIZER, limits)
  everywhere = mesh.replicated(ROWS.mesh)
  return warm_start(CONFIG.warmstart, demonstrations, POLICY, params, everywhere)


class Batch:
  """Problems of the tiny task and completions, sampled or given as texts."""

  def __init__(self, count=2, group=2, texts=None):
    self.params = warm_params()
    self.problems = [TASK.problem("train", i) for i in range(count)]
    self.prompts = encode_prompts(TOKENIZER, self.problems, CONFIG.rollout.max_prompt_tokens, 99)
    if texts:
      answers = [
        np.array(TOKENIZER(text, add_special_tokens=False)["input_ids"], np.int32) for text in texts
      ]
    else:
      samples = jax.device_get(self.draw(group, key=0))
      answers = [row[:n] for row, n in zip(samples.tokens_BxT, samples.lengths_B, strict=True)]
    episodes = [
      Episode(
        "",
        self.problems[i * count // len(answers)],
        (Segment(tokens, True, np.zeros(len(tokens), np.float32)),),
        Outcome(0.0, False, False),
      )
      for i, tokens in enumerate(answers)
    ]
    self.episodes, _ = cut_steps(episodes, TOKENIZER, TASK)

  @property
  def rollout(self):
    return Rollout(self.episodes, *self.prompts, *rows_of(self.episodes, T), [], 0, 0)

  def draw(self, group, key):
    return sample(
      POLICY,
      self.params,
      *self.prompts,
      np.arange(len(self.problems), dtype=np.uint32),
      jax.random.key(key),
      END_IDS,
      sampling=CONFIG.rollout.sampling,
      numbers_PxG=np.tile(np.arange(group), (len(self.problems), 1)),
      max_tokens=T,
    )

  def values(self, continuations=4, key=9):
    policy = Sampler(POLICY, CONFIG.rollout, jnp.asarray(END_IDS), ROWS)
    asked = Continues(policy, self.params, jax.random.key(key), TASK, TOKENIZER)
    reviews, generated = monte_carlo(continuations, asked, self.rollout)
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
  for p, problem in enumerate(batch.problems):
    rows = range(p * 1024, (p + 1) * 1024)
    texts = [text_of(TOKENIZER, samples.tokens_BxT[i, : samples.lengths_B[i]]) for i in rows]
    cut_off = samples.truncated_B[rows.start : rows.stop].tolist()
    truth = np.mean(
      [TASK.verify(problem, x, cut).reward for x, cut in zip(texts, cut_off, strict=True)]
    )
    assert 0.05 < truth < 0.95
    assert abs(values[2 * p][0] - truth) < 4 * np.sqrt(truth * (1 - truth) * (1 / 512 + 1 / 1024))


def test_a_continuation_gets_no_more_tokens_than_were_left():
  # Eleven tokens of twelve are written: only an end token now would finish, and then without an
  # answer.
  batch = Batch(1, texts=["a1;a1;a1;a1#", "a1;a1;a1;#1$"])
  steps = tuple(Step(a, b, "") for a, b in ((0, 3), (3, 11), (11, 12)))
  batch.episodes[0] = dataclasses.replace(batch.episodes[0], steps=steps)
  values, generated = batch.values(8)
  assert values[0][2] == 0
  assert generated <= 8 * (T + (T - 3) + 1 + (T - 6) + (T - 9))


def test_what_is_generated_is_counted_and_judged_by_the_task():
  """Both texts have one step, so all there is to continue is the prompt, once."""
  batch = Batch(1, texts=["#3$", "#4$"])
  values, generated = batch.values(4)
  width = CONFIG.rollout.max_prompt_tokens + T
  prompt = np.zeros((2, width), np.int32)
  prompt[:, : batch.prompts[0].shape[1]] = batch.prompts[0]
  lengths = np.repeat(batch.prompts[1], 2)
  drawn = jax.device_get(
    sample(
      POLICY,
      batch.params,
      prompt,
      lengths,
      np.zeros(2, np.uint32),
      jax.random.key(9),
      END_IDS,
      sampling=CONFIG.rollout.sampling,
      numbers_PxG=np.tile(np.arange(4), (2, 1)),
      max_tokens=T,
    )
  )
  texts = [text_of(TOKENIZER, drawn.tokens_BxT[i, : drawn.lengths_B[i]]) for i in range(4)]
  won = [
    TASK.verify(batch.problems[0], x, bool(cut)).reward
    for x, cut in zip(texts, drawn.truncated_B, strict=False)
  ]
  assert values == [(np.mean(won),)] * 2
  assert generated == drawn.lengths_B[:4].sum()


class Fake:
  """In the place of the sampler: every continuation is the right answer, of `length` tokens."""

  def __init__(self, batch, length, truncated=False):
    self.text = ("b0;" * T)[: length - 3] + f"#{batch.problems[0].answer}$"
    self.truncated, self.seen = truncated, []

  def __call__(
    self, policy, params, ids, lengths, numbers, key, end_ids, *, numbers_PxG, max_tokens, **_
  ):
    self.seen += [
      tuple(row[:n]) for row, n in zip(np.asarray(ids).tolist(), np.asarray(lengths), strict=True)
    ]
    b = numbers_PxG.size
    tokens = np.zeros((b, max_tokens), np.int32)
    tokens[:, : len(self.text)] = TOKENIZER(self.text, add_special_tokens=False)["input_ids"]
    return Samples(
      tokens,
      np.full(b, len(self.text)),
      np.full(b, self.truncated),
      np.zeros((b, max_tokens), np.float32),
    )


def test_a_continuation_may_fill_the_room_and_not_one_token_more(monkeypatch):
  # Twelve tokens; 0, 3, 6 and 9 of them are written before the four steps.
  batch = Batch(1, texts=["a1;b0;a1;#1$"] * 2)
  for length, wanted in (
    (3, (1, 1, 1, 1)),
    (6, (1, 1, 1, 0)),
    (7, (1, 1, 0, 0)),
    (12, (1, 0, 0, 0)),
  ):
    monkeypatch.setattr(sampler, "sample", Fake(batch, length))
    values, generated = batch.values(4)
    assert values == [wanted] * 2
    # What runs over is paid for as far as it would have been written.
    assert generated == 4 * sum(min(length, T - written) for written in (0, 3, 6, 9))
  monkeypatch.setattr(sampler, "sample", Fake(batch, 3, truncated=True))
  assert batch.values(4)[0] == [(0, 0, 0, 0)] * 2
  # A task that looks at nothing else is told, too, that what runs over was cut.
  monkeypatch.setattr(
    TASK, "verify", lambda problem, text, cut: Outcome(float(not cut), not cut, cut)
  )
  monkeypatch.setattr(sampler, "sample", Fake(batch, 6))
  assert batch.values(4)[0] == [(1, 1, 1, 0)] * 2


def test_each_prefix_is_continued_once_from_its_own_prompt(monkeypatch):
  batch = Batch(2, texts=["a1;b2;#3$", "a1;b3;#4$", "a1;b2;#3$", "#0$"])
  fake = Fake(batch, 3)
  monkeypatch.setattr(sampler, "sample", fake)
  batch.values(4)
  prompts = [tuple(batch.prompts[0][p, : batch.prompts[1][p]].tolist()) for p in range(2)]
  assert prompts[0] != prompts[1]

  def begun(p, text):
    return (*prompts[p], *(TOKENIZER(text, add_special_tokens=False)["input_ids"] if text else ()))

  wanted = {begun(0, x) for x in ("", "a1;", "a1;b2;", "a1;b3;")} | {
    begun(1, x) for x in ("", "a1;", "a1;b2;")
  }
  assert set(fake.seen) == wanted
  # Two batches of four, the last one filled up.
  assert len(fake.seen) == 8
  assert sorted(map(len, fake.seen), reverse=True)[:4] == sorted(
    map(len, fake.seen[:4]), reverse=True
  )


def test_monte_carlo_is_a_function_of_its_key_and_compiles_once():
  batch = Batch()
  one, _ = batch.values(4)
  compiled = sample._cache_size()
  assert batch.values(4)[0] == one
  Batch(2, texts=["a1;b2;#3$", "a1;b3;#4$", "b1;b0;a0;#1$", "#0$"]).values(4)
  assert sample._cache_size() == compiled


# A learned head.


def arrays(batch):
  return ReviewArrays.of([Review("none")] * len(batch.episodes), batch.rollout.step_ids_BxT)


def read(batch):
  """What the learner reads of it."""
  rollout = batch.rollout
  trained = np.ones(len(batch.episodes), bool)
  return learner.Batch(
    *batch.prompts, rollout.tokens_BxT, rollout.sampled_BxT, trained, rollout.logprobs_BxT
  )


HEAD = Learned(width=16, lr=0.02, updates=20)


def valued(batch, head):
  return learned_values(HEAD, POLICY, head, batch.params, read(batch), arrays(batch))


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
    _, memory = valued(batch, head)
    head, loss = fit_head(HEAD, head, memory, batch.rollout.sampled_BxT, jnp.asarray([rewards]))
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


def test_learned_values_are_chances_one_for_each_step():
  head, losses = trained_head(Batch(1, texts=["a1;b2;#3$", "a2;b2;#3$"]), [1.0, 0.0])
  assert losses[-1] < 0.5 * losses[0]
  batch = Batch(2, group=2)
  # Also where it is so sure that float32 has no number for it.
  for scale in (1, 100):
    scaled = head._replace(params=jax.tree.map(lambda x, scale=scale: scale * x, head.params))
    values = np.asarray(valued(batch, scaled)[0].values_BxK)
    for own, episode in zip(values, batch.episodes, strict=True):
      steps = len(episode.steps)
      assert ((own[:steps] >= 0) & (own[:steps] <= 1)).all()
      assert np.isnan(own[steps:]).all()


def test_a_head_is_taught_by_the_boundaries_of_steps_alone():
  """Neither by the tokens inside a step nor by what stands beyond a completion's end."""
  batch, head = Batch(1, texts=["a1;b2;#3$", "a2;b2;#3$"]), init_head(HEAD, CONFIG.policy.width, 0)
  _, memory = valued(batch, head)
  hidden = memory.hidden_BxTxD
  first_T = np.isin(np.arange(T), [step.start for step in batch.episodes[0].steps])

  def fitted(hidden):
    copy = jax.tree.map(jnp.copy, head)  # It is donated.
    changed = memory._replace(hidden_BxTxD=hidden)
    return fit_head(HEAD, copy, changed, batch.rollout.sampled_BxT, jnp.eye(1, 2))[0].params

  def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))

  assert same(fitted(hidden), fitted(jnp.where(first_T[:, None], hidden, 1e3)))
  assert not same(fitted(hidden), fitted(jnp.where(first_T[:, None], 1e3, hidden)))


def test_a_learned_value_does_not_read_its_own_step():
  head, _ = trained_head(Batch(1, texts=["a1;b2;#3$", "a2;b2;#3$"]), [1.0, 0.0])
  one, other = ("a1;b2;#3$", "a1;b7;#9$"), ("a1;b2;a0;#3$", "#3$")
  values = np.asarray(valued(Batch(1, texts=one), head)[0].values_BxK)
  assert np.array_equal(values[0, :2], values[1, :2])
  assert values[0, 2] != values[1, 2]
  # Nor how many steps follow.
  longer = np.asarray(valued(Batch(1, texts=other), head)[0].values_BxK)
  assert np.array_equal(longer[0, :3], values[0, :3])
  assert longer[1, 0] == values[0, 0]


def test_a_runs_values_come_from_the_head_and_the_policy_before_its_batch(tmp_path):
  """Those of the second step, from what was saved after the first and not after the second."""
  config = tiny.make_config({"credit.scheme": "potential", "value.source": "learned", "steps": 2})
  train(config, str(tmp_path), quiet=True)
  rows = list(read_trajectories(tmp_path / "trajectories", 2))
  tokens, sampled, ids, logprobs = rows_of(rows, T)
  nothing = ReviewArrays.of([Review("none")] * len(rows), ids)
  problems = [t.problem for t in rows[:: config.rollout.group]]
  prompts = encode_prompts(TOKENIZER, problems, config.rollout.max_prompt_tokens, 99)
  batch = learner.Batch(*prompts, tokens, sampled, np.ones(len(rows), bool), logprobs)
  recorded = np.concatenate([t.values for t in rows])
  errors = []
  for step in (1, 2):
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
      saved = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state
    head = ValueHead(saved["value_head"]["params"], ())
    review, _ = learned_values(config.value, POLICY, head, saved["params"], batch, nothing)
    values = np.concatenate(
      [own[: len(t.steps)] for own, t in zip(np.asarray(review.values_BxK), rows, strict=True)]
    )
    errors.append(np.abs(values - recorded).max())
  assert errors[0] < 1e-5
  assert errors[1] > 1e-2
