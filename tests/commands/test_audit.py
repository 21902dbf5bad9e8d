"""`dca-jax audit`: a reviewer held against true labels, and the row that is left of it."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
import tiny
from etils import epath
from fake_server import FakeServer, honest_reply
from test_faults import SOLUTION

import dca_jax
from dca_jax.commands import audit, cli
from dca_jax.episode import Episode, Outcome, Problem, Review, Segment, Step
from dca_jax.store.trajectories import write_trajectories

LIMIT = 48
RIGHT = Outcome(1.0, True, False)


@pytest.fixture(scope="module", autouse=True)
def few_draws():
  """For the intervals of what a reviewer is worth, which take most of the time."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(audit, "_DRAWS", 2)
    yield


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> pathlib.Path:
  """An audit of the oracle on answers of the tiny policy; others read the same answers."""
  folder = tmp_path_factory.mktemp("audit")
  recipe = tiny.write_recipe(folder, {"credit.scheme": "weighted", "reviewer.name": "oracle"})
  arguments = ["audit", f"--config={recipe}", "--reviewer=oracle", f"--limit={LIMIT}"]
  assert cli.main([*arguments, f"--workdir={folder}/oracle"]) == 0
  return folder / "oracle"


def audited(start, workdir, reviewer: str, *more: str) -> dict:
  command = ["audit", f"--trajectories={start}/trajectories", f"--workdir={workdir}"]
  assert cli.main([*command, f"--reviewer={reviewer}", f"--limit={LIMIT}", *more]) == 0
  return read(workdir)


def read(workdir) -> dict:
  return json.loads((workdir / "audit.json").read_text())


def test_the_oracles_row_is_perfect_and_flat(start):
  row = read(start)
  assert row["version"] == 1
  assert (row["reviewer"], row["source"]) == ("oracle", "chains")
  assert row["n"] > LIMIT  # With the planted ones.
  for key in ("usable", "role_accuracy", "kappa", "first_error_f1", "errors_in_wins"):
    assert row[key] == row[f"{key}_high"] == 1.0, key
  assert row["verdict"] == "train"
  assert row["predicted_speedup_low"] > 2
  assert row["dollars_per_1000"] == 0
  assert all(isinstance(x, str | int | float | None) for x in row.values())


def test_answers_are_sampled_once_and_the_same_every_time(start, tmp_path, capsys):
  shards = {path: path.stat().st_mtime_ns for path in (start / "trajectories").iterdir()}
  recipe = start.parent / "recipe.py"
  command = ["audit", f"--config={recipe}", "--reviewer=oracle", f"--limit={LIMIT}"]
  before = read(start)
  assert cli.main([*command, f"--workdir={start}"]) == 0
  after = read(start)
  for row in (before, after):
    del row["seconds_per_1000"]
  assert after == before
  assert {p: p.stat().st_mtime_ns for p in (start / "trajectories").iterdir()} == shards
  out = capsys.readouterr().out
  assert "answers of chains" in out
  assert "verdict: train" in out
  # Another recipe does not get the answers of this one.
  assert cli.main([*command, f"--workdir={start}", "--config.rollout.temperature=0.7"]) == 1
  assert "rollout.temperature" in capsys.readouterr().err


def test_the_page_shows_the_worst_with_both_verdicts_and_no_markup_of_theirs(start, tmp_path):
  audited(start, tmp_path, "lexical")
  page = (tmp_path / "audit.html").read_text()
  assert "Worst judged" in page
  assert ", truly error" in page
  assert "<svg" in page
  assert page.count("<script") == 0
  assert "Worst judged" not in (start / "audit.html").read_text()  # The oracle's.


