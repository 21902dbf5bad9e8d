"""Completions that go on from one step to the next: what is kept of them, and that none is lost."""

import jax
import numpy as np
import pytest

from dca_jax.rollout import RolloutConfig, Sample, Sampler, collect_whole, first_unfinished
from dca_jax.tasks import ChainsConfig

P, G, T, C = 4, 2, 60, 3
TASK = ChainsConfig(lines=2).open()
TOKENIZER = TASK.tokenizer()


class Slowly:
  """Writes tokens whose log-probabilities are minus the number of the step, 8 at a time, until
  enough has ended."""

  step, generated = 0, 0

  @staticmethod
  def answer(problem: int, number: int) -> np.ndarray:
    rng = np.random.default_rng([problem, number])
    return rng.integers(1, 9, rng.integers(1, T + 1)).astype(np.int32)

  def stream(self, params, wanted, noise, further=None, begun=None):
    lengths, ended = begun.lengths_PxG.copy(), begun.ended_PxG.copy()
    while ended.all(1).sum() < begun.enough:
      for p, g in zip(*np.nonzero(~ended), strict=True):
        whole = self.answer(int(wanted.problems_P[p]), g)
        before, lengths[p, g] = lengths[p, g], min(lengths[p, g] + 8, len(whole))
        self.generated += lengths[p, g] - before
        begun.tokens_PxGxT[p, g, before : lengths[p, g]] = whole[before : lengths[p, g]]
        begun.logprobs_PxGxT[p, g, before : lengths[p, g]] = -self.step
        if lengths[p, g] == len(whole):
          ended[p, g] = True
          yield self.sample(begun, p, g, lengths)
    for p, g in zip(*np.nonzero(~ended), strict=True):
      yield self.sample(begun, p, g, lengths)._replace(ended=False)

  def sample(self, begun, p, g, lengths) -> Sample:
    n = lengths[p, g]
    return Sample(p * G + g, begun.tokens_PxGxT[p, g, :n], begun.logprobs_PxGxT[p, g, :n], False)


@pytest.mark.parametrize("carry", [1, C, 3 * P])
def test_every_problem_is_trained_on_once_with_all_that_was_written_of_it(carry):
  engine = Slowly()
  config = RolloutConfig(problems=P, group=G, max_prompt_tokens=32, max_tokens=T, carry=carry)
  sampler = Sampler(engine, config, TASK, TOKENIZER, 1000, np.arange(P))
  left = jax.device_get(first_unfinished(config))
  numbers = {TASK.problem("train", n).id: n for n in range(200)}
  seen, ages, generated = [], [], 0
  for step in range(1, 31):
    engine.step = step
    batch = collect_whole(sampler, 0, step, None, lambda group: group, left)
    left, generated = batch.unfinished, generated + batch.generated
    assert len(left.numbers_C) == carry
    assert len(batch.episodes) == P * G
    stale = 0
    for i, episode in enumerate(batch.episodes):
      number, (segment,) = numbers[episode.problem.id], episode.segments
      seen += [number] * (i % G == 0)
      assert segment.tokens.tolist() == Slowly.answer(number, i % G).tolist()
      steps = -segment.logprobs
      assert (np.diff(steps) >= 0).all()  # What an earlier step wrote stayed as that wrote it.
      assert episode.age == step - steps[0]
      assert episode.id == f"{step}/{episode.problem.id}/{i % G}"
      stale += (steps < step).sum()
      ages.append(episode.age)
    assert batch.stale == stale
    np.testing.assert_array_equal(batch.logprobs_BxT[-1, : len(steps)], -steps)
  assert generated == engine.generated
  assert max(ages) > 0
  # None twice, and none left out but those that go on.
  assert sorted([*seen, *left.numbers_C]) == list(range(30 * P + carry))
