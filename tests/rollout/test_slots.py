"""The engine: that rows come and go without a trace in what is sampled, and what that saves."""

import dataclasses

import jax
import numpy as np
import pytest
from policies import ROUNDS, random_params

from dca_jax.devices.mesh import MeshConfig, make_mesh
from dca_jax.policy import Policy, PolicyConfig, Sampling, token_logprobs
from dca_jax.rollout import Begun, RolloutConfig, Wanted, in_order, slots
from dca_jax.rollout.schedule import Schedule, ladder, ring_sizes
from dca_jax.rollout.slots import Slotted
from evidence.benchmarks import waiting

VOCAB, END = 40, 0
P, G, S, T = 6, 4, 7, 150
# Rings grow twice. One layer reads a window, whose ring is full long before.
CONFIG = PolicyConfig(
  width=16, depth=2, heads=2, kv_heads=1, head_dim=8, mlp=24, window=40, windowed=(0,)
)
POLICY = Policy(CONFIG, VOCAB, make_mesh(MeshConfig()))
ROLLOUT = RolloutConfig(problems=P, group=G, max_prompt_tokens=S, max_tokens=T)


@pytest.fixture(scope="module")
def params():
  """Answers have about 40 tokens with these, a few of them all that they may."""
  return random_params(POLICY, 0.2)


@pytest.fixture(scope="module")
def wanted():
  rng = np.random.default_rng(1)
  return Wanted(
    rng.integers(1, VOCAB, size=(P, S)).astype(np.int32),
    rng.integers(1, S + 1, size=P).astype(np.int32),
    np.arange(10, 10 + P),
    np.tile(np.arange(G), (P, 1)),
    np.full(P, T),
    np.zeros(P, np.int32),
  )


def letters(tokens) -> list[bytes]:
  return [bytes([65 + token]) for token in tokens]


def engine(rows=P * G, chunk=T, policy=POLICY, **changes) -> Slotted:
  rollout = dataclasses.replace(ROLLOUT, **changes)
  return Slotted(policy, rollout, (END,), letters, rows, chunk)


def drawn(params, wanted, **changes):
  return in_order(engine(**changes).stream(params, wanted, (3, 1)))


@pytest.fixture(scope="module")
def whole(params, wanted):
  """All rows from the beginning, in as few programs as there can be."""
  return drawn(params, wanted)


def same(ours, theirs, exact=True) -> None:
  for a, b in zip(ours, theirs, strict=True):
    assert a.tokens.tolist() == b.tokens.tolist()
    assert a.truncated == b.truncated
    if exact:
      np.testing.assert_array_equal(a.logprobs, b.logprobs)
    else:
      np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_lengths_are_mixed_and_ends_are_kept(whole):
  lengths = [len(sample.tokens) for sample in whole]
  assert min(lengths) < 20
  assert sum(length > 64 for length in lengths) > 2
  for sample in whole:
    assert sample.truncated == (sample.tokens[-1] != END)
    assert END not in sample.tokens[:-1]
    assert len(sample.logprobs) == len(sample.tokens) <= T


def assert_logprobs_are_the_learners(policy, params, wanted, samples, atol=1e-5):
  tokens = np.zeros((P * G, T), np.int32)
  for sample in samples:
    tokens[sample.row, : len(sample.tokens)] = sample.tokens

  @jax.jit
  def learner(params, prompts, lengths, tokens):
    hidden = policy.completion_hidden(params, prompts, lengths, tokens)
    return token_logprobs(hidden, policy.head(params), tokens, Sampling())[0]

  expected = np.asarray(learner(params, *wanted[:2], tokens))
  for sample in samples:
    own = expected[sample.row, : len(sample.tokens)]
    np.testing.assert_allclose(sample.logprobs, own, rtol=0, atol=atol)


def test_logprobs_are_the_learners(params, wanted, whole):
  """Through rings that grew, were laid anew, and in one layer go round."""
  assert_logprobs_are_the_learners(POLICY, params, wanted, whole)


