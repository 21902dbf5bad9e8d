"""Whole runs with a language model as reviewer: the real SDK, a server on the loopback."""

import shutil

import pytest
import tiny
from fake_server import FakeServer, honest_reply

from dca_jax import run as run_module
from dca_jax.errors import UserError
from dca_jax.loop import train
from dca_jax.store.trajectories import read_trajectories

SECRET = "secret-key-1234567890"


@pytest.fixture(autouse=True)
def key(monkeypatch):
  monkeypatch.setenv("GEMINI_API_KEY", SECRET)


def by_length(data):
  """A reviewer with an opinion: short answers owe it to their first step,
  long ones to their last."""
  reply = honest_reply(data, weight=1)
  for answer in reply["answers"]:
    answer["steps"][0 if len(answer["steps"]) % 2 else -1]["weight"] = 4
  return reply


def config(server, **changes):
  return tiny.make_config(
    {
      "credit.scheme": "weighted",
      "reviewer.name": "gemini",
      "reviewer.client.base_url": server.url,
      "warmstart.steps": 60,
      "steps": 4,
      **changes,
    }
  )


@pytest.mark.parametrize(
  "overlap", [{}, {"reviewer.overlap": 1, "learner.loss": "ppo"}], ids=["waiting", "overlap"]
)
def test_a_run_that_begins_again_pays_nothing_again_and_ends_the_same(overlap, tmp_path):
  with FakeServer(reply=by_length) as server:
    train(config(server, **overlap), str(tmp_path / "run"), quiet=True)
    paid, state = len(server.requests), tiny.saved_state(tmp_path / "run")
    assert paid > 4
    reviewed = [
      t for step in (1, 2, 3, 4) for t in read_trajectories(tmp_path / "run" / "trajectories", step)
    ]
    assert {t.review.model for t in reviewed if t.review.status == "ok"} == {"gemini-fake-001"}
    assert any(len(set(t.credit)) > 1 for t in reviewed)
    for name in ("checkpoints", "metrics.jsonl", "trajectories"):
      path = tmp_path / "run" / name
      shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(config(server, **overlap), str(tmp_path / "run"), quiet=True)
    assert len(server.requests) == paid + 1  # The first question, whose answer no cache may give.
    tiny.assert_same_arrays(tiny.saved_state(tmp_path / "run"), state)
    lines = tiny.read_lines(tmp_path / "run")
    assert lines[-1]["review/dollars_spent"] > 0
    assert sum(line.get("review/dollars", 0) for line in lines) == pytest.approx(0.000425)


@pytest.mark.parametrize("fault", ["safety", "malformed", "hang"])
def test_when_every_review_fails_the_run_is_grpo_bit_for_bit(fault, tmp_path, monkeypatch):
  monkeypatch.setattr(run_module, "_TRIAL_SECONDS", 0.5)
  plain = {"credit.scheme": "uniform", "reviewer.name": "none", "reviewer.client.base_url": ""}
  with FakeServer(lambda *_: fault, reply=by_length) as server:
    begin = {"reviewer.required": False}
    failing = (
      {"reviewer.deadline": 0.3} if fault == "hang" else {"reviewer.client.min_ok_frac": 0.0}
    )
    train(config(server, **begin, **failing), str(tmp_path / "failing"), quiet=True)
    assert server.requests
    train(config(server, **plain), str(tmp_path / "uniform"), quiet=True)
  failed = tiny.saved_state(tmp_path / "failing")
  # What the guard keeps is all that such a run has beside the other one.
  failed = {key: x for key, x in failed.items() if not key.startswith("['credit'][0]")}
  tiny.assert_same_arrays(failed, tiny.saved_state(tmp_path / "uniform"))
  assert tiny.read_lines(tmp_path / "failing")[-1]["review/ok"] == 0


def test_a_refused_key_ends_the_run_in_a_sentence(tmp_path):
  with (
    FakeServer(lambda *_: 403) as server,
    pytest.raises(UserError, match=r"refuses every call .403.*step \d is safe") as raised,
  ):
    train(config(server, **{"reviewer.required": False}), str(tmp_path), quiet=True)
  assert SECRET not in str(raised.value)
  assert not [p for p in tmp_path.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]


def test_a_strict_run_ends_where_the_reviewer_is_not_called_any_more(tmp_path):
  strict = {"reviewer.client.strict": True, "reviewer.client.min_ok_frac": 0.0, "steps": 12}
  strict |= {"reviewer.required": False}  # The quota was used up before the run began.
  with (
    FakeServer(lambda *_: "quota") as server,
    pytest.raises(UserError, match=r"last 5 steps, and made no call.*step \d+ is safe"),
  ):
    train(config(server, **strict), str(tmp_path), quiet=True)
  waited = [line["seconds/review"] for line in tiny.read_lines(tmp_path)[2:]]
  assert max(waited) < 20  # Of a deadline of 60.


@pytest.mark.parametrize("name", ["gemini", "openai"])
def test_a_model_gives_values_of_prefixes_to_potential_credit(name, tmp_path, monkeypatch):
  monkeypatch.setenv("OPENAI_API_KEY", SECRET)
  with FakeServer(reply=lambda data: {"chance": 10 * len(data["begun"])}) as server:
    own = {"gemini": {}, "openai": {"reviewer.client.max_dollars": 0.0}}[name]
    own |= {"reviewer.client.base_url": server.url + "/v1" * (name == "openai")}
    chosen = {"credit.scheme": "potential", "reviewer.name": name, "steps": 2}
    train(config(server, **chosen, **own), str(tmp_path), quiet=True)
  told = [t for step in (1, 2) for t in read_trajectories(tmp_path / "trajectories", step)]
  valued = [t for t in told if t.review.status == "ok"]
  assert valued
  for t in valued:
    assert t.values == pytest.approx([k / 10 for k in range(len(t.steps))])
  assert any(len(set(t.credit)) > 1 for t in valued)
