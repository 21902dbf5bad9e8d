"""The sampler: what it draws, what it reports about it, and where it stops."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from policies import random_params

from dca_jax.devices.mesh import MeshConfig, make_mesh
from dca_jax.errors import UserError
from dca_jax.policy import Policy, PolicyConfig, Sampling, token_logprobs
from dca_jax.rollout import GREEDY, RolloutConfig, Wanted, encode_prompts, in_order, slots
from dca_jax.rollout.slots import Slotted
from dca_jax.tasks import Problem
from dca_jax.tasks.chains import ChainsConfig

VOCAB = 20
P, G, T = 4, 2, 8
CONFIG = PolicyConfig(width=16, depth=1, heads=2, kv_heads=1, head_dim=8, mlp=24)
POLICY = Policy(CONFIG, VOCAB, make_mesh(MeshConfig()))
IDS = np.array([5, 0, 7, 3])
NOISE = (11,)


@pytest.fixture(scope="module")
def params():
  return jax.tree.map(jnp.float32, random_params(POLICY, 0.3))


@pytest.fixture(scope="module")
def prompts():
  return np.random.default_rng(1).integers(VOCAB, size=(P, 5)).astype(np.int32), np.array(
    [5, 2, 3, 4], np.int32
  )


def ends(*ids):
  """As many end ids each time; no token has the id -1."""
  return (*ids, *[-1] * (VOCAB - len(ids)))


class Drawn(typing.NamedTuple):
  """Samples as arrays, zeros beyond their lengths."""

  tokens_BxT: np.ndarray
  lengths_B: np.ndarray
  truncated_B: np.ndarray
  logprobs_BxT: np.ndarray


def draw(
  params, prompts, *, ids=IDS, noise=NOISE, end_ids=(), sampling=None, group=G, numbers=None
) -> Drawn:
  tokens, lengths = prompts
  cut = {} if sampling is None else dataclasses.asdict(sampling)
  rollout = RolloutConfig(problems=len(lengths), group=group, max_tokens=T, **cut)
  rows = len(lengths) * group
  engine = Slotted(POLICY, rollout, ends(*end_ids), lambda tokens: [b"x"] * len(tokens), rows, T)
  numbers = np.tile(np.arange(group), (len(lengths), 1)) if numbers is None else numbers
  none = np.zeros(len(lengths), np.int32)
  wanted = Wanted(tokens, lengths, ids, numbers, np.full(len(lengths), T), none)
  samples = in_order(engine.stream(params, wanted, noise))
  assert [sample.row for sample in samples] == list(range(numbers.size))
  tokens_BxT, logprobs_BxT = np.zeros((rows, T), np.int32), np.zeros((rows, T), np.float32)
  for i, sample in enumerate(samples):
    tokens_BxT[i, : len(sample.tokens)] = sample.tokens
    logprobs_BxT[i, : len(sample.tokens)] = sample.logprobs
  lengths_B = np.array([len(sample.tokens) for sample in samples])
  return Drawn(tokens_BxT, lengths_B, np.array([s.truncated for s in samples]), logprobs_BxT)


@pytest.fixture(scope="module")
def free(params, prompts):
  """Samples that nothing ends: what any end token must cut, and nothing else."""
  return draw(params, prompts)


def written(samples):
  """The completions as lists, without what stands beyond their lengths."""
  return [row[:n].tolist() for row, n in zip(samples.tokens_BxT, samples.lengths_B, strict=True)]


def cut_at(free, *end_ids):
  """What must be left of `free` when these tokens end a completion: tokens,
  and whether it was truncated."""
  expected = []
  for row in free.tokens_BxT.tolist():
    stops = [t for t, token in enumerate(row) if token in end_ids]
    expected.append((row[: stops[0] + 1], False) if stops else (row, True))
  return expected


# Noise.


def test_same_key_reproduces_bit_for_bit(params, prompts, free):
  again = draw(params, prompts)
  jax.tree.map(np.testing.assert_array_equal, again, free)


def test_steps_and_seeds_draw_different_samples(params, prompts):
  drawn = [draw(params, prompts, noise=noise) for noise in ((0, 1), (0, 2), (1, 1), (0, 1))]
  rows = [{tuple(row) for row in samples.tokens_BxT.tolist()} for samples in drawn]
  assert not rows[0] & rows[1]
  assert not rows[0] & rows[2]
  jax.tree.map(np.testing.assert_array_equal, drawn[0], drawn[3])


def test_samples_and_tokens_have_noise_of_their_own(params, prompts):
  # With an embedding of zeros every token is equally likely, so that only the noise tells samples
  # apart.
  flat = draw(params | {"embedding": jnp.zeros_like(params["embedding"])}, prompts)
  np.testing.assert_allclose(flat.logprobs_BxT, -np.log(VOCAB), rtol=1e-5)
  assert len({tuple(row) for row in flat.tokens_BxT.tolist()}) == P * G
  assert all(len(set(row)) > 2 for row in flat.tokens_BxT.tolist())


def test_a_sample_is_named_by_its_number(params, prompts, free):
  """And one of them takes the likeliest token each time, as a sampler does that is cut to one."""
  again = draw(params, prompts, numbers=np.tile([1, GREEDY], (P, 1)))
  likeliest = draw(params, prompts, sampling=Sampling(top_k=1))
  for field in ("tokens_BxT", "lengths_B", "truncated_B"):
    np.testing.assert_array_equal(getattr(again, field)[::2], getattr(free, field)[1::2])
    np.testing.assert_array_equal(getattr(again, field)[1::2], getattr(likeliest, field)[1::2])
  assert (
    again.logprobs_BxT[1::2] < 0
  ).any()  # Under the distribution that is sampled, not under one that is certain.


def test_place_in_the_batch_does_not_matter(params, prompts, free):
  order = np.array([2, 0, 3, 1])
  moved = draw(params, tuple(x[order] for x in prompts), ids=IDS[order])
  by_problem = free.tokens_BxT.reshape(P, G, T)
  np.testing.assert_array_equal(moved.tokens_BxT.reshape(P, G, T), by_problem[order])
  np.testing.assert_allclose(
    moved.logprobs_BxT.reshape(P, G, T), free.logprobs_BxT.reshape(P, G, T)[order], atol=1e-5
  )


def test_neighbours_do_not_matter(params, prompts, free):
  # Half of the problems, in groups twice as large, whose first samples are those of the smaller
  # groups.
  half = draw(params, tuple(x[::2] for x in prompts), ids=IDS[::2], group=2 * G)
  np.testing.assert_array_equal(
    half.tokens_BxT.reshape(P // 2, 2 * G, T)[:, :G], free.tokens_BxT.reshape(P, G, T)[::2]
  )


def test_noise_belongs_to_the_problem_id(params, prompts, free):
  ids = IDS.copy()
  ids[1] = 99
  other = draw(params, prompts, ids=ids)
  same = (other.tokens_BxT == free.tokens_BxT).all(1).reshape(P, G)
  assert same[[0, 2, 3]].all()
  assert not same[1].any()


# Ends.


def test_without_an_end_every_row_is_truncated(free):
  assert (free.lengths_B == T).all()
  assert free.truncated_B.all()


@pytest.mark.parametrize("end_ids", [(token,) for token in range(VOCAB)] + [(1, 4, 9)], ids=str)
def test_rows_end_with_their_end_token(params, prompts, free, end_ids):
  # Token 0 is among them: it is also what arrays are filled up with, and must end a row like any
  # other.
  got = draw(params, prompts, end_ids=end_ids)
  expected = cut_at(free, *end_ids)
  assert list(zip(written(got), got.truncated_B.tolist(), strict=True)) == expected
  for row, other, n in zip(got.logprobs_BxT, free.logprobs_BxT, got.lengths_B, strict=True):
    np.testing.assert_array_equal(row[:n], other[:n])
    assert (row[:n] < 0).all()


def test_a_full_row_is_truncated_unless_its_last_token_ends_it(params, prompts, free):
  # A row whose last token stands nowhere before.
  row = next(i for i, tokens in enumerate(free.tokens_BxT) if tokens[-1] not in tokens[:-1])
  got = draw(params, prompts, end_ids=[free.tokens_BxT[row, -1]])
  assert got.lengths_B[row] == T
  assert not got.truncated_B[row]
  full = got.lengths_B == T
  assert got.truncated_B[full & (got.tokens_BxT[:, -1] != free.tokens_BxT[row, -1])].all()
  assert (full & got.truncated_B).any()


def test_an_end_token_at_once(params, prompts):
  got = draw(params, prompts, end_ids=range(VOCAB))
  assert (got.lengths_B == 1).all()
  assert not got.truncated_B.any()


def test_stops_when_every_row_has_ended(params, prompts, free, monkeypatch):
  clocks, plain = [], slots.decode

  def decode(*given):
    out = plain(*given)
    clocks.append(int(out[0].context.clock))
    return out

  monkeypatch.setattr(slots, "decode", decode)
  got = draw(params, prompts, end_ids=range(1, VOCAB))
  assert clocks == [got.lengths_B.max()]
  assert clocks[0] < T


def test_other_ends_do_not_recompile(params, prompts):
  draw(params, prompts, end_ids=[3])
  compiled = slots.decode._cache_size()
  lengths = [
    draw(params, prompts, end_ids=end_ids).lengths_B.sum()
    for end_ids in ([3], [3, 4, 5, 6], range(VOCAB))
  ]
  assert slots.decode._cache_size() == compiled
  assert lengths[0] > lengths[1] > lengths[2]


def test_filling_of_prompts_does_not_matter(params, prompts):
  # The end token 0, which is also the filling, does not mark the end of a prompt: its length does.
  tokens, lengths = prompts
  tokens = np.where(np.arange(5) == 0, 0, tokens)
  beyond = np.arange(5) >= lengths[:, None]
  by_filling = [
    draw(params, (np.where(beyond, fill, tokens), lengths), end_ids=[0]) for fill in (0, 7)
  ]
  jax.tree.map(np.testing.assert_array_equal, *by_filling)


# Log-probabilities.


@jax.jit
def hidden_of(params, prompts, completions):
  return POLICY.completion_hidden(params, *prompts, completions)


@functools.partial(jax.jit, static_argnums=3)
def learner_logprobs(params, hidden, completions, sampling):
  return token_logprobs(hidden, POLICY.head(params), completions, sampling)[0]


@pytest.mark.parametrize(
  "sampling",
  [Sampling(), Sampling(temperature=0.7), Sampling(top_k=5), Sampling(top_p=0.8)],
  ids=str,
)
def test_reported_logprobs_are_the_learners(params, prompts, sampling):
  got = draw(params, prompts, end_ids=[0], sampling=sampling)
  hidden = hidden_of(params, prompts, got.tokens_BxT)
  expected = learner_logprobs(params, hidden, got.tokens_BxT, sampling)
  within = np.arange(T) < got.lengths_B[:, None]
  np.testing.assert_allclose(got.logprobs_BxT[within], expected[within], rtol=1e-5, atol=1e-5)
  if sampling != Sampling():  # Plain log-probabilities are not what was sampled from.
    plain = learner_logprobs(params, hidden, got.tokens_BxT, Sampling())
    assert np.abs(plain - got.logprobs_BxT)[within].max() > 0.05


def test_temperature_takes_effect(params, prompts, free):
  cold = draw(params, prompts, sampling=Sampling(temperature=0.7))
  assert (cold.tokens_BxT != free.tokens_BxT).any()
  assert cold.logprobs_BxT.mean() > free.logprobs_BxT.mean()


def test_top_1_is_greedy_and_certain(params, prompts):
  got = draw(params, prompts, sampling=Sampling(top_k=1))
  hidden = np.asarray(hidden_of(params, prompts, got.tokens_BxT))
  np.testing.assert_array_equal(
    got.tokens_BxT, (hidden @ np.asarray(params["embedding"]).T).argmax(-1)
  )
  np.testing.assert_array_equal(got.logprobs_BxT, 0.0)


def test_frequencies_match_the_reported_probabilities(params, prompts):
  n = 512
  tokens, lengths = (x[:1] for x in prompts)
  got = draw(params, (tokens, lengths), ids=IDS[:1], group=n)
  hidden = hidden_of(params, (tokens, lengths), got.tokens_BxT[:1])
  probabilities = scipy.special.softmax(
    np.asarray(hidden[0, 0], np.float64) @ np.asarray(params["embedding"]).T
  )
  first = got.tokens_BxT[:, 0]
  np.testing.assert_allclose(np.exp(got.logprobs_BxT[:, 0]), probabilities[first], rtol=1e-4)
  # Tokens too rare for a chi-square test are counted together.
  rare = probabilities * n < 5
  bins = np.where(rare, VOCAB, np.arange(VOCAB))
  observed = np.bincount(bins[first], minlength=VOCAB + 1)
  expected = n * np.bincount(bins, probabilities, minlength=VOCAB + 1)
  used = expected > 0
  assert used.sum() > 8
  assert scipy.stats.chisquare(observed[used], expected[used], sum_check=False).pvalue > 1e-3


# Prompts.


@pytest.fixture(scope="module")
def tokenizer():
  return ChainsConfig(lines=2).open().tokenizer()


def test_prompts_are_filled_up_on_the_right(tokenizer):
  problems = [Problem(0, "+3a", "1"), Problem(1, "?", "1")]
  ids, lengths = encode_prompts(tokenizer, problems, 5, 99)
  assert lengths.tolist() == [3, 1]
  assert ids.shape == (2, 5)
  assert tokenizer.decode(ids[0, :3]) == "+3a"
  assert not ids[0, 3:].any()
  assert not ids[1, 1:].any()


def test_a_character_that_would_end_the_prompt_is_named(tokenizer):
  """The tokenizer of chains has no other token for what it does not know than its end."""
  problems = [Problem(41, "+3a", "1"), Problem(42, "+3:", "1")]
  with pytest.raises(UserError, match=r"^task\.tokenizer: problem 42: ':' is not in the alphabet"):
    encode_prompts(tokenizer, problems, 5, 99)
  end = tokenizer.eos_token
  assert encode_prompts(tokenizer, [Problem(0, f"+3{end}", "1")], 5, 99)[1] == [3]  # Meant.


@pytest.mark.parametrize(("prompt", "count"), [("+3a-4b", 6), ("", 0)])
def test_a_prompt_that_does_not_fit_is_named(tokenizer, prompt, count):
  problems = [Problem(41, "+3a", "1"), Problem(42, prompt, "1")]
  with pytest.raises(
    UserError, match=rf"problem 42 has {count} tokens.*rollout\.max_prompt_tokens"
  ) as error:
    encode_prompts(tokenizer, problems, 5, 99)
  assert "41" not in str(error.value)
