"""Credit against measured effects, where the true effects are known."""

import numpy as np
import pytest
import scipy.stats

from dca_jax.episode import Check, Review
from dca_jax.review import Request
from dca_jax.review.effects import Checked, effects

ANSWERS = 60


def answer(n, dice, answers, theatre):
  """Steps whose true effects are +0.4 (`add`), 0 (`check`) and -0.4 (`slip`), and their checks."""
  names = dice.choice(["add", "check", "slip"], size=5)
  values = np.clip(
    0.5 + 0.4 * np.cumsum([{"add": 1, "check": 0, "slip": -1}[x] for x in names]), 0, 1
  )
  chances = [0.5, *values]
  ends = [tuple(dice.random(answers) < chance) for chance in chances]
  checks = {k: Check(*(tuple(map(float, end)) for end in ends[k : k + 2])) for k in range(5)}
  said = {"add": "necessary", "slip": "error", "check": "necessary" if theatre else "redundant"}
  roles = tuple(said[name] for name in names)
  steps = tuple(
    f"{name} {n} {k}: let me check" if name == "check" else f"{name} {n} {k}"
    for k, name in enumerate(names)
  )
  request = Request(f"1/{n}/0", "p", steps, n % 2 == 0, False)
  return Checked(request, checks, Review("ok", roles, (1.0,) * 5))


def many(answers=4, theatre=False):
  dice = np.random.default_rng(3)
  return [answer(n, dice, answers, theatre) for n in range(ANSWERS)]


def test_the_rank_correlation_is_within_answers():
  """So a reviewer who tells nothing but the outcome has none."""
  told = many()
  credits = scipy.stats.rankdata([c.credit for c in told]).reshape(ANSWERS, 4)
  did = scipy.stats.rankdata([[c.checks[k].effect for k in range(4)] for c in told])
  x, y = (ranks.reshape(ANSWERS, 4) for ranks in (credits, did))
  expected = np.corrcoef(*((ranks - ranks.mean(1, keepdims=True)).ravel() for ranks in (x, y)))
  e = effects(told)["effect_spearman"]
  assert e.value == pytest.approx(expected[0, 1])
  assert 0 < e.low < e.value < e.high
  same = Review("ok", ("necessary",) * 5, (1.0,) * 5)
  assert effects([c._replace(review=same) for c in told])["effect_spearman"].value == 0


def test_more_answers_raise_the_ceiling_and_it_bounds_a_perfect_reviewer():
  few, lots = (effects(many(answers)) for answers in (2, 50))
  assert few["effect_ceiling"].high < lots["effect_ceiling"].low
  assert lots["effect_ceiling"].value > 0.9


def test_applauded_theatre_is_credited_for_an_effect_of_nothing():
  measures = effects(many(8, theatre=True))
  e = measures["effect_credited_check"]
  assert e.low < 0 < e.high
  assert measures["effect_credited_other"].low > 0.1
  assert measures["effect_blamed_other"].high < -0.1
  assert "effect_credited_check" not in effects(many(8))


def test_values_are_credited_with_their_changes():
  one = many()[0]._replace(review=Review("ok", values=(0.5, 0.9, 0.9, 0.5, 0.1)))
  assert one.credit == pytest.approx([0.4, 0, -0.4, -0.4])
  assert effects([one]) == {}  # Too few to say anything.
