"""`dca-jax review`: stored trajectories read by another reviewer."""

import collections
import contextlib
import itertools
import json
import re
import types

import pytest
import tiny
from fake_server import FakeServer, honest_reply

from dca_jax.commands import cli
from dca_jax.commands.review import agreement, estimate, review_patiently
from dca_jax.errors import UserError
from dca_jax.loop import train
from dca_jax.review import REVIEWERS, Request, Review, Truth, open_reviewer
from dca_jax.review.client_config import ClientConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  changes = {"credit.scheme": "signed", "reviewer.name": "oracle"}
  train(tiny.make_config(changes), str(workdir), quiet=True)
  return workdir


def test_the_oracle_agrees_with_itself_and_the_noisy_one_less(run, capsys):
  for name, least, most in (("oracle", 1.0, 1.0), ("noisy", 0.5, 0.85)):
    assert cli.main(["review", f"--trajectories={run}/trajectories", f"--reviewer={name}"]) == 0
    out = capsys.readouterr().out
    count = int(out.split()[0])
    assert f"{count} completions: {count} ok" in out
    assert 30 < count <= 48  # Completions of a single step were not reviewed.
    assert least <= float(out.split("same role in ")[1].split()[0]) <= most
    lines = [json.loads(line) for line in (run / f"rereview_{name}.jsonl").read_text().splitlines()]
    assert len(lines) == count
    assert all(line["review"] == "ok" for line in lines)


def test_another_model_is_asked_once(run, capsys, monkeypatch):
  monkeypatch.setenv("GEMINI_API_KEY", "key")
  with FakeServer(reply=lambda data: honest_reply(data, role="redundant")) as server:
    command = [
      "review",
      f"--trajectories={run}/trajectories",
      "--reviewer=gemini:gemini-3.5-flash",
      "--limit=20",
    ]
    command += [f"--config.reviewer.client.base_url={server.url}"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "20 completions: 20 ok" in out
    assert "spent: $0.0" in out
    calls = len(server.requests)
    assert 0 < calls <= 20
    assert cli.main(command) == 0
    assert "spent: $0.0000" in capsys.readouterr().out
    assert len(server.requests) == calls


def test_an_outage_is_outlasted(monkeypatch):
  monkeypatch.setenv("GEMINI_API_KEY", "key")
  calls = itertools.count()
  with FakeServer(lambda *_: 503 if next(calls) < 50 else "ok") as server:
    client = ClientConfig(base_url=server.url, attempts=1)
    config = REVIEWERS["gemini"](client=client)
    asked = [Request(f"1/{i}", f"problem {i}", ("a;", "b"), True, False) for i in range(100)]
    with contextlib.closing(open_reviewer(config, Truth(None, None), None)) as reviewer:
      reviews = review_patiently(reviewer, asked, 60.0, pause=0.05)
  counts = collections.Counter(review.status for review in reviews)
  assert counts["server_error"] <= 50
  assert counts["server_error"] + counts["ok"] == 100


def test_estimate_calls_nobody(run, capsys):
  command = [
    "review",
    f"--trajectories={run}/trajectories",
    "--reviewer=gemini:gemini-3.5-flash-lite",
    "--estimate",
  ]
  assert cli.main(command) == 0
  out = capsys.readouterr().out
  assert "1,000 reviews with gemini-3.5-flash-lite: about $" in out
  assert "3 steps of 16 completions" in out


def test_kept_instructions_are_estimated_at_the_price_of_cached_tokens(run, tmp_path):
  (tmp_path / "rubric.txt").write_text("Judge well. " * 3000)  # 9,000 tokens.
  settings = [f"--config.reviewer.client.rubric={tmp_path}/rubric.txt"]

  def each(*more):
    told = estimate(f"{run}/trajectories", "gemini:gemini-3.5-flash-lite", 8, [*settings, *more])
    return float(re.search(r"1,000 reviews .* \$([\d.]+)", told)[1])

  saved = each() - each("--config.reviewer.client.keep_instructions=true")
  assert saved == pytest.approx(1000 * 9147 * (0.30 - 0.03) / 1e6, rel=0.02)
  with pytest.raises(UserError, match=r"keep_instructions: .*tier is 'flex'"):
    each("--config.reviewer.client.keep_instructions=true", "--config.reviewer.client.tier=flex")


def test_agreement_by_hand(run):
  stored = types.SimpleNamespace(
    review=Review("ok", ("error", "necessary", "necessary"), (1.0,) * 3)
  )
  same = Review("ok", ("error", "necessary", "necessary", "error"), (1.0,) * 4)
  assert "same role in 1.000 of 3 steps; kappa 1.000" in agreement([stored], [same])
  blind = Review("ok", ("necessary",) * 4, (1.0,) * 4)
  assert "same role in 0.667 of 3 steps; kappa 0.000" in agreement([stored], [blind])
  assert agreement([stored], [Review("timeout")]) == "no step was reviewed both times"


@pytest.mark.parametrize(
  ("arguments", "part"),
  [
    (["--trajectories=/nowhere", "--reviewer=oracle"], "no trajectories"),
    (["--trajectories={}/trajectories", "--reviewer=oracel"], "oracel"),
    (["--trajectories={}/trajectories", "--reviewer=openai:m"], "base_url"),
    (
      ["--trajectories={}/trajectories", "--reviewer=oracle", "--config.reviewer.clint=1"],
      "reviewer.clint",
    ),
  ],
)
def test_mistakes_end_in_one_line(run, capsys, arguments, part):
  assert cli.main(["review", *(a.format(run) for a in arguments)]) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("dca-jax: error: ")
  assert part in line
