"""Spot checks: which steps are measured, and that the measurement is the step's own effect."""

import dataclasses
import json

import numpy as np
import pytest
import tiny
from test_prefixes import SAMPLER, Batch, T

from dca_jax.episode import Check, Episode, Outcome, Review
from dca_jax.loop import train
from dca_jax.rollout.prefixes import Continues, monte_carlo
from dca_jax.rollout.spot import SpotConfig, chosen, measured
from dca_jax.store.trajectories import read_trajectories

TEXTS = ["a1;b2;#3$", "a1;b3;#4$", "a0;#0$", "#1$"]


def named(batch: Batch, rewards) -> Batch:
  """The batch with ids and outcomes."""
  batch.episodes = [
    dataclasses.replace(e, id=f"1/{e.problem.id}/{i}", outcome=Outcome(r, bool(r), False))
    for i, (e, r) in enumerate(zip(batch.episodes, rewards, strict=True))
  ]
  return batch


def policy(batch: Batch, noise: int = 3) -> Continues:
  return Continues(SAMPLER, batch.params, (noise,))


def drawn(batch: Batch, share: float, seed: int = 0):
  return chosen(share, seed, batch.episodes, 4)


def test_episodes_of_mixed_groups_are_drawn_by_what_they_are_called():
  batch = named(Batch(1, texts=TEXTS), [1.0, 0.0, 0.0, 0.0])
  assert drawn(batch, np.inf) == [0, 1, 2]  # The last one has a single step.
  assert drawn(batch, 0.0) == []
  draws = {seed: drawn(batch, 0.5, seed) for seed in range(200)}
  assert draws == {seed: drawn(batch, 0.5, seed) for seed in range(200)}
  # The win as often as all three losses together would be, were each of them cut in two steps.
  assert all(0 in d for d in draws.values())
  assert abs(np.mean([len(d) for d in draws.values()]) - 1 - 2 / 3) < 4 * np.sqrt(4 / 9 / 200)
  # What it says and how it was reviewed decide nothing, and neither does its place in the batch.
  first = batch.episodes[0]
  said = tuple(s._replace(text="check: " + s.text) for s in first.steps)
  praise = Review("ok", ("necessary",) * 3, (3.0,) * 3)
  batch.episodes[0] = dataclasses.replace(first, steps=said, review=praise)
  assert all(drawn(batch, 0.5, seed) == draws[seed] for seed in range(20))
  batch.episodes = [batch.episodes[i] for i in (1, 0, 2, 3)]
  swapped = {0: 1, 1: 0, 2: 2}
  for seed in range(20):
    assert {swapped[i] for i in drawn(batch, 0.5, seed)} == set(draws[seed])
  assert drawn(named(batch, [1.0] * 4), np.inf) == []
  batch.episodes = [dataclasses.replace(e, trained=False) for e in batch.episodes]
  assert drawn(named(batch, [1.0, 0, 0, 0]), np.inf) == []


def test_a_check_is_the_difference_of_the_values_on_both_sides():
  """The values of `monte_carlo` from other noise are the same within their errors, and the last
  step ends in the outcome itself. Where answers come through several boundaries, they are averaged
  over more, which cost fewer tokens."""
  n = 256
  batch = named(Batch(1, texts=TEXTS), [1.0, 0.0, 0.0, 0.0])
  checked, spent = measured(SpotConfig(0.0, 1, n), 0, 1, policy(batch), batch.rollout)
  reviews, _ = monte_carlo(n, policy(batch, noise=8), batch.rollout)
  assert 5 * n <= spent.tokens <= 6 * n * T  # Six distinct prefixes.
  compared = 0
  for episode, review in zip(checked.episodes[:3], reviews[:3], strict=True):
    ends = (*review.values, episode.outcome.reward)
    assert len(episode.checks) == len(episode.steps)
    for k, check in episode.checks.items():
      wanted = ends[k + 1] - ends[k]
      variance = sum(x * (1 - x) for x in ends[k : k + 2]) / n
      assert abs(check.effect - wanted) < 4 * np.sqrt(2 * variance + 1e-9)
      compared += variance > 0
      assert len(check.before) >= n
    assert check.after == (episode.outcome.reward,) * n
  assert compared >= 6
  assert not checked.episodes[3].checks
  # Steps that share a prefix share its answers.
  assert checked.episodes[0].checks[0].after == checked.episodes[1].checks[0].after


def test_the_variance_is_that_of_the_effect():
  rng = np.random.default_rng(0)
  drawn = [Check(*map(tuple, rng.random((2, 4)) < [[0.3], [0.8]])) for _ in range(4000)]
  assert abs(np.mean([c.effect for c in drawn]) - 0.5) < 0.02
  assert abs(np.mean([c.variance for c in drawn]) / np.var([c.effect for c in drawn]) - 1) < 0.1
  assert np.isnan(Check((1.0,), (0.0,)).variance)
  # Where answers stand on both sides: half of them write the step, and are right as often as those
  # from behind it.
  drawn = []
  for _ in range(4000):
    again, common, other, fresh = rng.random(8) < 0.5, *(rng.random((3, 8)) < [[0.8], [0.2], [0.8]])
    before = [*common[again], *other[~again]]
    drawn.append(
      Check((*map(float, before),), (*map(float, [*common[again], *fresh[~again]]),), again.sum())
    )
  assert abs(np.mean([c.effect for c in drawn]) - 0.3) < 0.02
  assert abs(np.mean([c.variance for c in drawn]) / np.var([c.effect for c in drawn]) - 1) < 0.1


def test_a_run_keeps_its_checks_and_counts_their_tokens(tmp_path):
  changes = {"spot.share": 0.5, "spot.answers": 2}
  train(tiny.make_config({**changes, "steps": 3}), str(tmp_path / "whole"), quiet=True)
  train(tiny.make_config({**changes, "steps": 2}), str(tmp_path / "parts"), quiet=True)
  train(tiny.make_config({**changes, "steps": 3}), str(tmp_path / "parts"), quiet=True)
  name = "trajectories/step_000003.jsonl"
  assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
  plain = tmp_path / "plain"
  train(tiny.make_config({"steps": 3}), str(plain), quiet=True)
  # They are a measurement: nothing that is learnt depends on them.
  tiny.assert_same_arrays(tiny.saved_state(plain), tiny.saved_state(tmp_path / "whole"))
  rows, plain_rows = tiny.read_lines(tmp_path / "whole")[1:], tiny.read_lines(plain)[1:]
  assert any(row["spot/steps"] for row in rows)
  for row, plain_row in zip(rows, plain_rows, strict=True):
    episodes = list(read_trajectories(tmp_path / "whole" / "trajectories", row["step"]))
    checks = [check for e in episodes for check in e.checks.values()]
    assert len(checks) == row["spot/steps"]
    spent = row["train/generated_tokens"] - plain_row["train/generated_tokens"]
    assert spent == row["spot/tokens"]
    assert bool(spent) == bool(checks)
    if checks:
      assert row["spot/effect"] == pytest.approx(np.mean([c.effect for c in checks]))
    assert all(
      Episode.from_json(json.loads(json.dumps(e.to_json()))).checks == e.checks for e in episodes
    )