def test_a_noisy_reviewer_and_one_asked_twice(start, tmp_path):
  row = audited(start, tmp_path, "noisy", "--config.reviewer.flip=0.2", "--repeat=0.5")
  assert row["settings"] == "flip=0.2"
  assert row["role_accuracy_low"] < 0.8 < row["role_accuracy_high"]
  assert row["self_agreement"] == 1.0  # Its dice belong to the sample.
  assert row["predicted_speedup"] < read(start)["predicted_speedup"]
  assert audited(start, tmp_path / "silent", "silent")["verdict"] == "no"


def test_effects_of_steps_are_measured_by_the_policy_itself(start, tmp_path, capsys, monkeypatch):
  checks = ["--spot-checks=2", f"--limit={LIMIT}", "--reviewer=oracle"]
  command = ["audit", f"--config={start.parent}/recipe.py", *checks]
  assert cli.main([*command, f"--workdir={tmp_path}"]) == 0
  row = read(tmp_path)
  assert -1 <= row["effect_spearman_low"] < row["effect_spearman"] <= 1
  assert 0 <= row["effect_ceiling"] <= 1
  # They are kept with the answers, for other reviewers; also for one that gives values alone.
  other = audited(tmp_path, tmp_path / "random", "random")
  assert other["effect_spearman"] != row["effect_spearman"]
  assert other["effect_ceiling"] == row["effect_ceiling"]
  monkeypatch.setenv("GEMINI_API_KEY", "key")
  with FakeServer(reply=lambda data: {"chance": min(100, 25 * len(data["begun"]))}) as server:
    given = [f"--config.reviewer.client.{x}" for x in (f"base_url={server.url}", "level=values")]
    told = audited(tmp_path, tmp_path / "values", "gemini", *given, "--planted=0")
  assert told["usable"] == 1
  assert told["settings"] == "client.level=values"
  assert -1 <= told["effect_spearman"] <= 1
  assert told["role_accuracy"] is None
  # Not where there is no policy, and not for answers that were sampled without.
  for where in (f"--trajectories={start}/trajectories", f"--config={start.parent}/recipe.py"):
    assert cli.main(["audit", where, *checks, f"--workdir={start}"]) == 1
    assert "--spot-checks=2" in capsys.readouterr().err.splitlines()[-1]


def test_from_python_it_is_the_same_row(start, tmp_path):
  given = {"trajectories": f"{start}/trajectories", "limit": LIMIT}
  row = dca_jax.audit("lexical", tmp_path, **given).row
  assert row == read(tmp_path)
  assert row["verdict"] == "no"
  with pytest.raises(dca_jax.UserError, match="one of config, trajectories"):
    dca_jax.audit("lexical", tmp_path)
  values = ["--config.reviewer.client.level=values"]
  with pytest.raises(dca_jax.UserError, match="--spot-checks"):
    dca_jax.audit("gemini", tmp_path, settings=values, **given)


def test_a_model_is_paid_for_once_and_its_costs_are_told(start, tmp_path, monkeypatch):
  monkeypatch.setenv("GEMINI_API_KEY", "key")
  with FakeServer(reply=lambda data: honest_reply(data, role="error")) as server:
    given = [f"--config.reviewer.client.base_url={server.url}"]
    model = "gemini:gemini-3.5-flash"
    # First there is money for some of them; a call reserves about two cents.
    poor = audited(start, tmp_path, model, *given, "--config.reviewer.client.max_dollars=0.05")
    assert 0 < poor["usable"] < 1
    paid = len(server.requests)
    rich = audited(start, tmp_path, model, *given, "--config.reviewer.client.max_dollars=10")
    assert rich["usable"] == 1
    bodies = [json.dumps(r["body"]["contents"]) for r in server.requests[1:]]
    assert len(set(bodies)) == len(bodies) > paid  # The first was the trial.
    again = audited(start, tmp_path, model, *given)
    assert len(server.requests) == 1 + len(bodies)
  assert rich["recall_error"] == again["recall_error"] == 1.0
  assert rich["recall_necessary"] == 0.0
  assert rich["tokens_per_1000"] == 610_000  # With ten of thought
  assert again["tokens_per_1000"] is None
  assert rich["dollars_per_1000"] == again["dollars_per_1000"] > 0
  assert rich["model"]


