"""Calibrated credit: what it does without evidence, what evidence makes of it, and that nobody can
talk it into anything that the checks do not find."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dca_jax.credit import SCHEMES, ReviewArrays, token_advantages
from dca_jax.credit.calibrated import (
  CELLS,
  ENDS,
  SEEN,
  Calibrated,
  Evidence,
  cell_number,
  chances_of,
  fit,
  seen_of,
  word_of,
)
from dca_jax.episode import ROLES, Check, Episode, Outcome, Problem, Review, Segment, Step

GROUP, T = 4, 24
TOKENS = 3  # Of each step.
SCHEME = Calibrated(keep=1.0)
NECESSARY, ERROR = ROLES.index("necessary"), ROLES.index("error")


def episode(roles, reward=1.0, texts=None, weights=None, values=(), checks=None, status="ok"):
  n = len(roles) or len(values)
  steps = tuple(
    Step(TOKENS * k, TOKENS * (k + 1), (texts or [f"s{k};" for k in range(n)])[k]) for k in range(n)
  )
  tokens = Segment(np.zeros(TOKENS * n, np.int32), True, np.zeros(TOKENS * n, np.float32))
  review = Review(status, tuple(roles), tuple(weights or [1.0] * len(roles)), tuple(values))
  return Episode(
    "", Problem(0, "", ""), (tokens,), Outcome(reward, bool(reward), False), steps,
    checks=checks or {}, review=review,
  )  # fmt: skip


def effect(x: float) -> Check:
  return Check((0.5 - x / 2,), (0.5 + x / 2,))


def advantages(episodes, state=None, scheme=SCHEME):
  """Of every token, [B, T]."""
  state = scheme.begin() if state is None else state
  lengths = np.array([TOKENS * len(e.steps) for e in episodes])
  sampled = np.arange(T) < lengths[:, None]
  ids = np.where(sampled, np.arange(T) // TOKENS, 0).astype(np.int32)
  rewards = jnp.array([e.outcome.reward for e in episodes]).reshape(-1, GROUP)
  said = ReviewArrays.of([e.review for e in episodes], ids)
  facts = scheme.facts(state, episodes, GROUP, T)
  cut = np.zeros(len(episodes), bool)
  return np.asarray(token_advantages(scheme, rewards, sampled, cut, said, facts))


def learnt(batches, scheme=SCHEME, state=None):
  state = scheme.begin() if state is None else state
  for episodes in batches:
    state, _ = scheme.learn(state, [scheme.evidence(state, episodes, GROUP)])
  return state


def batches(effects, count, rng, roles=("necessary", "irrelevant", "redundant", "necessary")):
  """Batches of a win among losses in which the step with number k has a mean effect `effects[k]`,
  measured as a coin would be."""
  for _ in range(count):
    signs = np.where(rng.random(len(roles)) < (1 + np.array(effects)) / 2, 1.0, -1.0)
    win = episode(roles, 1.0, checks={k: effect(x) for k, x in enumerate(signs)})
    yield [win, *[episode(roles, 0.0) for _ in range(GROUP - 1)]]


MIXED = [
  episode(("necessary", "irrelevant", "redundant", "necessary"), r) for r in (1.0, 0.0, 0.0, 1.0)
]


def test_without_evidence_it_is_rloo_bit_for_bit():
  assert np.array_equal(advantages(MIXED), advantages(MIXED, scheme=SCHEMES["uniform"]()))


def test_evidence_moves_credit_to_the_steps_that_did_something():
  state = learnt(batches((0.6, 0.0, 0.0, 0.6), 400, np.random.default_rng(0)))
  own = advantages(MIXED, state)[:, ::TOKENS][:, :4]
  assert own[0, 0] > 1.5 * 2 / 3
  assert abs(own[0, 1:3]).max() < 0.2
  np.testing.assert_allclose(advantages(MIXED, state).sum(1), own.sum(1) * TOKENS, rtol=1e-5)
  # Nothing was measured in losses, so there it still is uniform.
  assert np.array_equal(own[1], np.full(4, own[1, 0]))
  # A multiplier has its limit.
  assert abs(advantages(MIXED, state, Calibrated(cap=1.25))).max() <= 1.25 * 2 / 3 + 1e-6


def test_applause_for_a_class_that_does_nothing_ends_in_nothing():
  """A repeat that is called necessary, with weight 3, has cells of its own. Its premium over a step
  that does as little and is called so goes to 0 as checks accumulate."""
  roles, weights, texts = (
    ("necessary", "necessary", "redundant"),
    (1.0, 3.0, 1.0),
    ["a;", "A ;", "c;"],
  )
  wins = [episode(roles, r, texts, weights) for r in (1.0, 0.0, 0.0, 0.0)]
  checked = [dataclasses.replace(wins[0], checks={k: effect(0.0) for k in range(3)}), *wins[1:]]
  cells = [cell for cell, *_ in SCHEME.evidence(SCHEME.begin(), checked, GROUP)[0]]

  def premium(n, seed):
    rng, sums, even = np.random.default_rng(seed), np.zeros((5, CELLS)), 1 / 3
    for cell, x in zip(cells, (0.5, 0.0, 0.0), strict=True):
      y = np.where(rng.random(n) < (1 + x) / 2, 1.0, -1.0)
      sums[:, cell] = n, n * even**2, n * even**2, even * y.sum(), (y**2).sum()
    own = advantages(wins, Evidence(sums, np.zeros(2)))[0, ::TOKENS]
    return own[1] - own[2]

  size = {n: np.mean([abs(premium(n, seed)) for seed in range(40)]) for n in (0, 100, 1600, 25600)}
  assert size[0] == 0
  assert size[100] > 2 * size[1600] > 4 * size[25600]
  assert size[25600] < 0.05
  # That of `weighted` stays.
  said = advantages(wins, scheme=SCHEMES["weighted"]())[0, ::TOKENS]
  assert said[1] - said[2] > 0.5


def test_what_was_measured_of_one_class_moves_no_other():
  rng = np.random.default_rng(0)
  state = learnt(batches((0.6, 0.0, 0.0, 0.6), 100, rng))
  shares, touched = fit(state, 2.0).shares, state.sums[0] > 0
  assert (shares[touched] != 1).any()
  assert (shares[~touched] == 1).all()


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_noise_alone_is_seldom_taken_for_an_effect(n):
  """At most as often as two standard errors allow, also where a cell has hardly been seen."""
  rng, moved, sizes, even = np.random.default_rng(n), [], [], 0.1
  for _ in range(400):
    sums = np.zeros((5, CELLS), np.float32)
    for cell in range(0, 60, 3):
      y = even + rng.integers(0, 2, n) - rng.integers(0, 2, n)
      sums[:, cell] = n, n * even**2, n * even**2, even * y.sum(), (y**2).sum()
    shares = fit(Evidence(sums, np.zeros(2)), 2.0).shares[:60:3]
    moved.append((shares != 1).mean())
    sizes.append(even * np.abs(shares - 1).mean())
  assert np.mean(moved) < 0.1
  assert np.mean(sizes) < 0.03


def test_of_a_rare_cell_little_is_believed_even_if_others_differ():
  sums, even = np.zeros((5, CELLS)), 0.1
  for cell, n, share in ((0, 1000, 4.0), (3, 1000, 0.0), (6, 1, 10.0)):
    y = share * even
    sums[:, cell] = n, n * even**2, n * even**2, even * n * y, n * (y**2 + 0.1)
  shares = fit(Evidence(sums, np.zeros(2)), 1.0).shares
  assert shares[0] > 3
  assert shares[3] < 0.3
  assert abs(shares[6] - 1) < 3


def test_a_step_that_the_policy_was_sure_of_has_a_cell_of_its_own():
  """However it is praised: its probability is what no text can lie about."""
  sure, unsure = (
    dataclasses.replace(e, segments=(dataclasses.replace(e.segments[0], logprobs=x),))
    for e, x in ((MIXED[0], np.zeros(12)), (MIXED[0], np.full(12, -1.0)))
  )
  assert chances_of(sure) == [1.0] * 4
  assert chances_of(unsure) == pytest.approx([np.exp(-3.0)] * 4)
  rest = MIXED[1:]
  checked = [dataclasses.replace(e, checks={0: effect(0.5)}) for e in (sure, unsure)]
  cells = [SCHEME.evidence(SCHEME.begin(), [e, *rest], GROUP)[0][0][0] for e in checked]
  assert cells[0] != cells[1]


def test_an_effect_that_turns_round_is_followed():
  rng, scheme = np.random.default_rng(0), Calibrated(keep=0.98)
  state = learnt(batches((0.8, 0.0, 0.0, 0.8), 100, rng), scheme)
  before = advantages(MIXED, state)[0, ::TOKENS][:2]
  after = advantages(MIXED, learnt(batches((0.0, 0.8, 0.0, 0.0), 150, rng), scheme, state))
  assert before[0] > before[1]
  assert after[0, 0] < after[0, TOKENS]


def test_evidence_of_two_processes_is_that_of_one():
  rng = np.random.default_rng(0)
  for pair in zip(batches((0.6, 0, 0, 0), 5, rng), batches((0, 0, 0, 0.6), 5, rng), strict=True):
    parts = [SCHEME.evidence(SCHEME.begin(), part, GROUP) for part in pair]
    apart, metrics = SCHEME.learn(SCHEME.begin(), parts)
    whole = SCHEME.evidence(SCHEME.begin(), [*pair[0], *pair[1]], GROUP)
    together, same = SCHEME.learn(SCHEME.begin(), [whole])
    assert all(np.array_equal(a, b) for a, b in zip(apart, together, strict=True))
    assert metrics == same


@pytest.mark.parametrize(
  "bad", [{"status": "timeout"}, {"weights": [1.0, np.nan, 1.0, 1.0]}, {"weights": [-1.0] * 4}]
)
def test_an_episode_without_a_usable_review_gets_its_own_advantage_and_teaches_nothing(bad):
  state = learnt(batches((0.6, 0.0, 0.0, 0.6), 100, np.random.default_rng(0)))
  roles = ("necessary", "irrelevant", "redundant", "necessary")
  checks = {0: effect(1.0)}
  silent = [episode(roles, 1.0, checks=checks, **bad), *MIXED[1:]]
  given, plain = advantages(silent, state), advantages(silent, scheme=SCHEMES["uniform"]())
  assert np.array_equal(given[0], plain[0])
  assert not np.array_equal(given[3], plain[3])
  assert not learnt([silent]).sums.any()


def test_equal_rewards_move_and_teach_nothing():
  state = learnt(batches((0.6, 0.0, 0.0, 0.6), 100, np.random.default_rng(0)))
  same = [dataclasses.replace(e, outcome=Outcome(1.0, True, False)) for e in MIXED]
  same = [dataclasses.replace(e, checks={0: effect(1.0)}) for e in same]
  assert not advantages(same, state).any()
  assert not learnt([same]).sums.any()


def test_values_alone_are_enough():
  """A reviewer's value that rises counts as far as checks bear it out."""

  def batch(rng, reward=1.0):
    x = 1.0 if rng.random() < 0.8 else -1.0
    checks = {0: effect(x), 1: effect(rng.choice([-1.0, 1.0]))}
    return [
      episode((), r, values=(0.2, 0.6, 0.6), checks=checks if r else None)
      for r in (reward, 0.0, 0.0, 0.0)
    ]

  rng = np.random.default_rng(0)
  state = learnt(batch(rng) for _ in range(200))
  own = advantages(batch(rng), state)[0, ::TOKENS]
  assert own[0] > 1.2
  assert abs(own[1]) < 0.3
  broken = [episode((), r, values=(0.2, np.nan, 0.6)) for r in (1.0, 0.0, 0.0, 0.0)]
  assert np.isfinite(advantages(broken, state)).all()


def test_what_can_be_seen_of_a_step():
  texts = ["x = 1;", "let me check;", "X  =  1;", "y = 2;"]
  one = episode(("necessary",) * 4, texts=texts)
  assert [SEEN[k] for k in seen_of(one)] == ["plain", "check", "repeat", "plain"]
  steps = (*one.steps[:3], Step(9, 40, "y = 2;"))
  assert SEEN[seen_of(dataclasses.replace(one, steps=steps))[3]] == "long"


def test_no_share_is_negative():
  sums = np.zeros((5, CELLS))
  cells = [
    cell_number(word_of(NECESSARY, 1.0), 0, 1.0, 0),
    cell_number(word_of(ERROR, 3.0), 1, 0, 1),
  ]
  sums[:, cells] = np.array([500, 5.0, 5.0, -5.0, 50.0])[:, None]
  found = fit(Evidence(sums, np.zeros(2)), 1.0)
  assert (found.slopes[cells] == -1).all()
  assert (found.shares >= 0).all()
  assert found.of([*cells, -1])[2] == 1  # Of which nothing is known.
  assert len(ENDS) == 3
