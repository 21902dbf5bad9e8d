"""Which problems a batch is made of."""

import collections
import types

import jax
import numpy as np
import pytest
import words

from dca_jax.rollout import RolloutConfig, Samples
from dca_jax.rollout.collect import collect
from dca_jax.tasks import JsonlConfig, Text

ROWS = 24


@pytest.fixture(scope="module")
def task(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  rows = [{"question": f"What is {i} + 0?", "answer": str(i)} for i in range(10, 10 + ROWS)]
  path = words.write_jsonl(folder / "rows.jsonl", rows)
  return Text(JsonlConfig(path=path, heldout_path=path, tokenizer=words.save_tokenizer(folder)))


class Guesser:
  """Stands where the sampler does: writes the reference answer or a wrong one, as dice say."""

  end_ids_E = jax.device_put(np.array([1], np.int32))
  policy = types.SimpleNamespace(rows=448)

  def __init__(self, task, tokenizer, right: float, **changes):
    self.config = RolloutConfig(problems=4, group=2, max_prompt_tokens=64, max_tokens=8, **changes)
    self.task, self.tokenizer, self.right = task, tokenizer, right
    self.asked: list[list[int]] = []

  def own(self, count):
    return np.arange(count)

  def __call__(self, params, prompts, lengths, ids, key, numbers):
    group = len(numbers)
    self.asked.append(ids.tolist())
    tokens = np.ones((len(ids) * group, 8), np.int32)
    for row in range(len(tokens)):
      n = int(ids[row // group])
      right = np.random.default_rng([n, row % group]).random() < self.right
      answer = self.task.problem("train", n).answer if right else "1"
      encoded = self.tokenizer(f"#### {answer}")["input_ids"]
      tokens[row, : len(encoded)] = encoded
    return Samples(
      tokens,
      np.full(len(tokens), 8),
      np.zeros(len(tokens), bool),
      np.zeros(tokens.shape, np.float32),
    )


def run(task, right, steps, **changes):
  sampler = Guesser(task, task.tokenizer(), right, **changes)
  return sampler, [
    collect(sampler, 0, step, task, task.tokenizer(), None) for step in range(1, steps + 1)
  ]


@pytest.mark.parametrize("right", [0.0, 0.1, 0.5])
def test_every_problem_has_its_turn_in_every_epoch_whatever_is_refilled(task, right):
  epochs, steps = 3, ROWS // 4
  sampler, batches = run(task, right, epochs * steps, zero_variance="refill", refill_rounds=4)
  own = [numbers for numbers in sampler.asked if max(numbers) < 2**31]
  assert len(own) == epochs * steps
  for epoch in range(epochs):
    seen = [
      task.problem("train", n).prompt
      for numbers in own[epoch * steps : (epoch + 1) * steps]
      for n in numbers
    ]
    assert len(set(seen)) == len(seen) == ROWS
  further = [n for numbers in sampler.asked for n in numbers if n >= 2**31]
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
  sampler = Guesser(task, task.tokenizer(), 0.3, zero_variance="refill", refill_rounds=3)
  last = collect(sampler, 0, 6, task, task.tokenizer(), None)
  assert [e.id for e in last.episodes] == [e.id for e in whole[-1].episodes]
  assert [e.outcome for e in last.episodes] == [e.outcome for e in whole[-1].episodes]


def test_refills_pass_through_the_data_evenly(task):
  sampler, _ = run(task, 0.0, 60, zero_variance="refill", refill_rounds=2)
  counts = collections.Counter(
    task.problem("train", n).prompt for numbers in sampler.asked for n in numbers if n >= 2**31
  )
  assert len(counts) == ROWS
  assert max(counts.values()) - min(counts.values()) <= 2
