"""A language model is asked one real question before anything costs device time."""

import json

import pytest
import tiny
from fake_server import FakeServer, asked_for

from dca_jax import run as run_module
from dca_jax.commands import cli

MODELS = ("gemini:gemini-3.5-flash-lite", "gemini:gemini-3.5-flash")


@pytest.fixture(autouse=True)
def key(monkeypatch):
  monkeypatch.setenv("GEMINI_API_KEY", "secret-key-1234567890")


def train(folder, server, **changes) -> int:
  settings = {
    "steps": 1,
    "credit.scheme": "weighted",
    "reviewer.name": "gemini",
    "reviewer.client.base_url": server.url,
    **{key.replace("__", "."): value for key, value in changes.items()},
  }
  recipe = tiny.write_recipe(folder, settings)
  return cli.main(["train", f"--config={recipe}", f"--workdir={folder / 'run'}"])


def planted(request) -> bool:
  body = request["body"]
  text = (
    body["messages"][1]["content"]
    if "messages" in body
    else body["contents"][0]["parts"][0]["text"]
  )
  return "red balls" in asked_for(text)["problem"]


def error(capsys) -> str:
  line = capsys.readouterr().err.splitlines()[-1]
  assert line.startswith("dca-jax: error: no usable review")
  return line


@pytest.mark.parametrize(
  ("name", "fault", "reason"),
  [
    ("gemini", "dead", "connection"),
    ("openai", "dead", "connection"),
    ("gemini", 401, "401"),
    ("openai", 404, "404"),
    ("openai", "html", "malformed"),
    ("gemini", "malformed", "malformed"),
    ("openai", "drop", "connection"),
    ("gemini", "safety", "blocked"),
  ],
)
def test_who_gives_no_usable_review_ends_the_run_before_it_costs_anything(
  name, fault, reason, tmp_path, capsys
):
  with FakeServer(lambda *_: fault) as server:
    if fault == "dead":
      server._server.shutdown()
      server._server.server_close()
    base = server.url + ("/v1" if name == "openai" else "")
    assert train(tmp_path, server, reviewer__name=name, reviewer__client__base_url=base) == 1
    assert len(server.requests) <= 5
  line = error(capsys)
  assert server.url.removeprefix("http://") in line
  assert reason in line
  assert "secret" not in line
  # No policy was made or loaded.
  assert not (tmp_path / "run" / "start").exists()
  assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_overloaded_server_may_come_back_for_a_while(tmp_path, capsys, monkeypatch):
  with FakeServer(lambda name, attempt: (503, 429, "drop", "ok")[min(attempt, 3)]) as server:
    assert train(tmp_path, server) == 0
    assert [planted(request) for request in server.requests][:5] == [True] * 4 + [False]
  out = capsys.readouterr().out
  assert (
    f"gemini-fake-001 at {server.url.removeprefix('http://')} reviewed a planted answer in" in out
  )
  assert "1 of 3 roles as expected" in out
  monkeypatch.setattr(run_module, "_TRIAL_SECONDS", 1.0)
  with FakeServer(lambda *_: 503) as server:
    (tmp_path / "other").mkdir()
    assert train(tmp_path / "other", server) == 1
  assert "503" in error(capsys)


def test_the_question_is_paid_for_out_of_the_cap_and_asked_at_every_start(tmp_path, capsys):
  with FakeServer() as server:
    assert train(tmp_path, server) == 0
    paid = len(server.requests)
    assert tiny.read_lines(tmp_path / "run")[-1]["review/dollars_spent"] == pytest.approx(
      paid * 0.000425
    )
    assert "for $0.0004" in capsys.readouterr().out
    assert train(tmp_path, server, steps=2) == 0
    assert planted(server.requests[paid])
    paid = len(server.requests)
    assert train(tmp_path, server, steps=2) == 0  # There is nothing left to review.
    assert len(server.requests) == paid
  with FakeServer() as server:
    (tmp_path / "poor").mkdir()
    assert train(tmp_path / "poor", server, reviewer__client__max_dollars=0.001) == 0
    assert not server.requests
  assert "was not asked: reviewer.client.max_dollars" in capsys.readouterr().out


