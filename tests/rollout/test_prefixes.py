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
from scripted import Scripted

from dca_jax import learner
from dca_jax.credit import ReviewArrays
from dca_jax.devices import mesh
from dca_jax.episode import Episode, Outcome, Review, Segment, Step
from dca_jax.learner.supervised import Demonstrations, warm_start
from dca_jax.learner.values import Learned, ValueHead, fit_head, init_head, learned_values
from dca_jax.loop import train
from dca_jax.policy import Policy
from dca_jax.policy.sharding import batch_sharding, replicated
from dca_jax.rollout import Rollout, Sampler, encode_prompts, in_order, slots
from dca_jax.rollout.collect import cut_steps, rows_of
from dca_jax.rollout.prefixes import Continues, monte_carlo
from dca_jax.store.trajectories import read_trajectories
from dca_jax.tasks.tokenizer import text_of

CONFIG = tiny.make_config()
TASK = CONFIG.task.open()
TOKENIZER = TASK.tokenizer()
POLICY = Policy(CONFIG.policy, len(TOKENIZER))
ROWS = batch_sharding(mesh.make_mesh(CONFIG.mesh))
END_IDS = (TOKENIZER.eos_token_id,)
T = CONFIG.rollout.max_tokens
ENGINE = CONFIG.engine.open(POLICY.clone(mesh=ROWS.mesh), CONFIG.rollout, TOKENIZER)
SAMPLER = Sampler(ENGINE, CONFIG.rollout, TASK, TOKENIZER, 99, np.arange(CONFIG.rollout.problems))


@functools.cache
def warm_params():
  """A policy that has seen demonstrations, so that it is right now and then."""
  params = jax.jit(lambda key: nn.unbox(POLICY.init_params(key)))(jax.random.key(0))
  limits = CONFIG.rollout.max_prompt_tokens, CONFIG.rollout.max_tokens
  demonstrations = Demonstrations(TASK, CONFIG.task, TOKENIZER, limits)
  everywhere = replicated(ROWS.mesh)
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
      answers = [sample.tokens for sample in self.draw(group, noise=0)]
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
    return Rollout(self.episodes, *self.prompts, *rows_of(self.episodes, T), [], 0, 0, [])

  def draw(self, group, noise):
    ids, numbers = range(len(self.problems)), np.arange(group)
    return in_order(SAMPLER.stream(self.params, self.prompts, ids, numbers, (noise,)))

  def values(self, continuations=4, noise=9, engine=None):
    sampler = SAMPLER._replace(engine=engine) if engine else SAMPLER
    policy = Continues(sampler, self.params, (noise,))
    reviews, spent = monte_carlo(continuations, policy, self.rollout)
    return [review.values for review in reviews], spent.tokens


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
  samples = batch.draw(1024, noise=5)
  for p, problem in enumerate(batch.problems):
    own = samples[p * 1024 : (p + 1) * 1024]
    texts = [text_of(TOKENIZER, sample.tokens) for sample in own]
    cut_off = [sample.truncated for sample in own]
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
  drawn = batch.draw(4, noise=9)
  texts = [text_of(TOKENIZER, sample.tokens) for sample in drawn]
  won = [
    TASK.verify(batch.problems[0], text, sample.truncated).reward
    for text, sample in zip(texts, drawn, strict=True)
  ]
  assert values == [(np.mean(won),)] * 2
  assert generated == sum(len(sample.tokens) for sample in drawn)


def right_after(batch, length):
  """Continues every prefix to the right answer, in `length` tokens."""
  text = ("b0;" * T)[: length - 3] + f"#{batch.problems[0].answer}$"
  tokens = TOKENIZER(text, add_special_tokens=False)["input_ids"]
  return Scripted(lambda wanted, p, g: tokens, ends=END_IDS)


def test_a_continuation_may_fill_the_room_and_not_one_token_more(monkeypatch):
  # Twelve tokens; 0, 3, 6 and 9 of them are written before the four steps.
  batch = Batch(1, texts=["a1;b0;a1;#1$"] * 2)
  for length, wanted in (
    (3, (1, 1, 1, 1)),
    (6, (1, 1, 1, 0)),
    (7, (1, 1, 0, 0)),
    (12, (1, 0, 0, 0)),
  ):
    values, generated = batch.values(4, engine=right_after(batch, length))
    assert values == [wanted] * 2
    # What runs over is paid for as far as it would have been written.
    assert generated == 4 * sum(min(length, T - written) for written in (0, 3, 6, 9))
  endless = Scripted(lambda wanted, p, g: [END_IDS[0] + 1] * T, ends=END_IDS)
  assert batch.values(4, engine=endless)[0] == [(0, 0, 0, 0)] * 2
  # A task that looks at nothing else is told, too, that what runs over was cut.
  monkeypatch.setattr(
    TASK, "verify", lambda problem, text, cut: Outcome(float(not cut), not cut, cut)
  )
  assert batch.values(4, engine=right_after(batch, 6))[0] == [(1, 1, 1, 0)] * 2


def test_each_prefix_is_continued_once_from_its_own_prompt():
  batch = Batch(2, texts=["a1;b2;#3$", "a1;b3;#4$", "a1;b2;#3$", "#0$"])
  engine = right_after(batch, 3)
  batch.values(4, engine=engine)
  (asked,) = engine.wanted
  prompts = [tuple(batch.prompts[0][p, : batch.prompts[1][p]].tolist()) for p in range(2)]
  assert prompts[0] != prompts[1]

  def begun(p, text):
    return (*prompts[p], *(TOKENIZER(text, add_special_tokens=False)["input_ids"] if text else ()))

  rows = zip(asked.prompts_PxS.tolist(), asked.prompt_lengths_P, strict=True)
  first = [begun(0, text) for text in ("", "a1;", "a1;b2;", "a1;b3;")]
  second = [begun(1, text) for text in ("", "a1;", "a1;b2;")]
  assert [tuple(row[:n]) for row, n in rows] == first + second
  assert asked.begun_P.tolist() == [0, 3, 6, 6, 0, 3, 6]
  assert asked.limits_P.tolist() == [T - n for n in asked.begun_P]
  assert len({*asked.problems_P.tolist()}) == 7


def test_monte_carlo_is_a_function_of_its_noise_and_compiles_once():
  batch = Batch()
  one, _ = batch.values(4)
  compiled = slots.decode._cache_size()
  assert batch.values(4)[0] == one
  assert batch.values(4, noise=8)[0] != one
  Batch(2, texts=["a1;b2;#3$", "a1;b3;#4$", "b1;b0;a0;#1$", "#0$"]).values(4)
  assert slots.decode._cache_size() == compiled


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
