"""What a reviewer is worth: its errors carried over to the exact task, and the surface."""

import functools
import math

import numpy as np
import pytest

from dca_jax.credit import Uniform, Weighted, exact
from dca_jax.credit.worth import CLASSES, Word, Worth, predicted_speedup, verdict, worth
from dca_jax.episode import ROLES
from dca_jax.intervals import Estimate
from evidence.lab import tree as lab

TRUE = dict(zip(CLASSES, ("necessary", "error", "repair", "redundant", "redundant"), strict=True))
SHARES = (0.0, 0.2, 0.3, 0.4)
OPPOSITE = {"necessary": "error", "error": "necessary", "repair": "error", "redundant": "necessary"}


def flipped(share: float) -> dict[str, list[Word]]:
  wrong = round(20 * share)
  return {
    name: [Word(role, 1.0)] * (20 - wrong) + [Word(OPPOSITE[role], 1.0)] * wrong
    for name, role in TRUE.items()
  }


@functools.cache
def worth_of_flips(share: float) -> Worth:
  return worth(flipped(share), 1.0)


def fooled(share: float = 0.0) -> dict[str, list[Word]]:
  return flipped(share) | {"applauded": [Word("necessary", 3.0)]}


def test_the_oracles_and_the_fooled_ones_update_are_the_laboratorys():
  tree = exact.make_tree()
  reviews = lab.reviews(tree)

  def row_of(scheme, reviewer: str) -> exact.Row:
    return exact.measure(tree, "", exact.credit(tree, scheme, reviews[reviewer]))

  rloo = row_of(Uniform(), "oracle").snr
  for said, name in ((flipped(0.0), "oracle"), (fooled(), "fooled")):
    found, row = worth(said, 1.0), row_of(Weighted(), name)
    assert found.cosine == pytest.approx(row.cosine, abs=1e-6)
    assert found.snr == pytest.approx(row.snr * row.cosine**2 / rloo, rel=1e-5)
    assert found.performing == pytest.approx((row.leading + row.trailing) / 2, abs=1e-6)


def test_random_flips_lower_the_signal_evenly_and_applause_shows_as_a_premium():
  found = [worth_of_flips(share) for share in SHARES]
  snr = [w.snr for w in found]
  assert snr == sorted(snr, reverse=True)
  assert snr[2] > 1 > snr[3]  # It breaks even between 30 and 40 % of wrong labels.
  assert all(abs(w.performing) < 0.02 for w in found)
  liked = worth(fooled(), 1.0)
  assert liked.performing > 0.25
  # Outcomes say what a label is worth, so the applause does no harm to calibrated credit.
  assert liked.calibrated == pytest.approx(found[0].calibrated, rel=1e-6)


def test_reviews_that_cannot_be_used_are_rloo():
  silent = worth(flipped(0.0), 0.0)
  assert (silent.cosine, silent.snr, silent.calibrated) == pytest.approx((1.0, 1.0, 1.0), abs=1e-6)
  assert 1 < worth(flipped(0.0), 0.5).snr < worth_of_flips(0.0).snr


def test_who_says_nothing_of_the_steps_gives_calibrated_credit_nothing():
  told = {name: [Word(role, 1.0) for role in ROLES] for name in CLASSES}
  assert worth(told, 1.0).calibrated == pytest.approx(1.0, abs=0.05)


def test_nothing_is_said_without_a_class_that_matters():
  assert worth({"necessary": [Word("necessary", 1.0)]}, 1.0) is None
  without = {name: flipped(0.0)[name] for name in ("necessary", "error", "inert")}
  assert worth(without, 1.0) is not None  # Repairs and favourites may be missing.


def test_more_flips_and_more_applause_never_promise_more():
  snr = [worth_of_flips(share).snr for share in SHARES]
  promised = np.array([[predicted_speedup(s, a) for a in (0.0, 0.5, 1.0, 3.0)] for s in snr])
  assert (np.diff(promised, axis=1) <= 1e-9).all()
  assert promised[0, 0] > 2
  assert promised[0, -1] < 1
  assert promised[-1].max() <= 1
  assert predicted_speedup(1.0, 0.0) < 1.3  # Like RLOO, about as fast as RLOO.
  assert not math.isnan(predicted_speedup(0.0, 0.0))


def test_the_verdict_asks_for_the_lower_bound():
  sure, unsure = Estimate(2.0, 1.5, 2.5), Estimate(1.5, 0.9, 2.1)
  paid, not_seen = Estimate(-0.9, -1.2, -0.6), Estimate(-0.1, -0.4, 0.2)
  assert verdict(sure, sure, paid) == verdict(sure, sure, None) == "train"
  assert verdict(unsure, sure, paid) == verdict(sure, sure, not_seen) == "calibrated"
  assert verdict(sure, unsure, paid) == verdict(unsure, unsure, None) == "no"
  assert verdict(None, None, paid) == "no"


def test_roles_are_drawn_from_what_was_said_of_the_class():
  tree = exact.make_tree()
  said = {name: [Word("irrelevant", 1.0)] for name in CLASSES}
  # Every step alike is uniform credit, whatever the label.
  credit = exact.credit(tree, Weighted(), exact.review(tree, ROLES.index("irrelevant")))
  assert np.ptp(credit, axis=1).max() < 1e-6
  assert worth(said, 1.0).snr == pytest.approx(1.0)


def test_who_gives_all_to_the_last_step_tells_less_than_who_errs_at_random():
  told = {
    name: [Word("inherits", 1.0), Word("error" if name == "error" else "necessary", 1.0, last=True)]
    for name in CLASSES
  }
  assert worth(told, 1.0).snr < 0.5 < worth_of_flips(0.3).snr


def test_a_word_about_the_outcome_is_none_about_the_step():
  """`necessary` in every win and `error` in every loss says what the reward has said already."""
  told = {
    name: [Word("necessary", 1.0, won=True), Word("error", 1.0, won=False)] for name in CLASSES
  }
  found = worth(told, 1.0)
  assert found.snr == pytest.approx(1.0)
  assert found.calibrated == pytest.approx(1.0, abs=0.05)