def test_roles_that_cannot_be_used_are_not_made_good_by_values():
  whole = Review("ok", ("error",), (1.0,), values=(0.5,))
  assert audit._told(whole)
  assert audit._told(dataclasses.replace(whole, roles=(), weights=()))
  assert not audit._told(dataclasses.replace(whole, weights=(float("nan"),)))


def test_costs_are_those_of_a_review_and_not_of_a_call():
  stats = {"review/calls": 60.0, "review/prompt_tokens": 3000.0, "review/output_tokens": 600.0}
  shares = {"review/status_ok": 0.75, "review/cached": 0.25, "review/dollars_spent": 0.4}
  said = audit.costs(stats | shares, 40, 10.0)
  assert (said["tokens_per_1000"], said["seconds_per_1000"]) == (180_000, 500.0)
  assert said["dollars_per_1000"] == 10.0
  again = audit.costs(dict.fromkeys(stats, 0.0) | {"review/cached": 1.0}, 40, 1.0)
  assert again["tokens_per_1000"] is again["seconds_per_1000"] is None


def test_one_kind_of_mistake_is_worse_than_many_of_all_kinds(start, tmp_path):
  """On the tiny task nearly nothing repeats, so the kind that is applauded here is another one."""
  noisy = audited(start, tmp_path / "noisy", "noisy", "--config.reviewer.flip=0.2")
  recipe = f"{tmp_path}/likes.py"
  pathlib.Path(recipe).write_text(LIKES)
  liked = audited(start, tmp_path / "liked", f"{recipe}:Likes")
  assert liked["role_accuracy"] == pytest.approx(1 - 1 / 4, abs=0.2)
  assert liked["applause_distractor"] == 3.0
  assert liked["predicted_speedup"] < 1 < noisy["predicted_speedup"]
  assert liked["verdict"] == "calibrated"


LIKES = '''
import dataclasses

from dca_jax.review import Review
from dca_jax.review.builtin import Oracle


@dataclasses.dataclass(frozen=True)
class Likes(Oracle):
  """Applauds what has nothing to do with the question."""

  name: str = "likes"

  def distort(self, request, review):
    liked = [role == "irrelevant" for role in review.roles]
    roles = tuple("necessary" if x else r for x, r in zip(liked, review.roles))
    return Review("ok", roles, tuple(3.0 if x else 1.0 for x in liked))
'''


@pytest.mark.parametrize(
  ("arguments", "part"),
  [
    (["--reviewer=oracle"], None),
    (["--reviewer=oracle", "--trajectories=/nowhere/trajectories"], "holds no run"),
    (["--reviewer=oracel", "--trajectories={start}/trajectories"], "oracel"),
    (["--reviewer=none", "--trajectories={start}/trajectories"], "choose a reviewer"),
    (["--reviewer=oracle", "--trajectories={start}/trajectories", "--limit=0"], "--limit"),
    (["--reviewer=oracle", "--config=/nowhere.py"], "no such file"),
    (["--reviewer=noisy", "--trajectories={start}/trajectories", "--config.reviewer.flp=1"], "flp"),
  ],
)
def test_mistakes_end_in_one_line(start, tmp_path, capsys, arguments, part):
  command = ["audit", f"--workdir={tmp_path}/w", *(a.format(start=start) for a in arguments)]
  if part is None:  # The parser's own complaint.
    with pytest.raises(SystemExit):
      cli.main(command)
    assert "required" in capsys.readouterr().err
    return
  assert cli.main(command) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("dca-jax: error: ")
  assert part in line


