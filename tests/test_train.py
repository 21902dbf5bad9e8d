"""The training loop: what a step trains on, what it records, and what it must not do."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
from concurrent.futures import Future
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dca_jax import review
from dca_jax import run as run_module
from dca_jax.commands.rewrites import rewrites
from dca_jax.credit import SCHEMES
from dca_jax.devices import mesh
from dca_jax.episode import ROLES
from dca_jax.errors import UserError
from dca_jax.loop import train
from dca_jax.policy import Head, Policy, Sampling, token_logprobs
from dca_jax.review import builtin
from dca_jax.rollout import Sampler, collect
from dca_jax.store.trajectories import read_trajectories

WEIGHTED = {"credit.scheme": "weighted", "reviewer.name": "oracle"}


@pytest.fixture(scope="module")
def weighted_run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("weighted")
  train(tiny.make_config({**WEIGHTED, "learner.reference": True}), str(workdir), quiet=True)
  return workdir


def records(workdir, step):
  return list(read_trajectories(workdir / "trajectories", step))


@pytest.fixture(scope="module")
def everything_run(tmp_path_factory):
  """A run of eight steps in two parts, and the programs compiled in each with the number of the
  last finished step."""
  workdir = tmp_path_factory.mktemp("everything")
  compiled, on = [], True

  def listen(event: str, seconds: float, **kwargs):
    # Making the MLIR module comes before the compiled program is looked for on the disk.
    if on and event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
      compiled.append((part, len(tiny.read_lines(workdir)) - 1, kwargs["fun_name"]))

  jax.monitoring.register_event_duration_secs_listener(listen)
  part = 1
  train(
    tiny.make_config({**tiny.EVERYTHING, "steps": 6, "evaluate.every": 3}), str(workdir), quiet=True
  )
  part = 2
  train(
    tiny.make_config({**tiny.EVERYTHING, "steps": 8, "evaluate.every": 3}), str(workdir), quiet=True
  )
  on = False
  return workdir, compiled


# Compilations and transfers.


def test_nothing_is_compiled_after_the_second_step(everything_run):
  workdir, compiled = everything_run
  # The steps differ in how often they sample.
  assert {line["train/completions"] for line in tiny.read_lines(workdir)[1:]} == {16, 32}
  assert any("update" in name for _, _, name in compiled)
  # Values and spot checks each sample in one of three numbers of rows, with programs of their own.
  begun = [done for part, done, name in compiled if part == 1 and name == "jit(begin)"]
  assert len(begun) <= 1 + 2 * 3
  late = [(done, name) for part, done, name in compiled if part == 1 and done >= 2]
  assert not [name for _, name in late if name not in ("jit(begin)", "jit(decode)")]


def test_a_resumed_run_compiles_nothing_after_its_first_step(everything_run):
  _, compiled = everything_run
  assert any(part == 2 for part, _, _ in compiled)
  assert not [(done, name) for part, done, name in compiled if part == 2 and done >= 7]


def test_rewrites_are_a_share_of_the_batch_and_can_be_exported(everything_run, tmp_path):
  workdir, _ = everything_run
  out, lines, group = tmp_path / "out.jsonl", tiny.read_lines(workdir)[1:], 4
  kept = []
  for line in lines:
    episodes = records(workdir, line["step"])
    own = [e for e in episodes if e.rewrite]
    assert len(own) == line["rewrite/kept"] <= line["rewrite/proposed"]
    assert line["rewrite/share"] == pytest.approx(len(own) / (len(episodes) + len(own)))
    assert line["rewrite/tokens"] <= line["train/generated_tokens"]
    groups = collections.Counter(e.problem.id for e in own)
    assert max(groups.values(), default=0) <= 2 < group
    kept += own
  assert kept
  rewrites(str(workdir), str(out))
  exported = [json.loads(line) for line in out.read_text().splitlines()]
  assert [line["completion"] for line in exported] == [e.rewrite.text for e in kept]
  assert {line["why"] for line in exported} == {"corrected"}
  assert all(line["after"] == [1.0] and line["before"] == [0.0] for line in exported)


def answering(reply):
  """The section of a reviewer that answers at once with what `reply` makes of the requests."""

  @dataclasses.dataclass(frozen=True)
  class Answering(review.ReviewerConfig):
    gives: ClassVar[tuple[str, ...]] = ("roles", "values")

    def open(self, uses):
      return builtin.Instant(reply)

  return Answering


def test_a_hidden_transfer_in_a_step_is_an_error(tmp_path, monkeypatch):
  def careless(requests):
    jnp.ones(3) + np.ones(3, np.float32)
    return [review.Review("none")] * len(requests)

  monkeypatch.setitem(review.REVIEWERS, "careless", answering(careless))
  config = tiny.make_config({"credit.scheme": "weighted", "reviewer.name": "careless"})
  with pytest.raises(Exception, match=r"isallowed.*transfer"):
    train(config, str(tmp_path), quiet=True)


# Credit.


@pytest.fixture(scope="module")
def uniform_run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("uniform")
  train(tiny.make_config(), str(workdir), quiet=True)
  return workdir


def same_training(ours, theirs) -> bool:
  """Whether the parameters are equal bit for bit, and so everything sampled on the way."""
  ours, theirs = tiny.saved_state(ours), tiny.saved_state(theirs)
  # A scheme may keep something of its own beside them.
  trained = [k for k in ours if not k.startswith("['credit']")]
  return all(ours[k].tobytes() == theirs[k].tobytes() for k in trained)


def garbled(requests):
  """Reviews that do not fit their answers, of every kind."""
  misfits = (
    review.Review("ok"),
    review.Review("ok", ("necessary",) * 99, (1.0,) * 99),
    review.Review("ok", ("splendid",) * 3, (1.0,) * 3, (0.5,) * 3),
    review.Review("ok", values=(0.5,) * 99),
    review.Review("error"),
  )
  return [misfits[i % len(misfits)] for i in range(len(requests))]


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "uniform"])
def test_without_usable_reviews_every_scheme_is_uniform_bit_for_bit(
  scheme, uniform_run, tmp_path, monkeypatch, capsys
):
  for name in ("silent", "garbled"):
    monkeypatch.setitem(review.REVIEWERS, "garbled", answering(garbled))
    train(
      tiny.make_config({"credit.scheme": scheme, "reviewer.name": name}),
      str(tmp_path / name),
      quiet=True,
    )
    assert same_training(tmp_path / name, uniform_run)
    assert tiny.read_lines(tmp_path / name)[-1]["review/ok"] == 0
    assert "warning: no review of 3 steps was usable" in capsys.readouterr().err


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "uniform"])
@pytest.mark.parametrize("name", ["nan", "stale", "lexical", "thief", "suffix"])
def test_no_reviewer_can_break_a_run(scheme, name, tmp_path):
  # Audits too: reviews of what is planted need not fit it either.
  config = tiny.make_config(
    {"credit.scheme": scheme, "reviewer.name": name, "reviewer.audit_every": 1, "steps": 2}
  )
  train(config, str(tmp_path), quiet=True)
  lines = tiny.read_lines(tmp_path)
  assert lines[-1]["step"] == 2
  assert all(np.isfinite(value) for line in lines for value in line.values())


@pytest.mark.parametrize(("name", "ends"), [("lexical", True), ("oracle", False)])
def test_a_reviewer_that_misses_what_was_planted_ends_the_run(name, ends, tmp_path):
  audits = {"reviewer.name": name, "reviewer.audit_every": 2, "reviewer.audit_floor": 0.5}
  config = tiny.make_config({"credit.scheme": "weighted", **audits, "steps": 3})
  expected = pytest.raises(UserError, match="audit_floor") if ends else contextlib.nullcontext()
  with expected:
    train(config, str(tmp_path), quiet=True)
  last = tiny.read_lines(tmp_path)[2]
  assert (last["review/planted_found"] < 0.5) == ends
  # What was done is saved.
  assert (tmp_path / "checkpoints" / "2").exists()


def test_the_conserved_sum_is_checked_for_either_mass(tmp_path):
  changes = {
    "credit.scheme": "weighted",
    "reviewer.name": "oracle",
    "credit.conserve": "completion",
    "steps": 2,
  }
  train(tiny.make_config(changes), str(tmp_path), quiet=True)
  rows = records(tmp_path, 2)
  assert any(t.advantage for t in rows)
  for t in rows:
    assert sum(t.credit) == pytest.approx(t.advantage * 12, rel=1e-5, abs=1e-6)
  assert tiny.read_lines(tmp_path)[2]["credit/conservation_error"] < 1e-5


# Overlap.

OVERLAP = {**WEIGHTED, "reviewer.overlap": 1, "learner.loss": "ppo", "steps": 5}


def test_one_step_ahead_batches_come_from_the_policy_before(tmp_path):
  """Without learning, one step behind or not makes no difference; with it,
  from the second batch on it does."""
  still = {"learner.lr": 1e-30, "steps": 3}
  train(tiny.make_config({**OVERLAP, **still}), str(tmp_path / "ahead"), quiet=True)
  train(tiny.make_config({**WEIGHTED, **still}), str(tmp_path / "fresh"), quiet=True)
  for step in (1, 2, 3):
    ours, theirs = records(tmp_path / "ahead", step), records(tmp_path / "fresh", step)
    assert [(t.id, t.tokens, t.credit) for t in ours] == [
      (t.id, t.tokens, t.credit) for t in theirs
    ]
  train(tiny.make_config(OVERLAP), str(tmp_path / "learning"), quiet=True)
  lines = tiny.read_lines(tmp_path / "learning")
  # The first batch and the second come from the start; the first update's ratio is 1, the others'
  # is not.
  assert lines[1]["learner/ratio"] == pytest.approx(1, abs=1e-5)
  assert [t.tokens for t in records(tmp_path / "learning", 2)] == [
    t.tokens for t in records(tmp_path / "fresh", 2)
  ]
  assert abs(lines[4]["learner/ratio"] - 1) > 1e-4


def test_reviews_are_under_way_while_the_next_batch_is_sampled(tmp_path, monkeypatch):
  events, numbers = [], itertools.count(1)

  class Watched(builtin.Instant):
    def begin_step(self, step=0):
      step = next(numbers)

      def submit(requests, deadline):
        done = self.submit(requests, deadline)
        events.append(("asked", step))

        class Answer(Future):
          def result(self, timeout=None):
            events.append(("waited for", step))
            return done.result()

        return Answer()

      return submit

  def watched(config, truth, *_):
    return Watched(functools.partial(builtin.true_reviews, truth))

  monkeypatch.setattr(run_module, "open_reviewer", watched)
  train(tiny.make_config(OVERLAP), str(tmp_path), quiet=True)
  for step in range(1, 5):
    assert events.index(("asked", step + 1)) < events.index(("waited for", step))
  assert len(set(events)) == 10
  assert len(events) == 10 * tiny.SETTINGS["rollout"]["problems"]  # Group by group.


def test_a_reviewer_that_asks_to_stop_ends_the_run_with_its_step_saved(tmp_path, monkeypatch):
  monkeypatch.setattr(builtin.Instant, "problem", lambda self: "no more money")
  with pytest.raises(UserError, match=r"no more money; step 1 is safe"):
    train(
      tiny.make_config({**WEIGHTED, "checkpoint.every": 5, "steps": 3}), str(tmp_path), quiet=True
    )


def test_a_share_of_the_completions_can_be_reviewed(tmp_path):
  train(
    tiny.make_config({**WEIGHTED, "reviewer.sample_frac": 0.5, "reviewer.audit_every": 2}),
    str(tmp_path),
    quiet=True,
  )
  lines = tiny.read_lines(tmp_path)[1:]
  assert 0 < np.mean([line["review/asked"] for line in lines]) < 0.6
  assert [line.get("review/planted_wrong_number") for line in lines] == [None, 1.0, None]


# Prefix values.


@pytest.mark.parametrize("source", ["reviewer", "monte_carlo", "learned"])
def test_potential_credit_from_every_source(source, uniform_run, tmp_path):
  reviewer = "oracle" if source == "reviewer" else "none"
  changes = {"credit.scheme": "potential", "value.source": source, "reviewer.name": reviewer}
  train(tiny.make_config({**changes, "credit.discount": 0.0}), str(tmp_path), quiet=True)
  lines = tiny.read_lines(tmp_path)
  assert 0 < lines[1]["value/brier"] < 1
  assert "credit/conservation_error" not in lines[1]
  sampled = sum(len(t.tokens) for t in records(tmp_path, 1))
  if source == "monte_carlo":
    assert lines[1]["train/generated_tokens"] > 4 * sampled
  else:
    assert lines[1]["train/generated_tokens"] == sampled
  for t in records(tmp_path, 3):
    values = [*t.values, t.outcome.reward]
    for k, s in enumerate(t.steps):
      assert t.credit[s.start : s.end] == pytest.approx(
        [values[k + 1] - values[k]] * (s.end - s.start)
      )
  # The first batch is the same everywhere: values come after sampling.
  assert [t.tokens for t in records(tmp_path, 1)] == [t.tokens for t in records(uniform_run, 1)]
  assert not same_training(tmp_path, uniform_run)


def test_a_head_is_trained_on_a_batch_only_after_it_has_valued_it(tmp_path):
  changes = {"credit.scheme": "potential", "value.source": "learned"}
  train(tiny.make_config({**changes, "steps": 2}), str(tmp_path), quiet=True)
  assert {value for t in records(tmp_path, 1) for value in t.values} == {0.5}
  assert len({value for t in records(tmp_path, 2) for value in t.values}) > 5


def test_with_reviews_weighted_is_not_uniform(weighted_run, uniform_run):
  # The first rollout is the same, since credit comes after it.
  assert [t.tokens for t in records(weighted_run, 1)] == [t.tokens for t in records(uniform_run, 1)]
  assert not same_training(weighted_run, uniform_run)


# What a step samples.


def collector(changes):
  """`collect` as a function of step and seed, on randomly initialised parameters."""
  config = tiny.make_config(changes)
  task = config.task.open()
  tokenizer = task.tokenizer()
  policy = Policy(config.policy, len(tokenizer), mesh.make_mesh(config.mesh))
  params = nn.unbox(jax.jit(policy.init_params)(jax.random.key(0)))
  engine, rollout = config.engine.open(policy, config.rollout, tokenizer), config.rollout
  own = np.arange(rollout.problems)
  sampler = Sampler(engine, rollout, task, tokenizer, policy.rows, own)
  return lambda step, seed=0: collect(sampler, seed, step, params)


def same(ours, theirs) -> bool:
  if [e.to_json() for e in ours.episodes] != [e.to_json() for e in theirs.episodes]:
    return False
  equal = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), list(ours[1:]), list(theirs[1:]))
  return all(jax.tree.leaves(equal))


def test_a_rollout_is_a_function_of_seed_and_step():
  sampled = collector({"rollout.zero_variance": "refill", "rollout.refill_rounds": 3})
  first = sampled(5)
  assert same(first, sampled(5))
  assert not same(first, sampled(6))
  assert not same(first, sampled(5, seed=1))


def test_problems_differ_between_steps_and_between_seeds():
  sampled = collector({"rollout.zero_variance": "refill", "rollout.refill_rounds": 3})
  ids = [
    {e.problem.id for e in sampled(step, seed).episodes} for seed in (0, 1) for step in (1, 2, 3)
  ]
  assert all(len(group) == 4 for group in ids)
  assert len(set.union(*ids)) == sum(len(group) for group in ids)


def test_seeds_differ_in_their_noise_too(tmp_path):
  for seed in (0, 1):
    train(tiny.make_config({"seed": seed, "steps": 1}), str(tmp_path / str(seed)), quiet=True)
  ours, theirs = records(tmp_path / "0", 1), records(tmp_path / "1", 1)
  assert not {t.problem.id for t in ours} & {t.problem.id for t in theirs}
  assert [t.tokens for t in ours] != [t.tokens for t in theirs]


def groups(trajectories):
  by_problem = {}
  for t in trajectories:
    by_problem.setdefault(t.problem.id, []).append(t)
  return list(by_problem.values())


def test_refill_trains_on_mixed_groups_unless_rounds_run_out(everything_run):
  workdir, _ = everything_run
  ran_out = []
  for step in range(1, 9):
    line, rows = tiny.read_lines(workdir)[step], records(workdir, step)
    assert [len(group) for group in groups(rows)] == [4] * 4
    mixed = [len({t.outcome.reward for t in group}) > 1 for group in groups(rows)]
    assert mixed == sorted(mixed, reverse=True)
    for group, is_mixed in zip(groups(rows), mixed, strict=True):
      assert all(t.trained == is_mixed for t in group if not t.outcome.truncated)
    assert line["learner/tokens"] == sum(
      len(t.tokens) for t in rows if t.trained and not t.outcome.truncated
    )
    ran_out.append(not all(mixed))
    if ran_out[-1]:
      assert line["train/completions"] == 32
  assert not all(ran_out)


def test_masked_completions_are_recorded_as_not_trained(everything_run):
  workdir, _ = everything_run
  truncated = [t for step in range(1, 9) for t in records(workdir, step) if t.outcome.truncated]
  assert truncated
  assert not any(t.trained for t in truncated)


def test_skip_leaves_unanimous_groups_out(tmp_path):
  train(tiny.make_config({"rollout.zero_variance": "skip", "steps": 6}), str(tmp_path), quiet=True)
  left_out = 0
  for step in range(1, 7):
    rows = records(tmp_path, step)
    for group in groups(rows):
      assert all(t.trained == (len({t.outcome.reward for t in group}) > 1) for t in group)
    left_out += sum(not t.trained for t in rows)
    assert tiny.read_lines(tmp_path)[step]["learner/tokens"] == sum(
      len(t.tokens) for t in rows if t.trained
    )
  assert left_out


@pytest.mark.parametrize("weight", [0.0, 0.1])
@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.8}], ids=lambda cut: next(iter(cut)))
def test_tokens_that_are_cut_leave_the_gradient_finite(cut, weight):
  # A policy that samples with top-k or top-p must be able to learn.
  def loss(hidden):
    logps, entropy = token_logprobs(
      hidden, Head(jnp.eye(6)), jnp.array([[0, 1, 2]]), Sampling(**cut)
    )
    return logps.sum() + weight * entropy.sum()

  gradient = jax.jit(jax.grad(loss))(jax.random.normal(jax.random.key(0), (1, 3, 6)))
  assert np.isfinite(gradient).all()
  assert np.abs(gradient).max() > 0


# What a step records.


def test_trajectories_describe_the_completions(weighted_run):
  tokenizer = tiny.make_config().task.open().tokenizer()
  for step in (1, 2, 3):
    rows = records(weighted_run, step)
    assert [t.id.split("/")[0] for t in rows] == [str(step)] * 16
    assert len({t.id for t in rows}) == 16
    for t in rows:
      assert [s.start for s in t.steps] == [0, *(s.end for s in t.steps[:-1])]
      assert t.steps[-1].end == len(t.tokens)
      assert "".join(s.text for s in t.steps) == tokenizer.decode(t.tokens)
      for s in t.steps:
        assert s.text == tokenizer.decode(t.tokens[s.start : s.end])
      assert set(t.review.roles) <= set(ROLES)
      assert (t.tokens[-1] == tokenizer.eos_token_id) == (not t.outcome.truncated)
      assert t.outcome.correct == (t.outcome.reward == 1.0)
      assert t.outcome.correct == tokenizer.decode(t.tokens).endswith(f"#{t.problem.answer}$")


def test_credit_is_conserved(weighted_run):
  moved = 0
  for step in (1, 2, 3):
    for t in records(weighted_run, step):
      assert len(t.credit) == len(t.tokens)
      assert sum(t.credit) == pytest.approx(t.advantage * len(t.tokens), rel=1e-5, abs=1e-6)
      moved += len(set(t.credit)) > 1
  assert moved > 5


def test_advantages_are_reward_minus_the_others_mean(weighted_run):
  for group in groups(records(weighted_run, 2)):
    rewards = [t.outcome.reward for t in group]
    for t in group:
      assert t.advantage == pytest.approx(
        t.outcome.reward - (sum(rewards) - t.outcome.reward) / 3, abs=1e-6
      )


def test_metrics_agree_with_the_trajectories(weighted_run):
  lines = tiny.read_lines(weighted_run)
  assert [line["step"] for line in lines] == [0, 1, 2, 3]
  for step in (1, 2, 3):
    line, rows = lines[step], records(weighted_run, step)
    asked = [t for t in rows if t.review.status != "skipped"]
    assert all(
      len({t.outcome.reward for t in g}) > 1 or g[0].review.status == "skipped"
      for g in groups(rows)
    )
    assert line["train/reward"] == pytest.approx(np.mean([t.outcome.reward for t in rows]))
    assert line["train/accuracy"] == pytest.approx(np.mean([t.outcome.correct for t in rows]))
    assert line["train/truncated"] == pytest.approx(np.mean([t.outcome.truncated for t in rows]))
    assert line["train/length"] == pytest.approx(np.mean([len(t.tokens) for t in rows]))
    said = [[step.text for step in t.steps] for t in rows]
    again = [len(steps) - len(set(steps)) for steps in said]
    assert line["train/repeats"] == pytest.approx(np.mean(again))
    assert line["train/checks"] == 0
    assert line["train/mixed_groups"] == np.mean(
      [len({t.outcome.reward for t in g}) > 1 for g in groups(rows)]
    )
    assert line["train/completions"] == 16
    assert line["learner/tokens"] == sum(len(t.tokens) for t in rows)
    assert line["review/ok"] == 1
    assert line["review/asked"] == len(asked) / 16
    assert all(len(t.review.roles) == len(t.steps) for t in asked)
    roles = [role for t in asked for role in t.review.roles]
    assert line["review/necessary"] == pytest.approx(roles.count("necessary") / len(roles))
    assert sum(line[f"review/{role}"] for role in ROLES) == pytest.approx(1)
    assert line["credit/conservation_error"] < 1e-5
    assert line["sampler/logprob_error"] < 1e-4
    assert line["learner/grad_norm"] > 0
    assert line["learner/entropy"] > 0
    assert line["seconds/step"] >= max(
      line[f"seconds/{part}"] for part in ("sample", "review", "update")
    )
  assert lines[1]["learner/kl"] == pytest.approx(0, abs=1e-6)  # Still the reference itself.
  assert lines[3]["learner/kl"] > 0
  assert all(np.isfinite(value) for line in lines for value in line.values())


def test_the_first_and_the_last_policy_are_evaluated(weighted_run):
  lines = tiny.read_lines(weighted_run)
  assert [line["step"] for line in lines if "eval/greedy" in line] == [0, 3]
  for line in (lines[0], lines[3]):
    for name in ("greedy", "sampled", "pass@2", "maj@2"):
      assert 0 <= line[f"eval/{name}_low"] <= line[f"eval/{name}"] <= line[f"eval/{name}_high"] <= 1


def test_a_run_keeps_its_config_and_its_start(weighted_run):
  assert json.loads((weighted_run / "config.json").read_text())["credit"]["scheme"] == "weighted"
  assert (weighted_run / "start").is_dir()
  assert (weighted_run / "tokenizer" / "tokenizer.json").exists()
