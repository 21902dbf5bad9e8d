"""Which problems a batch is made of."""

import collections

import numpy as np
import pytest
import words
from scripted import Scripted

from dca_jax.rollout import RolloutConfig, Sampler, collect
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
    config = RolloutConfig(problems=4, group=2, max_prompt_tokens=64, max_tokens=8, **changes)
    self.engine = Scripted(self.write)
    self.sampler = Sampler(self.engine, config, task, self.tokenizer, 448, np.arange(4))

  def write(self, wanted, p, g):
    n = int(wanted.problems_P[p])
    right = np.random.default_rng([n, g]).random() < self.right
    answer = self.task.problem("train", n).answer if right else "1"
    return self.tokenizer(f"#### {answer}")["input_ids"]

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