def test_layers_of_several_shapes(wanted):
  """Some of them without keys; rows wait, and go on from an earlier step."""
  policy = Policy(ROUNDS, VOCAB, POLICY.mesh)
  params = random_params(policy, 0.25)
  run = engine(rows=16, policy=policy)
  whole = in_order(run.stream(params, wanted, (3, 1)))
  lengths = [len(sample.tokens) for sample in whole]
  assert min(lengths) < 20
  assert max(lengths) > 64
  # Norms of what is small make rounding larger.
  assert_logprobs_are_the_learners(policy, params, wanted, whole, atol=1e-4)
  cuts = np.random.default_rng(4).integers(0, 120, (P, G))
  cuts[4:] = 0
  begun = unfinished(cuts, whole)
  went_on = in_order(run.stream(params, wanted, (3, 1), begun=begun))
  assert [sample.row for sample in went_on] == np.flatnonzero(~begun.ended_PxG).tolist()
  for ours in went_on:
    assert ours.tokens.tolist() == whole[ours.row].tokens.tolist()


@pytest.mark.parametrize("chunk", [5, 64])
def test_when_the_host_looks_does_not_matter(params, wanted, whole, chunk):
  same(drawn(params, wanted, chunk=chunk), whole)


def test_how_many_rows_there_are_does_not_matter(params, wanted, whole):
  """Fewer rows than samples, so problems wait and enter where others have left."""
  same(drawn(params, wanted, rows=16), whole, exact=False)


@pytest.mark.slow
def test_hardly_a_sample_of_thousands_depends_on_how_many_rows_there_are(params, wanted):
  """Products of another number of rows may differ in their last bits."""
  rng, many = np.random.default_rng(2), 512
  wanted = Wanted(*(x[rng.integers(P, size=many)] for x in wanted))._replace(
    problems_P=np.arange(many)
  )
  first, *others = (drawn(params, wanted, rows=rows) for rows in (64, 32, 16, 8))
  for other in others:
    pairs = zip(first, other, strict=True)
    equal = np.mean([a.tokens.tolist() == b.tokens.tolist() for a, b in pairs])
    print(f"{equal:.2%} of {len(first)} samples are equal")
    assert equal >= 0.999


def test_the_order_of_arrival_does_not_matter(params, wanted, whole):
  order = np.array([4, 1, 5, 0, 2, 3])
  moved = drawn(params, Wanted(*(x[order] for x in wanted)))
  back = [moved[p * G + g] for p in np.argsort(order) for g in range(G)]
  same(back, whole)


