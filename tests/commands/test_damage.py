"""Whatever file of a workdir is damaged, gone or of another version: a sentence,
and what can go on goes on."""

import json
import os
import pathlib
import shutil

import hypothesis
import hypothesis.strategies as st
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from dca_jax.commands import cli
from dca_jax.loop import train

CHANGES = {"credit.scheme": "weighted", "reviewer.name": "oracle"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp("finished") / "run"
  train(tiny.make_config(CHANGES), str(workdir), quiet=True)
  return workdir


@pytest.fixture
def run(finished, tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(finished, tmp_path / "run"))


def command(run: pathlib.Path, name: str) -> list[str]:
  return {
    "status": ["status", f"--workdir={run}"],
    "report": ["report", f"--workdir={run}"],
    "review": ["review", f"--trajectories={run}/trajectories", "--reviewer=oracle", "--limit=5"],
    "estimate": [
      "review",
      f"--trajectories={run}/trajectories",
      "--reviewer=gemini:gemini-3.5-flash",
      "--estimate",
    ],
    "export": ["export", f"--workdir={run}", f"--output={run}/model"],
  }[name]


def call(capsys, *arguments: str) -> tuple[int, list[str]]:
  """The exit status of a command, and its lines on stderr, each of which is a warning
  or the error."""
  capsys.readouterr()
  status = cli.main(arguments)
  said = capsys.readouterr().err.splitlines()
  assert all(line.startswith(("warning: ", "dca-jax: error: ")) for line in said), said
  assert (status == 1) == any(line.startswith("dca-jax: error: ") for line in said)
  return status, said


# One file damaged, and every command that reads.

JUNK = st.sampled_from(
  [
    b"",
    b"\0" * 64,
    b"\xff\xfe{",
    b"[]",
    b"null",
    b'"x"',
    b"{}",
    b"\n",
    b"[" * 5000,
    b"1e999",
    b"NaN",
  ]
)
VALUES = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(-(2**70), 2**70),
  st.floats(),
  st.text(),
  st.just([]),
  st.just({}),
)


@st.composite
def damages(draw):
  """A function that damages the bytes of a file: cut, overwritten, or valid JSON
  that says something else."""
  kind, where, junk, value = (
    draw(st.sampled_from("cjlkv")),
    draw(st.floats(0, 1)),
    draw(JUNK),
    draw(VALUES),
  )

  def damage(data: bytes) -> bytes:
    at = int(where * len(data))
    if kind == "c":
      return data[:at]
    if kind == "j":
      return data[:at] + junk + data[at + len(junk) :]
    lines = data.splitlines() if b"}\n{" in data else [data]
    row = int(where * (len(lines) - 1))
    if kind == "l":
      lines[row] = junk
    else:
      told = json.loads(lines[row])
      places = [(told, key) for key in told]
      places += [
        (inner, key) for inner in told.values() if isinstance(inner, dict) for key in inner
      ]
      places += [
        (x, key)
        for inner in told.values()
        if isinstance(inner, list)
        for x in inner
        if isinstance(x, dict)
        for key in x
      ]
      place, key = places[int(where * (len(places) - 1))]
      place[key] = value
      if kind == "k":
        place["new"] = place.pop(key)
      lines[row] = json.dumps(told).encode()
    return b"\n".join(lines) + b"\n"

  return damage


READ_BY = {
  "config.json": ["status", "report", "review", "estimate", "export"],
  "metrics.jsonl": ["status", "report"],
  "trajectories/step_000001.jsonl": ["report", "review"],
  "trajectories/step_000003.jsonl": ["report", "review"],
}
EXAMPLES = int(os.environ.get("DCA_JAX_FUZZ", "20"))  # More, by hand.


