"""Which problems a batch is made of, and when it is handed to the reviewer."""

import collections
import contextlib
import functools
import threading
import types

import numpy as np
import pytest
import words
from scripted import Scripted

from dca_jax.config import Config
from dca_jax.credit import SCHEMES
from dca_jax.review import REVIEWERS, Review, Truth, open_reviewer
from dca_jax.review.episodes import wait_for_reviews
from dca_jax.review.function import Calls
from dca_jax.rollout import RolloutConfig, Sampler, collect
from dca_jax.step import begin
from dca_jax.tasks import JsonlConfig, Text

ROWS = 24


@pytest.fixture(scope="module")
def task(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  rows = [{"question": f"What is {i} + 0?", "answer": str(i)} for i in range(10, 10 + ROWS)]
  path = words.write_jsonl(folder / "rows.jsonl", rows)
  return Text(JsonlConfig(path=path, heldout_path=path, tokenizer=words.save_tokenizer(folder)))


class Guesser:
  """Samples the reference answer or a wrong one, as dice say."""

  def __init__(self, task, right: float, **changes):
    self.task, self.right, self.tokenizer = task, right, task.tokenizer()
    config = RolloutConfig(problems=4, group=2, max_prompt_tokens=64, max_tokens=16, **changes)
    self.engine = Scripted(self.write)
    self.sampler = Sampler(self.engine, config, task, self.tokenizer, 448, np.arange(4))

  def write(self, wanted, p, g):
    n = int(wanted.problems_P[p])
    right = np.random.default_rng([n, g]).random() < self.right
    answer = self.task.problem("train", n).answer if right else "1"
    return self.tokenizer(f"well\n#### {answer}")["input_ids"]

  @property
  def asked(self) -> list[list[int]]:
    """The problems of each batch."""
    return [wanted.problems_P.tolist() for wanted in self.engine.wanted]

  def batch(self, step):
    return collect(self.sampler, 0, step, None)


def run(task, right, steps, **changes):
  guesser = Guesser(task, right, **changes)
  return guesser, [guesser.batch(step) for step in range(1, steps + 1)]


@pytest.mark.parametrize("right", [0.0, 0.1, 0.5])
def test_every_problem_has_its_turn_in_every_epoch_whatever_is_refilled(task, right):
  epochs, steps = 3, ROWS // 4
  guesser, batches = run(task, right, epochs * steps, zero_variance="refill", refill_rounds=4)
  own = [numbers for numbers in guesser.asked if max(numbers) < 2**31]
  assert len(own) == epochs * steps
  for epoch in range(epochs):
    seen = [
      task.problem("train", n).prompt
      for numbers in own[epoch * steps : (epoch + 1) * steps]
      for n in numbers
    ]
    assert len(set(seen)) == len(seen) == ROWS
  further = [n for numbers in guesser.asked for n in numbers if n >= 2**31]
  assert (
    len(set(further)) == len(further) > 0
  )  # Never the same number, so never the same noise, twice.
  if right == 0:
    assert len(further) == 3 * 4 * len(batches)
    assert not any(batch.trained_BxT.any() for batch in batches)


def test_refilling_drops_no_group_that_teaches(task):
  kept = run(task, 0.5, 12)[1]
  refilled = run(task, 0.5, 12, zero_variance="refill", refill_rounds=4)[1]

  def mixed(batch):
    pairs = zip(batch.episodes[::2], batch.episodes[1::2], strict=True)
    return [a.problem.id for a, b in pairs if a.outcome.reward != b.outcome.reward]

  for plain, full in zip(kept, refilled, strict=True):
    assert mixed(full)[: len(mixed(plain))] == mixed(plain)
    assert [e.trained for e in full.episodes] == [
      e.problem.id in mixed(full) for e in full.episodes
    ]
  assert sum(len(mixed(batch)) for batch in refilled) > 1.3 * sum(
    len(mixed(batch)) for batch in kept
  )


def test_a_step_needs_no_other(task):
  """What a resumed run asks is what an uninterrupted one asks."""
  whole = run(task, 0.3, 6, zero_variance="refill", refill_rounds=3)[1]
  last = Guesser(task, 0.3, zero_variance="refill", refill_rounds=3).batch(6)
  assert [e.id for e in last.episodes] == [e.id for e in whole[-1].episodes]
  assert [e.outcome for e in last.episodes] == [e.outcome for e in whole[-1].episodes]


def test_refills_pass_through_the_data_evenly(task):
  guesser, _ = run(task, 0.0, 60, zero_variance="refill", refill_rounds=2)
  counts = collections.Counter(
    task.problem("train", n).prompt for numbers in guesser.asked for n in numbers if n >= 2**31
  )
  assert len(counts) == ROWS
  assert max(counts.values()) - min(counts.values()) <= 2


# What goes to the reviewer, and when.


def reviewed(guesser, reviewer, step=1):
  """A batch and its reviews, as a training step makes them."""
  scheme = SCHEMES["weighted"]()
  trainer = types.SimpleNamespace(
    config=Config(), sampler=guesser.sampler, reviewer=reviewer, scheme=scheme
  )
  batch = begin(trainer, step, None)
  return batch, wait_for_reviews(batch.asked, 60.0)


def test_reviews_are_under_way_before_the_last_row_has_ended(task):
  guesser, begun = Guesser(task, 0.5), threading.Event()

  def write(plain, wanted, p, g):
    if (p, g) == (0, 0):  # The last one.
      assert begun.wait(60.0)
    return plain(wanted, p, g)

  def review(request):
    begun.set()
    return Review("ok", ("necessary",) * len(request.steps))

  guesser.engine.write = functools.partial(write, guesser.write)
  with contextlib.closing(Calls(review, "watched", 1)) as reviewer:
    reviews = reviewed(guesser, reviewer)[1]
  assert {r.status for r in reviews} == {"ok", "skipped"}


@pytest.mark.parametrize("changes", [{}, {"zero_variance": "refill", "refill_rounds": 3}])
def test_reviews_do_not_depend_on_which_row_ends_first(task, changes):
  reviewer = open_reviewer(REVIEWERS["random"](), Truth(None, None), None)
  orders = [reversed, lambda rows: rows, np.random.default_rng(0).permutation]
  seen = []
  for order in orders:
    guesser = Guesser(task, 0.4, **changes)
    guesser.engine.order = order
    batch, reviews = reviewed(guesser, reviewer)
    seen.append(
      [(e.id, e.outcome, e.trained, r) for e, r in zip(batch.episodes, reviews, strict=True)]
    )
  assert seen[0] == seen[1] == seen[2]
  assert {r.status for *_, r in seen[0]} == {"ok", "skipped"} - ({"skipped"} if changes else set())


def test_no_review_is_asked_of_a_group_that_is_replaced(task):
  for right in (0.1, 0.4, 0.6):
    guesser = Guesser(task, right, zero_variance="refill", refill_rounds=3)
    sent = []

    def review(request, sent=sent):
      sent.append(request.id)
      return Review("ok", ("necessary",) * len(request.steps))

    with contextlib.closing(Calls(review, "counted", 1)) as reviewer:
      batches = [reviewed(guesser, reviewer, step)[0] for step in range(1, 9)]
    asked = [r.id for b in batches for group in b.asked for r in group.requests if r]
    assert sorted(sent) == sorted(asked)
    trained = sum(episode.trained for batch in batches for episode in batch.episodes)
    assert len(asked) == trained