def test_a_run_may_begin_without_its_reviewer(tmp_path, capsys):
  with FakeServer(lambda *_: 404) as server:
    assert train(tmp_path, server, reviewer__required=False) in (0, 1)  # Later refusals may end it.
  warning = capsys.readouterr().err.splitlines()[0]
  assert warning.startswith(
    f"warning: no usable review from {server.url.removeprefix('http://')} (client_error: 404"
  )
  assert (tmp_path / "run" / "start").exists()


def test_a_mistyped_address_is_corrected_in_the_same_workdir(tmp_path, capsys):
  with FakeServer() as server:
    assert train(tmp_path, server, reviewer__client__base_url="http://localhost:1") == 1
    assert "localhost:1 (connection: " in error(capsys)
    assert train(tmp_path, server) == 0
    assert train(tmp_path, server, steps=2, reviewer__client__base_url="http://localhost:1") == 1
  assert "holds a different run: reviewer.client.base_url was" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("changes", "part"),
  [
    (
      {"reviewer__client__rubric": "/nowhere/rubric.txt"},
      "reviewer.client.rubric: cannot read /nowhere",
    ),
    ({"reviewer__client__model": "gemini-99"}, "no price is known for 'gemini-99'"),
    ({"reviewer__client__base_url": "localhost:8000/v1"}, "must begin with http:// or https://"),
    ({"reviewer__client__base_url": "http://"}, "must begin with http:// or https://"),
    ({"reviewer__client__base_url": "http://[::1"}, "must begin with http:// or https://"),
  ],
)
def test_what_is_wrong_with_the_settings_is_said_before_that(changes, part, tmp_path, capsys):
  with FakeServer() as server:
    assert train(tmp_path, server, **changes) == 1
    assert not server.requests
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("dca-jax: error: ")
  assert part in line
  assert not (tmp_path / "run" / "start").exists()


@pytest.mark.parametrize(
  "how", [{"reviewer__name": "panel", "reviewer__panel": MODELS}, {"reviewer__escalate": MODELS[1]}]
)
def test_every_member_is_asked(how, tmp_path, capsys):
  class Half(FakeServer):
    def _answer(self, handler, body):
      if "gemini-3.5-flash:" in handler.path:
        self._send(handler, 404, b"{}")
      else:
        super()._answer(handler, body)

  with Half() as server:
    assert train(tmp_path, server, **how) == 1
    assert {request["path"].split("/")[-1].split(":")[0] for request in server.requests} == {
      model.partition(":")[2] for model in MODELS
    }
  assert "404" in error(capsys)


def test_a_review_command_without_a_usable_review_fails_and_says_why(tmp_path, capsys):
  recipe = tiny.write_recipe(tmp_path, {"steps": 1})
  assert cli.main(["train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}"]) == 0
  command = [
    "review",
    f"--trajectories={tmp_path / 'run'}/trajectories",
    "--reviewer=gemini",
    "--limit=4",
  ]
  for fault, reason in ((503, "503"), ("safety", "blocked")):
    with FakeServer(lambda *_, f=fault: f) as server:
      address = f"--config.reviewer.client.base_url={server.url}"
      assert cli.main([*command, address, "--config.reviewer.client.attempts=1"]) == 1
    line = error(capsys)
    assert "no usable review of 4 (4 " in line
    assert server.url.removeprefix("http://") in line
    assert reason in line
  assert not list((tmp_path / "run").glob("rereview*"))


def test_failures_are_told_with_their_host_and_reason(tmp_path, capsys):
  with FakeServer(lambda *_: "ok") as server:
    server.behave = lambda name, attempt: "ok" if planted(server.requests[-1]) else "safety"
    assert train(tmp_path, server, steps=2) == 0
  errors = capsys.readouterr().err
  warning, last = [line for line in errors.splitlines() if line.startswith("warning:")]
  assert "no review of 2 steps was usable" in last
  assert f"reviews failed at {server.url.removeprefix('http://')} (blocked: " in warning
  assert (
    json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["review/ok"] == 0
  )