@hypothesis.settings(
  max_examples=EXAMPLES,
  deadline=None,
  derandomize=EXAMPLES == 20,
  suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(st.sampled_from([*READ_BY]), damages())
def test_any_damage_ends_in_sentences(finished, capsys, file, damage):
  path = finished / file
  whole = path.read_bytes()
  try:
    path.write_bytes(damage(whole))
    for name in READ_BY[file]:
      status, _ = call(capsys, *command(finished, name))
      assert status in (0, 1)
  finally:
    path.write_bytes(whole)


@pytest.mark.parametrize("name", ["status", "report", "review", "export"])
def test_a_cut_config_is_named_with_its_line(capsys, run, name):
  text = (run / "config.json").read_text()
  (run / "config.json").write_text(text[: len(text) // 2])
  status, (said,) = call(capsys, *command(run, name))
  assert status == 1
  assert f"{run / 'config.json'}, line " in said


def test_a_config_of_another_version(capsys, run):
  saved = json.loads((run / "config.json").read_text())
  saved["learner"]["gone"] = 1
  del saved["rollout"]["group"]
  (run / "config.json").write_text(json.dumps(saved))
  for name in ("status", "report", "review"):
    assert call(capsys, *command(run, name)) == (0, [])
  status, (said,) = call(capsys, *command(run, "export"))
  assert status == 1
  assert "is not of this version of dca-jax: learner.gone: no such key" in said


@pytest.mark.parametrize(
  "names", [["step_000001.jsonl"], ["step_000001.jsonl", "step_000002.jsonl", "step_000003.jsonl"]]
)
def test_trajectories_that_are_gone(capsys, run, names):
  for name in names:
    (run / "trajectories" / name).unlink()
  assert call(capsys, *command(run, "report")) == (0, [])
  text = (run / "report.html").read_text()
  assert text.count("The trajectories of this step are not in") == min(2, len(names))
  status, said = call(capsys, *command(run, "review"))
  assert (status, len(said)) == ((1, 1) if len(names) == 3 else (0, 0))


def test_damaged_trajectories_are_named_with_their_line(capsys, run):
  path = run / "trajectories" / "step_000001.jsonl"
  lines = path.read_text().splitlines()
  path.write_text(
    "\n".join([lines[0], lines[1][:30], *lines[2:-1], lines[-1].replace('"credit"', '"credits"')])
    + "\n"
  )
  (run / "trajectories" / "step_x.jsonl").write_text("{}")
  for name in ("report", "review"):
    status, (said,) = call(capsys, *command(run, name))
    assert status == 0
    assert said.startswith(f"warning: {path}, line 2 is damaged (")
    assert said.endswith("; so are 1 more")


# A run that goes on.


def resume(capsys, run: pathlib.Path, tmp_path: pathlib.Path, *more: str) -> tuple[int, list[str]]:
  return call(
    capsys, "train", f"--config={tiny.write_recipe(tmp_path, CHANGES)}", f"--workdir={run}", *more
  )


@pytest.fixture(scope="module")
def longer(tmp_path_factory) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp("longer") / "run"
  train(tiny.make_config({**CHANGES, "steps": 4}), str(workdir), quiet=True)
  return workdir


def halve(folder: pathlib.Path) -> None:
  """Cuts every file that holds arrays in half."""
  for path in folder.rglob("d/*"):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def fresh(folder: pathlib.Path) -> pathlib.Path:
  shutil.rmtree(folder)
  return folder


@pytest.mark.parametrize(
  ("damage", "said"),
  [
    (lambda run: (run / "config.json").unlink(), ["config.json is gone; it is written anew"]),
    (
      lambda run: (run / "config.json").write_text('{"seed": 0'),
      ["config.json, line 1 is damaged"],
    ),
    (lambda run: (run / "metrics.jsonl").unlink(), ["metrics.jsonl does not tell of steps 0 to 3"]),
    (lambda run: shutil.rmtree(run / "trajectories"), []),
    (lambda run: shutil.rmtree(run / "tokenizer"), []),
    (lambda run: (run / "tokenizer" / "tokenizer.json").write_text("{"), []),
    (lambda run: shutil.rmtree(run / "start"), []),
    (lambda run: halve(run / "start"), ["start is damaged ("]),
    (
      lambda run: shutil.copytree(run / "checkpoints" / "3" / "state", fresh(run / "start")),
      ["start is damaged ("],
    ),
    (lambda run: shutil.rmtree(run / "tensorboard"), []),
  ],
)
def test_a_run_goes_on_without_it(capsys, run, tmp_path, longer, damage, said):
  damage(run)
  status, lines = resume(capsys, run, tmp_path, "--config.steps=4")
  assert status == 0
  assert len(lines) == len(said)
  assert all(part in line for part, line in zip(said, lines, strict=True))
  tiny.assert_same_arrays(tiny.saved_state(run), tiny.saved_state(longer))
  assert json.loads((run / "config.json").read_text())["steps"] == 4
  assert tiny.timeless(tiny.read_lines(run)[-1]) == tiny.timeless(tiny.read_lines(longer)[-1])


def test_a_later_score_never_stands_as_the_first(capsys, run, tmp_path):
  (run / "metrics.jsonl").unlink()
  assert resume(capsys, run, tmp_path, "--config.steps=4")[0] == 0
  assert [line["step"] for line in tiny.read_lines(run)] == [4]
  text = (run / "report.html").read_text()
  assert "<th>step 4" in text
  assert "step 0" not in text
  assert "does not tell of steps 0 to 3" in text


def test_a_finished_run_without_its_metrics(capsys, run, tmp_path):
  (run / "metrics.jsonl").unlink()
  status, said = resume(capsys, run, tmp_path)
  assert (status, len(said)) == (0, 1)


@pytest.mark.parametrize("more", [["--config.steps=2"], ["--config.steps=2", "--resume=3"]])
def test_fewer_steps_do_not_rewrite_a_finished_run(capsys, run, tmp_path, more):
  def files():
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

  before = files()
  status, (said,) = resume(capsys, run, tmp_path, *more)
  assert status == 1
  assert "holds 3 steps already, more than steps=2" in said
  assert files() == before


def test_a_damaged_config_of_a_run_that_saved_nothing(capsys, run, tmp_path):
  shutil.rmtree(run / "checkpoints")
  (run / "config.json").write_text("{")
  status, (said,) = resume(capsys, run, tmp_path)
  assert status == 1
  assert "config.json, line 1 is damaged" in said
  assert "choose another --workdir" in said


# Checkpoints of another version: their arrays are sound, so nothing may be moved or trained over.


def test_a_checkpoint_with_other_settings_than_this_version_knows(capsys, run, tmp_path):
  for step in (2, 3):
    host = run / "checkpoints" / str(step) / "host" / "metadata"
    known = json.loads(host.read_text())
    host.write_text(json.dumps({**known, "learner.momentum": 0.5, "dca-jax": "9.9"}))
  status, (said,) = resume(capsys, run, tmp_path, "--config.steps=4")
  assert status == 1
  assert f"{run}/checkpoints/3 was saved by another version of dca-jax (9.9; this is " in said
  assert "setting learner.momentum is known to only one of them" in said
  assert not list(run.glob("aside*"))


def test_a_checkpoint_with_other_arrays_than_this_version_keeps(capsys, run, tmp_path):
  with ocp.CheckpointManager(run / "checkpoints") as manager:
    host = manager.restore(3, args=ocp.args.Composite(host=ocp.args.JsonRestore())).host
    args = ocp.args.Composite(
      state=ocp.args.StandardSave({"params": {"wide": np.ones((3, 5))}}),
      host=ocp.args.JsonSave(host),
    )
    manager.save(4, args=args, force=True)
  status, (said,) = resume(capsys, run, tmp_path, "--config.steps=6")
  assert status == 1
  assert f"{run}/checkpoints/4 was saved by another version of dca-jax" in said
  assert "has the shape " in said
  assert not list(run.glob("aside*"))
