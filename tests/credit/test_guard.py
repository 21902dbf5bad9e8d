"""The guard: what lowers the reviewer's share, what does not, and that nothing else changes."""

import dataclasses

import numpy as np
import pytest
from test_calibrated import GROUP, MIXED, T, advantages, batches, episode, learnt

from dca_jax.config import build
from dca_jax.credit import SCHEMES, Calibrated, Guarded
from dca_jax.credit.guard import WATCHED, counted, watch

ROLES = ("necessary", "irrelevant", "redundant", "necessary")
WEIGHTED = SCHEMES["weighted"]()
GUARDED = Guarded(inner=WEIGHTED)


def batch(rng, repeats, *, chance=0.5, pays=0.0, cut=0.0, groups=16):
  """Answers of four to seven steps, of which some say again what the first one said: `repeats` in
  the mean. `pays` is what one of them adds to the chance of success."""
  episodes = []
  for _ in range(groups * GROUP):
    again = rng.poisson(repeats)
    texts = ["a;", "b;", "c;", "d;", *["a;"] * again]
    reward = float(rng.random() < chance + pays * (again - repeats))
    one = episode(("necessary",) * len(texts), reward, texts)
    outcome = dataclasses.replace(one.outcome, truncated=bool(rng.random() < cut))
    episodes.append(dataclasses.replace(one, outcome=outcome))
  return episodes


def after(batches):
  """The state and metrics after some batches."""
  state, metrics = GUARDED.begin()[0], {}
  for episodes in batches:
    state, metrics = watch(state, [counted(episodes, GROUP)])
  return state, metrics


def course(seed, **ends):
  """Twenty batches in which each of `ends` goes evenly from the first to the second number."""
  rng = np.random.default_rng(seed)
  for t in range(20):
    yield batch(rng, **{key: a + (b - a) * t / 19 for key, (a, b) in ends.items()})


@pytest.mark.parametrize(
  ("reason", "ends"),
  [
    ("repeats", {"repeats": (1, 4)}),
    ("truncated", {"repeats": (1, 1), "cut": (0, 0.5)}),
    ("reward", {"repeats": (1, 1), "chance": (0.7, 0.2)}),
  ],
)
def test_what_rises_unpaid_takes_the_reviewers_share(reason, ends):
  _, metrics = after(course(0, **ends))
  assert WATCHED[int(metrics["guard/reason"]) - 1] == reason
  assert metrics["guard/share"] < 0.1


@pytest.mark.parametrize("seed", range(5))
def test_an_even_course_and_a_rise_that_the_outcome_pays_for_take_nothing(seed):
  assert after(course(seed, repeats=(1, 1)))[1]["guard/share"] == 1
  paid = {"repeats": (1, 3), "chance": (0.4, 0.6), "pays": (0.2, 0.2)}
  state, metrics = after(course(seed, **paid))
  assert metrics["guard/repeats"] < 1
  assert state.means[0] > 2


def test_the_share_comes_back_slowly():
  rng = np.random.default_rng(0)
  rise = [*course(0, repeats=(1, 4))]
  fallen = after(rise)[1]["guard/share"]
  back = [after([*rise, *[batch(rng, 1)] * n])[1]["guard/share"] for n in (10, 40, 120)]
  assert fallen < 0.1
  assert back[0] < back[1] < back[2] == 1


def test_with_the_whole_share_it_is_the_scheme_and_with_none_rloo_bit_for_bit():
  own, inner = GUARDED.begin()
  for share, scheme in ((1.0, WEIGHTED), (0.0, SCHEMES["uniform"]())):
    kept = own._replace(share=np.float32(share)), inner
    assert np.array_equal(advantages(MIXED, kept, GUARDED), advantages(MIXED, scheme=scheme))
  half = advantages(MIXED, (own._replace(share=np.float32(0.5)), inner), GUARDED)
  np.testing.assert_allclose(half.sum(1), advantages(MIXED).sum(1), rtol=1e-5)


def test_a_scheme_that_learns_goes_on_learning():
  scheme = Calibrated(keep=1.0)
  own = [*batches((0.6, 0.0, 0.0, 0.6), 20, np.random.default_rng(0))]
  guarded = learnt(own, Guarded(inner=scheme))
  assert all(np.array_equal(a, b) for a, b in zip(guarded[1], learnt(own, scheme), strict=True))
  assert Guarded(inner=scheme).facts(guarded, own[0], GROUP, T)[1].shape == (GROUP, T)


def test_evidence_of_two_processes_is_that_of_one():
  rng = np.random.default_rng(0)
  state = GUARDED.begin()[0]
  for _ in range(4):
    one, other = batch(rng, 1), batch(rng, 2)
    apart, metrics = watch(state, [counted(one, GROUP), counted(other, GROUP)])
    state, same = watch(state, [counted([*one, *other], GROUP)])
    assert all(np.array_equal(a, b) for a, b in zip(apart, state, strict=True))
    assert metrics == same


def test_it_watches_whoever_could_be_pleased():
  def guarded(**settings):
    return isinstance(build(settings).scheme, Guarded)

  weighted = {"credit": {"scheme": "weighted"}}
  assert guarded(reviewer={"name": "fooled"}, **weighted)
  assert guarded(reviewer={"name": "panel", "panel": ("oracle", "noisy")}, **weighted)
  assert not guarded(reviewer={"name": "oracle"}, **weighted)
  assert not guarded(reviewer={"name": "fooled"}, credit={"scheme": "weighted", "guard": False})
  assert not guarded()
  learned = {"credit": {"scheme": "potential"}, "value": {"source": "learned"}}
  assert not guarded(**learned)