def test_a_task_without_true_roles_needs_right_answers(start, tmp_path, capsys):
  rows = "".join(f'{{"question": "{i} + 1?", "answer": "{i + 1}"}}\n' for i in range(9))
  (tmp_path / "rows.jsonl").write_text(rows)
  task = {"name": "jsonl", "path": f"{tmp_path}/rows.jsonl", "heldout_fraction": 0.3}
  run = tmp_path / "run"
  shutil.copytree(start / "trajectories", run / "trajectories")
  (run / "config.json").write_text(json.dumps({"task": task | {"tokenizer": "x"}}))
  command = ["audit", f"--trajectories={run}/trajectories", f"--workdir={tmp_path}/w"]
  assert cli.main([*command, "--reviewer=random", "--planted=0"]) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert "knows no true roles" in line


PROSE = """
import dataclasses

import test_faults
from dca_jax.review import Review, ReviewerConfig


@dataclasses.dataclass(frozen=True)
class Prose(ReviewerConfig):
  likes: str = "nothing"

  def review(self, request):
    roles = test_faults.honest(request).roles
    liked = [self.likes in step.lower() for step in request.steps]
    roles = tuple("necessary" if x else role for x, role in zip(liked, roles))
    return Review("ok", roles, tuple(3.0 if x else 1.0 for x in liked))
"""


def write_prose(folder: pathlib.Path) -> None:
  """A run of a task without labels, whose answers are all right."""
  episodes = []
  for i in range(40):
    steps = tuple(Step(k, k + 1, text) for k, text in enumerate(SOLUTION))
    tokens = Segment(np.arange(5, dtype=np.int32), True, np.zeros(5, np.float32))
    episode = Episode(f"1/{i}/0", Problem(i, f"problem {i}", "28"), (tokens,), RIGHT, steps)
    episodes.append(dataclasses.replace(episode, credit=[0.0] * 5))
  write_trajectories(epath.Path(folder / "trajectories"), 1, 0, episodes)
  task = {"name": "jsonl", "path": "rows.jsonl", "heldout_fraction": 0.3, "tokenizer": "x"}
  (folder / "config.json").write_text(json.dumps({"task": task}))


def test_prose_without_labels_is_judged_by_what_was_planted(tmp_path):
  write_prose(tmp_path)
  (tmp_path / "prose.py").write_text(PROSE)
  reviewer = f"{tmp_path}/prose.py:Prose"
  honest = audited(tmp_path, tmp_path / "honest", reviewer)
  assert honest["source"] == "jsonl"
  assert honest["planted_wrong_number"] == honest["planted_check"] == 1.0
  assert honest["premium_check"] == pytest.approx(0.0, abs=1e-6)
  assert honest["verdict"] == "train"
  fooled = audited(tmp_path, tmp_path / "fooled", reviewer, "--config.reviewer.likes=check")
  assert fooled["premium_check_low"] > 0.1  # One tier of three has the word.
  assert fooled["verdict"] == "calibrated"


@pytest.mark.slow
def test_a_killed_audit_pays_for_nothing_twice(start, tmp_path):
  with FakeServer(latency=0.05) as server:
    arguments = (
      "audit",
      f"--trajectories={start}/trajectories",
      f"--workdir={tmp_path}",
      f"--limit={LIMIT}",
      "--reviewer=gemini:gemini-3.5-flash",
      f"--config.reviewer.client.base_url={server.url}",
      "--config.reviewer.client.concurrency=1",
    )
    environment = {"GEMINI_API_KEY": "key"}
    first = tiny.start(*arguments, environment=environment)
    tiny.wait_until(lambda: len(server.requests) > 20, first)
    first.kill()
    first.wait()
    second = tiny.start(*arguments, environment=environment)
    out, error = second.communicate(timeout=300)
    assert second.returncode == 0, error
  bodies = [json.dumps(r["body"]["contents"]) for r in server.requests[1:]]
  assert len(set(bodies)) >= len(bodies) - 1  # But for the one that was under way.
  assert "verdict" in out
  assert read(tmp_path)["usable"] == 1
