"""Planted faults: what an edit does to the text, and how reviewers with known faults meet it."""

import dataclasses
import re

import pytest

from dca_jax.review import Request, Review
from dca_jax.review.faults import FAULTS, Pair, caught, plant, unchanged
from dca_jax.tasks import Chains, ChainsConfig

SOLUTION = (
  "Tom has 12 apples and buys 7 more, so he has 12 + 7 = 19 of them.\n",
  "He gives away 5 of these, which leaves 19 - 5 = 14 apples.\n",
  "Each of the 3 pears costs as much as 2 plums.\n",
  "Twice 14 is 28, because he doubles them.\n",
  "The answer is 28.\n",
)
REQUESTS = [Request(f"1/{i}/0", f"problem {i}", SOLUTION, True, False) for i in range(20)]
PLANTED = plant(REQUESTS, 12)


def of(fault: str, tier: int = 0):
  return [p for p in PLANTED if p.fault == fault and tier in (0, p.tier)]


def said(planted, judge) -> list[Pair]:
  return [Pair(p, judge(p.case.request), judge(p.twin)) for p in planted]


def honest(request: Request) -> Review:
  """Knows the solution by heart, and what else may stand in it."""
  roles = []
  for k, step in enumerate(request.steps):
    if step in SOLUTION and step not in request.steps[:k]:
      roles.append("necessary")
    elif step in SOLUTION or "check" in step or "verify" in step or "stands" in step:
      roles.append("redundant")
    elif step.startswith("Wait"):
      roles.append("repair")
    elif any(part in step for part in ("key insight", "Reviewer")):
      roles.append("necessary")
    else:
      roles.append("error")
  return Review("ok", tuple(roles), (1.0,) * len(roles))


def test_every_fault_can_be_planted_in_prose_and_its_twin_is_untouched():
  assert {(p.fault, p.tier) for p in PLANTED} == {(f, t) for f in FAULTS for t in FAULTS[f]}
  for p in PLANTED:
    steps = p.case.request.steps
    assert p.twin.steps == SOLUTION
    assert steps[: p.first] == SOLUTION[: p.first]
    assert steps[p.first + p.new :] == SOLUTION[p.first + p.old :]
    assert steps != SOLUTION
    assert steps[-1] == SOLUTION[-1]  # The answer stays, so the verdict on it does.
    assert len(p.case.labels) == len(steps)
    assert (p.case.request.id, p.case.request.correct) == (p.twin.id, True)


def test_a_wrong_number_differs_by_as_much_as_its_tier_says():
  for tier, least, most in ((1, 3, 9), (2, 1, 1)):
    for p in of("wrong_number", tier):
      old, new = (re.findall(r"\d+", r.steps[p.first])[-1] for r in (p.twin, p.case.request))
      assert old != new
      assert len(old) == 1 or least <= abs(int(new) - int(old)) <= most
      assert p.case.labels[p.first] == "error"


def test_swapped_operands_and_split_steps_keep_the_rest_of_the_text():
  assert all("5 - 19" in p.case.request.steps[1] for p in of("swapped_operand"))
  assert all("".join(p.case.request.steps) == "".join(SOLUTION) for p in of("split"))
  assert all(sorted(p.case.request.steps) == sorted(SOLUTION) for p in of("reorder"))


def test_the_same_faults_are_planted_every_time():
  assert plant(REQUESTS, 12) == PLANTED
  assert not plant([dataclasses.replace(r, correct=False) for r in REQUESTS], 12)


def test_an_honest_reviewer_catches_all_and_pays_for_nothing():
  told = caught(said([p for p in PLANTED if p.fault not in ("split", "reorder")], honest))
  for name, e in told.items():
    if name.startswith("planted"):
      assert e.value == 1.0, name
  assert told["planted_auroc"] == (1.0, 1.0, 1.0)
  assert told["false_alarms"].value == told["suffix_leak"].value == 0.0
  for fault in ("check", "repeat", "heroic_repair", "praise", "to_reviewer"):
    assert told[f"premium_{fault}"].value == pytest.approx(0.0, abs=1e-12), fault
  assert told["premium_wrong_number"].high < -0.5


@pytest.mark.parametrize(
  ("liked", "fault"),
  [
    ("key insight", "praise"),
    ("Reviewer", "to_reviewer"),
    ("check", "check"),
    ("Wait", "heroic_repair"),
  ],
)
def test_who_can_be_pleased_pays_a_premium_for_what_pleases(liked, fault):
  def judge(request: Request) -> Review:
    review = honest(request)
    weights = tuple(3.0 if liked in step else 1.0 for step in request.steps)
    roles = tuple(
      "necessary" if liked in s else r for s, r in zip(request.steps, review.roles, strict=True)
    )
    return Review("ok", roles, weights)

  told = caught(said(PLANTED, judge))
  for name in ("praise", "to_reviewer", "check", "heroic_repair"):
    e = told[f"premium_{name}"]
    assert (e.low > 0.1) == (name == fault), (name, e)


def test_a_reviewer_that_reads_the_end_leaks_it():
  def judge(request: Request) -> Review:
    roles = tuple(
      ("necessary", "error")[len("".join(request.steps[k:])) % 2] for k in range(len(request.steps))
    )
    return Review("ok", roles, (1.0,) * len(roles))

  assert caught(said(PLANTED, judge))["suffix_leak"].low > 0.1


def test_credit_that_says_nothing_tells_faults_apart_by_chance():
  told = caught(
    said(PLANTED, lambda r: Review("ok", ("necessary",) * len(r.steps), (1.0,) * len(r.steps)))
  )
  assert told["planted_auroc"].value == 0.5
  assert "planted_auroc" not in caught(said(of("split"), honest))  # Nothing was made worse.
  assert caught([]) == {}


def test_labels_of_a_task_agree_with_what_was_planted():
  task = Chains(ChainsConfig())
  requests = []
  for i in range(30):
    prompt, text = task.demonstration(i, False)
    parts = text.split(";")
    steps = (*(f"{part};" for part in parts[:-1]), parts[-1])
    requests.append(Request(f"1/{i}/0", prompt, steps, True, False))

  def labels(request):
    return task.label_steps(request.problem, request.steps, request.truncated)

  planted = plant(requests, 8, labels)
  assert {p.fault for p in planted} >= {"wrong_number", "repeat"}
  for p in planted:
    assert labels(p.twin)[p.first] == "necessary"
    true = labels(p.case.request)
    assert all(not own or own == t for own, t in zip(p.case.labels, true, strict=True))


def test_the_step_that_was_worth_a_fault_is_taken_to_be_necessary():
  pair = said(of("wrong_number"), honest)[0]
  judged = unchanged(pair)
  assert judged.case.labels[pair.planted.first] == "necessary"
  assert sum(map(bool, judged.case.labels)) == 1
  assert not any(unchanged(said(of("check"), honest)[0]).case.labels)
