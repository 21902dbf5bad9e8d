"""The numbers that an evaluation reports, and the batches that it draws."""

import itertools

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny
from scripted import Scripted

from dca_jax.devices import mesh
from dca_jax.intervals import Estimate, share
from dca_jax.policy import Policy
from dca_jax.rollout import GREEDY, RolloutConfig, Sampler, slots
from dca_jax.rollout.evaluate import (
  EvaluateConfig,
  answer,
  evaluate,
  majority_correct,
  pass_at_k,
)
from dca_jax.tasks import Chains
from dca_jax.tasks.types import Outcome, Problem


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n):
  for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
    subsets = list(itertools.combinations([i < correct for i in range(n)], k))
    assert pass_at_k(n, correct, k) == pytest.approx(
      sum(map(any, subsets)) / len(subsets), abs=1e-12
    )


def test_majority():
  assert majority_correct(["3", "3", "5"], [True, True, False]) == 1.0
  assert majority_correct(["5", "3", "5"], [False, True, False]) == 0.0
  # Among equally frequent answers the share that is correct, in any order.
  assert majority_correct(["3", "5"], [True, False]) == 0.5
  assert majority_correct(["5", "3"], [False, True]) == 0.5
  assert (
    majority_correct(
      ["3", "5", "7", "5", "3", "7", "1"], [True] + [False] * 3 + [True] + [False] * 2
    )
    == 1 / 3
  )
  # No answer is not an answer: it cannot win, however frequent.
  assert majority_correct([None, None, "3"], [False, False, True]) == 1.0
  assert majority_correct([None, None], [False, False]) == 0.0
  assert majority_correct([], []) == 0.0


def test_majority_of_one_is_accuracy():
  for given, ok in (("3", True), ("5", False), (None, False)):
    assert majority_correct([given], [ok]) == float(ok)


@pytest.mark.parametrize(
  ("problems", "alpha", "beta", "samples"),
  [
    (256, 2.0, 2.0, 1),
    (256, 0.5, 0.5, 8),
    (64, 1.0, 3.0, 8),
    (64, 18.0, 2.0, 4),
    (32, 2.0, 2.0, 1),
  ],
)
def test_interval_covers_the_truth_95_times_in_100(problems, alpha, beta, samples):
  """Problems differ in difficulty (a beta distribution); each is sampled a few times."""
  rng = np.random.default_rng(1)
  runs = 3000
  x = rng.binomial(samples, rng.beta(alpha, beta, (runs, problems))) / samples
  truth = alpha / (alpha + beta)
  covered = np.mean([e.low <= truth <= e.high for e in map(share, x)])
  assert 0.93 < covered < 0.975  # The standard error of this share is 0.4 %.


def test_config_finds_impossible_values():
  assert EvaluateConfig().check() == EvaluateConfig(problems=1, samples=1, k=1).check() == {}
  assert set(EvaluateConfig(problems=0, samples=2, k=3, every=-1).check()) == {
    "problems",
    "k",
    "every",
  }


# Where the numbers come from.


def written(problem: int, number: int) -> list[int]:
  """Two possible answers and none, of one to three tokens."""
  dice = np.random.default_rng([problem, number + 1])
  return [int(dice.integers(3)), *[7] * int(dice.integers(3))]


class Parity:
  """Right is 1; the answer 2 is none. Nothing is judged twice."""

  concurrency = 1

  def __init__(self):
    self.judged = 0

  def problem(self, split, index):
    assert split == "heldout"
    return Problem(index, "p", "1")

  def verify(self, problem, completion, truncated):
    self.judged += 1
    return Outcome(float(completion[0] == "1"), completion[0] == "1", truncated)

  def final_answer(self, completion):
    return None if completion[0] == "2" else completion[0]


def letters(texts, add_special_tokens):
  return {"input_ids": [[0] for _ in texts]}


@pytest.mark.parametrize(("problems", "group"), [(1, 2), (4, 2), (3, 5), (2, 6), (16, 8)])
def test_what_is_reported_is_what_was_answered_in_whatever_batches(monkeypatch, problems, group):
  for module in ("evaluate", "turns"):
    monkeypatch.setattr(
      f"dca_jax.rollout.{module}.text_of", lambda _, tokens: "".join(map(str, tokens))
    )
  monkeypatch.setattr("dca_jax.rollout.prompts.unspelt", lambda *_: "")
  engine = Scripted(lambda wanted, p, g: written(int(wanted.problems_P[p]), g))
  rollout = RolloutConfig(max_prompt_tokens=1, max_tokens=3, problems=problems, group=group)
  config, task = EvaluateConfig(problems=7, samples=5, k=3), Parity()
  sampler = Sampler(engine, rollout, task, letters, 100, np.arange(problems))
  got = evaluate(config, sampler, None)
  assert task.judged == 7 * 6
  # Training's shape, always: there is one program, and memory for it.
  assert {wanted.numbers_PxG.shape for wanted in engine.wanted} == {(problems, group)}
  first = {(i, g): written(i, g) for i in range(7) for g in (GREEDY, *range(5))}
  right = np.array([[first[i, g][0] == 1 for g in range(5)] for i in range(7)])
  assert got["greedy"] == share([first[i, GREEDY][0] == 1 for i in range(7)])
  assert got["sampled"] == share(right.mean(1))
  chosen = list(itertools.combinations(range(5), 3))
  passed = [np.mean([right[i, list(c)].any() for c in chosen]) for i in range(7)]
  assert got["pass@3"].value == pytest.approx(np.mean(passed))
  majority = []
  for i in range(7):
    ones, zeros = (sum(first[i, g][0] == x for g in range(3)) for x in (1, 0))
    majority.append(1.0 if ones > zeros else 0.5 if ones == zeros > 0 else 0.0)
  assert got["maj@3"] == share(majority)
  length = np.mean([len(first[i, g]) for i in range(7) for g in range(5)])
  assert got["length"] == Estimate(length, length, length)
  monkeypatch.setattr(Parity, "final_answer", None)  # As with a verifier that gives verdicts alone.
  assert evaluate(config, sampler, None) == {k: x for k, x in got.items() if k != "maj@3"}


def test_the_program_of_training_answers_and_no_batch_decides_what():
  config = tiny.make_config({"evaluate.problems": 5, "evaluate.samples": 3})
  task = Chains(config.task)
  tokenizer = task.tokenizer()
  policy = Policy(config.policy, len(tokenizer), mesh.make_mesh(config.mesh))
  params = nn.unbox(jax.jit(policy.init_params)(jax.random.key(0)))
  told = []
  for changes in ({}, {"rollout.problems": 2}):
    rollout = tiny.make_config(changes).rollout
    engine = config.engine.open(policy, rollout, tokenizer)
    own = np.arange(rollout.problems)
    sampler = Sampler(engine, rollout, task, tokenizer, policy.rows, own)
    prompts = np.ones((rollout.problems, 16), np.int32), np.ones(rollout.problems, np.int32)
    list(sampler.stream(params, prompts, own, np.arange(rollout.group), (0, 1)))
    compiled = slots.decode._cache_size(), slots.begin._cache_size()
    told.append(answer(config.evaluate, sampler, params))
    assert (slots.decode._cache_size(), slots.begin._cache_size()) == compiled
  assert told[0] == told[1]
  assert told[0].keys() == set(itertools.product(range(5), (GREEDY, 0, 1, 2)))