def test_samples_come_out_as_they_end(params, wanted):
  """Not when all have: whoever takes the first of them sees the others still to come."""
  came = [len(sample.tokens) for sample in engine().stream(params, wanted, (3, 1))]
  assert max(came[: len(came) // 2]) < T


def test_every_problem_has_its_own_limit(params, wanted, whole):
  limits = np.array([1, 20, 64, 65, 100, T])
  for sample, free in zip(drawn(params, wanted._replace(limits_P=limits)), whole, strict=True):
    n = min(len(free.tokens), int(limits[sample.row // G]))
    assert sample.tokens.tolist() == free.tokens[:n].tolist()
    assert sample.truncated == (free.truncated or n < len(free.tokens))


def test_a_stop_string_ends_a_row_within_a_chunk(params, wanted, whole, monkeypatch):
  """And two letters count as one string, also where the first is the answer's that is to go on."""
  clocks, decode = [], slots.decode

  def counted(*given):
    before = int(given[4].context.clock)
    out = decode(*given)
    clocks.append(int(out[0].context.clock) - before)
    return out

  pairs = [bytes(b"".join(letters(sample.tokens[5:7]))).decode() for sample in whole[:3]]
  monkeypatch.setattr(slots, "decode", counted)
  stopped = drawn(params, wanted, chunk=8, stop=(*pairs, "B"))
  assert max(clocks) <= 8
  for ours, free in zip(stopped, whole, strict=True):
    text = b"".join(letters(free.tokens)).decode()
    ends = [text.index(stop) + len(stop) for stop in (*pairs, "B") if stop in text]
    n = min(ends, default=len(free.tokens))
    assert ours.tokens.tolist() == free.tokens[:n].tolist()
    assert ours.truncated == (free.truncated and not ends)
    np.testing.assert_allclose(ours.logprobs, free.logprobs[:n], atol=1e-5)  # Rows left earlier.
  longest = max(len(sample.tokens) for sample in stopped)
  assert longest < max(len(sample.tokens) for sample in whole)
  assert sum(clocks) < longest + 8
  # The last letter of a prompt and the first of its answer.
  last = wanted.prompts_PxS[0, int(wanted.prompt_lengths_P[0]) - 1]
  begun = wanted._replace(begun_P=np.ones(P, np.int32))
  for asked, lengths in ((begun, [1]), (wanted, range(2, T + 1))):
    first = drawn(params, asked)[0].tokens[0]
    pair = b"".join(letters([last, first])).decode()
    assert len(drawn(params, asked, chunk=8, stop=(pair,))[0].tokens) in lengths


class Later:
  """Wants what was wanted at once only when the engine asks, `most` samples at a time."""

  def __init__(self, wanted, most):
    self.parts = [Wanted(*(x[i : i + most] for x in wanted)) for i in range(0, P * G, most)]
    self.asked = []

  def expected(self):
    return sum(len(part.limits_P) for part in self.parts)

  def take(self, wait):
    self.asked.append(wait)
    # Every other time the environments are slow.
    return self.parts.pop(0) if self.parts and (wait or len(self.asked) % 2) else None


@pytest.mark.parametrize("most", [1, 5, 16])
def test_when_it_is_wanted_does_not_matter(params, wanted, whole, most):
  single = Wanted(
    *(np.repeat(x, G, 0) for x in wanted[:3]),
    wanted.numbers_PxG.reshape(-1, 1),
    *(np.repeat(x, G, 0) for x in wanted[4:]),
  )
  later = Later(single, most)
  before = slots.decode._cache_size()
  ours = in_order(engine(rows=16).stream(params, later.take(True), (3, 1), later))
  same(ours, whole, exact=False)
  assert not later.parts
  if most == 1:  # However small the parts are, they are laid into the same few programs.
    assert slots.decode._cache_size() - before <= 12


def test_an_answer_that_goes_on_has_the_noise_of_its_place(params, wanted, whole):
  """So it goes on as it would have; a noise of its own for every turn, and none twice."""
  rows = sorted(range(P * G), key=lambda i: -len(whole[i].tokens))[:4]
  prompts = np.zeros((len(rows), S + T), np.int32)
  lengths = wanted.prompt_lengths_P[np.array(rows) // G] + 10
  for row, i, n in zip(prompts, rows, lengths, strict=True):
    row[:n] = [*wanted.prompts_PxS[i // G, : n - 10], *whole[i].tokens[:10]]
  p, g = np.divmod(rows, G)
  tens = np.full(len(rows), 10)
  asked = Wanted(prompts, lengths, wanted.problems_P[p], g[:, None], T - tens, tens)
  for i, ours in zip(rows, drawn(params, asked), strict=True):
    assert [*whole[i].tokens[:10], *ours.tokens] == whole[i].tokens.tolist()
    assert ours.truncated == whole[i].truncated


def unfinished(cuts_PxG, whole) -> Begun:
  """What is written once each sample of `whole` has the length that `cuts_PxG` says, at most."""
  begun = Begun(
    np.zeros((P, G, T), np.int32),
    np.zeros((P, G, T), np.float32),
    np.zeros((P, G), np.int32),
    np.zeros((P, G), bool),
    P,
  )
  for place, sample in zip(np.ndindex(P, G), whole, strict=True):
    n = min(len(sample.tokens), int(cuts_PxG[place]))
    begun.tokens_PxGxT[place][:n], begun.logprobs_PxGxT[place][:n] = sample.tokens[:n], -100.0
    begun.lengths_PxG[place], begun.ended_PxG[place] = n, n == len(sample.tokens)
  return begun


@pytest.mark.parametrize("rows", [P * G, 16])
def test_what_an_earlier_step_wrote_goes_on_as_it_would_have(params, wanted, whole, rows):
  """Whatever its length; it keeps its log-probabilities, and nothing is given of what had ended."""
  cuts = np.random.default_rng(4).integers(0, 120, (P, G))
  cuts[rows // G :] = 0  # These wait, and nothing of them is written.
  begun = unfinished(cuts, whole)
  assert begun.lengths_PxG.max() > 64
  ours = in_order(engine(rows=rows).stream(params, wanted, (3, 1), begun=begun))
  assert [sample.row for sample in ours] == np.flatnonzero(~begun.ended_PxG).tolist()
  for sample in ours:
    free, n = whole[sample.row], begun.lengths_PxG.flat[sample.row]
    assert sample.tokens.tolist() == free.tokens.tolist()
    assert (sample.truncated, sample.ended) == (free.truncated, True)
    assert set(sample.logprobs[:n].tolist()) <= {-100.0}
    np.testing.assert_allclose(sample.logprobs[n:], free.logprobs[n:], atol=1e-5)


def test_as_soon_as_enough_has_ended_the_rest_is_given_as_it_is(params, wanted, whole):
  begun = unfinished(np.zeros((P, G)), whole)._replace(enough=2)
  came = in_order(engine().stream(params, wanted, (3, 1), begun=begun))
  assert len(came) == P * G
  groups = [came[p * G : (p + 1) * G] for p in range(P)]
  assert 2 <= sum(all(sample.ended for sample in group) for group in groups) < P
  for ours, free in zip(came, whole, strict=True):
    n = len(ours.tokens)
    assert ours.tokens.tolist() == free.tokens[:n].tolist()
    assert ours.ended == (n == len(free.tokens))
    assert ours.truncated == (ours.ended and free.truncated)


# The schedule, which knows lengths alone.


def run(lengths, group, rows, most, step=1) -> tuple[int, set]:
  """Row-steps that decoding takes, and the shapes that are compiled for it."""
  problems = len(lengths) // group
  plan = Schedule(np.full(problems, most), group, rows, step, most)
  steps, shapes = 0, set()
  while plan.live_R.any():
    assert plan.room > 0
    n, live = 0, plan.live_R.copy()
    while n < plan.room and live.sum() > plan.enough:
      n += 1
      live &= lengths[plan.sample_R] > plan.lengths_R + n
    assert n
    steps += n * len(plan.sample_R)
    shapes.add((len(plan.sample_R), plan.ring))
    assert not len(plan.sample_R) % step
    plan.lengths_R = np.where(
      plan.live_R, np.minimum(plan.lengths_R + n, lengths[plan.sample_R]), plan.lengths_R
    )
    plan.sample_R[plan.live_R & ~live] = -1
    while problems_in := plan.entering():
      plan.place(problems_in)
    plan.fewer()
    if plan.room == 0 or plan.live_R.any():
      plan.ring = plan.ring_needed()
  return steps, shapes


@pytest.mark.parametrize(("problems", "rows"), [(8, 64), (32, 256), (32, 64)])
def test_few_row_steps_are_wasted_on_mixed_lengths(problems, rows):
  """Mean 64 of at most 256 tokens, as in `evidence/benchmarks/peers.py`."""
  wasted = []
  for seed in range(10):
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(1 / 64, problems * 8), 256)
    steps, shapes = run(lengths, 8, rows, 256)
    wasted.append(1 - lengths.sum() / steps)
    assert len(shapes) <= 16
  assert np.mean(wasted) < 0.13


@pytest.mark.parametrize("step", [1, 4])
def test_everything_is_sampled_whatever_the_lengths(step):
  rng = np.random.default_rng(0)
  for _ in range(60):
    group, most = int(rng.integers(1, 9)), int(rng.integers(1, 300))
    lengths = rng.integers(1, most + 1, size=group * int(rng.integers(1, 30)))
    run(lengths, group, int(rng.integers(1, 64)), most, step)


@pytest.mark.parametrize(("mean", "rows"), [(16, 64), (256, 64), (256, 16)])
def test_what_waits_for_a_slow_environment_has_no_row(mean, rows):
  """64 episodes of four turns, which wait from 0.1 to 5 s after each: hardly fewer of the row-steps
  make tokens than where nothing waits."""
  lengths, waits = waiting.drawn(0, mean)
  free, slow = (waiting.play(lengths, x, rows) for x in (0 * waits, waits))
  assert slow.use >= 0.9 * free.use
  assert slow.use >= 0.8


def test_equal_lengths_and_short_answers_take_one_program():
  assert run(np.full(64, 64), 8, 64, 64)[1] == {(64, 64)}
  assert run(np.arange(64) % 48 + 1, 8, 64, 48)[1] == {(64, 48)}


def test_rows_and_rings_come_in_few_sizes():
  assert ladder(64, 1) == [64, 56, 48, 40, 32, 24, 16, 12, 8, 6, 4]
  assert ladder(64, 8) == [64, 56, 48, 40, 32, 24, 16, 8]
  assert ladder(24, 8) == [24, 16, 8]
  assert ladder(3, 1) == [3]
  assert ring_sizes(48) == [48]
  assert ring_sizes(256) == [64, 128, 256]
  assert ring_sizes(300) == [64, 128, 256, 300]
  assert ring_sizes(1000) == [64, 128, 256, 384, 512, 768, 1000]
