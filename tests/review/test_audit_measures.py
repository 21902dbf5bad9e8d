"""What an audit measures, against counts by hand and against reviewers whose faults are known."""

import contextlib
import functools

import numpy as np
import pytest

from dca_jax.episode import ROLES
from dca_jax.review import REVIEWERS, Request, Review, Truth, open_reviewer
from dca_jax.review.audit import (
  Case,
  Judged,
  agreement,
  confusion,
  favourite,
  first_error,
  kind_of,
  said_of,
  usable,
)
from dca_jax.tasks import Chains, ChainsConfig

TASK = Chains(ChainsConfig(misconceptions=0.3))


@functools.cache
def cases(n: int = 120) -> list[Case]:
  """Demonstrations of `chains` with mistakes, repeats and a distractor, as if sampled."""
  made = []
  for i in range(n):
    prompt, text = TASK.demonstration(i, True)
    parts = text.split(";")
    steps = (*(f"{part};" for part in parts[:-1]), parts[-1])
    labels = TASK.label_steps(prompt, steps, False)
    right = labels[-1] in ("necessary", "repair")
    made.append(Case.of(Request(f"1/{i}/0", prompt, steps, right, False), labels))
  return made


def judged(name: str, **settings) -> list[Judged]:
  config = REVIEWERS[name](**settings)
  with contextlib.closing(open_reviewer(config, Truth.of(TASK), None)) as reviewer:
    reviews = reviewer.submit([case.request for case in cases()], 60.0).result()
  return [Judged(*pair) for pair in zip(cases(), reviews, strict=True)]


@functools.cache
def measured(name: str, **settings):
  return agreement(judged(name, **settings))


def by_hand(labels, roles, request):
  return Judged(Case.of(request, labels), Review("ok", tuple(roles), (1.0,) * len(roles)))


def test_the_oracle_is_perfect_in_everything():
  told = measured("oracle")
  for name, e in told.items():
    perfect = 0.0 if "applause" in name or "bias" in name else 1.0
    assert e.value == pytest.approx(perfect, abs=1e-12), name
  assert {"applause_repeat", "errors_in_wins", "first_error_f1", "needless_distractor"} <= set(told)


def test_counts_by_hand():
  request = Request("1/1/0", "p", ("a", "b", "b", "c"), True, False)
  other = Request("1/2/0", "q", ("d", "e"), False, False)
  told = agreement(
    [
      by_hand(
        ("necessary", "error", "redundant", "repair"),
        ("necessary", "error", "error", "necessary"),
        request,
      ),
      by_hand(("error", "inherits"), ("necessary", "error"), other),
      Judged(Case.of(other, ("error", "inherits")), Review("timeout")),
    ]
  )
  assert told["role_accuracy"].value == pytest.approx(2 / 6)
  assert told["recall_error"].value == pytest.approx(1 / 2)
  assert told["precision_error"].value == pytest.approx(1 / 3)
  assert told["errors_in_wins"].value == 1.0
  assert told["first_error_accuracy"].value == pytest.approx(1 / 2)
  assert told["needless_repeat"].value == 0.0
  # Chance: necessary 1 of 6 said 3 of 6, error 2 said 3; observed 2 of 6.
  chance = (1 * 3 + 2 * 3) / 36
  assert told["kappa"].value == pytest.approx((2 / 6 - chance) / (1 - chance))
  assert "no_error_accuracy" not in told  # There was no answer without an error.


def test_every_control_is_caught_by_the_measure_that_is_meant_for_it():
  """The interval of the measure excludes what the oracle has."""
  assert measured("noisy", flip=0.3)["role_accuracy"].high < 0.8
  assert measured("noisy", flip=0.3)["first_error_f1"].high < 0.6
  assert measured("random")["kappa"].high < 0.15
  fooled = measured("fooled")
  assert fooled["role_accuracy"].low > 0.85  # Agreement cannot tell it from a good one.
  assert fooled["needless_repeat"].high < 0.1
  assert fooled["applause_repeat"].low > 2.9
  assert fooled["needless_distractor"].low > 0.8
  assert measured("lexical")["needless_distractor"].high < 0.1
  assert measured("lexical")["applause_repeat"].low > 2
  assert measured("thief")["position_bias"].low > 0.3
  assert measured("suffix")["kappa"].high < 0.15
  for name in ("nan", "silent"):
    assert not any(usable(j.review) for j in judged(name))
    assert not measured(name)


def test_kinds_are_seen_in_the_text():
  steps = (
    "3 + 4 = 7.\n",
    "Let me check: 7 - 4 = 3.\n",
    " 3 + 4 = 7\n",
    "A box holds 3.",
    "It is red.",
  )
  request = Request("1/1/0", "A box holds 3. Add 4.", steps, True, False)
  kinds = [kind_of(request, k, "redundant") for k in range(5)]
  assert kinds == ["other", "check", "repeat", "restatement", "other"]
  assert kind_of(request, 4, "irrelevant") == "distractor"


def test_the_first_error_is_the_first_step_of_that_role():
  assert first_error(("necessary", "error", "error")) == 1
  assert first_error(("necessary", "inherits")) == -1


def test_confusion_and_pools_count_every_step_once():
  told = judged("noisy", flip=0.2)
  counts = confusion(told)
  assert counts.sum() == sum(len(case.labels) for case in cases())
  favoured = favourite(judged("fooled"))
  assert favoured == "repeat"
  said = said_of(told, favoured)
  assert sum(map(len, said.values())) == counts.sum()
  needless = [counts.sum(0)[ROLES.index(role)].sum() for role in ("redundant", "irrelevant")]
  assert len(said["inert"]) + len(said["applauded"]) == sum(needless)


def test_f1_equals_an_independent_computation():
  rng = np.random.default_rng(0)
  truth = rng.integers(-1, 4, 200)
  said = np.where(rng.random(200) < 0.6, truth, rng.integers(-1, 4, 200))
  request = Request("1", "p", ("a", "b", "c", "d"), True, False)

  def review(k: int) -> Review:
    return Review("ok", tuple("error" if i == k else "necessary" for i in range(4)), (1.0,) * 4)

  told = agreement(
    [Judged(Case(request, (), int(t)), review(int(s))) for t, s in zip(truth, said, strict=True)]
  )
  hits = {False: [0, 0], True: [0, 0]}
  for t, s in zip(truth, said, strict=True):
    hits[t == -1][0] += t == s
    hits[t == -1][1] += 1
  wrong, clean = (hits[key][0] / hits[key][1] for key in (False, True))
  assert told["first_error_f1"].value == pytest.approx(2 * wrong * clean / (wrong + clean))
  assert told["first_error_f1"].low < told["first_error_f1"].value < told["first_error_f1"].high
  assert "role_accuracy" not in told
