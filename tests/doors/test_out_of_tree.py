"""What is not in the package: files of docs/examples, from the real command line,
in a folder of their own."""

import json
import pathlib
import shutil

import pytest
import tiny
from etils import epath
from fake_server import FakeServer
from safetensors.numpy import load_file, save_file

from dca_jax.config import ConfigError, build
from dca_jax.devices.mesh import MeshConfig, make_mesh, param_shardings
from dca_jax.doors import absolute, find
from dca_jax.errors import UserError
from dca_jax.policy import Policy, PolicyConfig, pretrained
from dca_jax.source import source_digest
from dca_jax.tasks.judge import Judge

LLAMA = pathlib.Path(__file__).parents[1] / "policy" / "reference" / "llama_scaled"
EXAMPLES = pathlib.Path(__file__).parents[2] / "docs" / "examples"
MOST_LINES = {
  "parity": 60,
  "spotlight": 25,
  "repeats": 25,
  "chat": 30,
  "renamed": 30,
  "plainly": 54,
  "guess": 60,
  "brief": 22,
}
RECIPE = """
from ml_collections import ConfigDict


def get_config():
  return ConfigDict({
    "steps": 2,
    "task": {"name": "parity.py:Parity", "bits": 3},
    "policy": {"width": 16, "depth": 1, "heads": 2, "head_dim": 8, "mlp": 16},
    "warmstart": {"clean_steps": 0, "steps": 40, "batch": 16, "lr": 0.01},
    "rollout": {"problems": 4, "group": 4, "max_prompt_tokens": 8, "max_tokens": 8},
    "evaluate": {"problems": 4, "samples": 4, "k": 2},
    "reviewer": {"name": "repeats.py:Repeats", "window": 2, "audit_every": 1},
    "credit": {"scheme": "spotlight.py:Spotlight", "contrast": 3.0},
    "rewrite": {"source": "brief.py:Brief"},
    "checkpoint": {"every": 1},
  })
"""


def run(*arguments, cwd, code=0):
  process = tiny.start(*map(str, arguments), cwd=cwd)
  out, error = process.communicate(timeout=300)
  assert process.returncode == code, error
  return out + error


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder with the files, and a run in it."""
  folder = tmp_path_factory.mktemp("home")
  for name in MOST_LINES:
    shutil.copy(EXAMPLES / f"{name}.py", folder)
  (folder / "recipe.py").write_text(RECIPE)
  run("train", "--config=recipe.py", "--workdir=run", cwd=folder)
  return folder


def test_they_are_short():
  for name, most in MOST_LINES.items():
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= most, name


def test_an_engine_trains_as_ours_does(home):
  """Its samples are the policy's: the learner finds the same log-probabilities."""
  run(
    *("train", "--config=recipe.py", "--workdir=plain", "--config.engine.name=plainly.py:Plainly"),
    cwd=home,
  )
  trained = [line for line in tiny.read_lines(home / "plain") if line["step"]]
  assert len(trained) == 2
  assert all(line["sampler/logprob_error"] < 1e-5 for line in trained)
  assert all(line["train/generated_tokens"] > 0 for line in trained)
  wrong = run(
    *("train", "--config=recipe.py", "--workdir=x", "--config.engine.row=8"), cwd=home, code=1
  )
  assert "engine.row" in wrong
  assert "did you mean engine.rows?" in wrong


def test_a_task_a_scheme_and_a_reviewer_train_together(home):
  lines = tiny.read_lines(home / "run")
  assert [line["step"] for line in lines][-1] == 2
  assert any(line.get("review/ok", 0.0) == 1.0 for line in lines)
  assert all(
    0.0 <= line["review/suffix_leak"] <= 1.0 for line in lines if "review/suffix_leak" in line
  )
  saved = json.loads((home / "run" / "config.json").read_text())
  assert saved["task"]["name"] == f"{home}/parity.py:Parity"
  assert (saved["credit"]["contrast"], saved["reviewer"]["window"]) == (3.0, 2)


def test_the_run_is_read_again_from_elsewhere(home, tmp_path):
  workdir = home / "run"
  assert "Parity" in run("status", f"--workdir={workdir}", cwd=tmp_path)
  run("report", f"--workdir={workdir}", cwd=tmp_path)
  assert "spotlight.py:Spotlight" in (workdir / "report.html").read_text()
  trajectories = f"--trajectories={workdir}/trajectories"
  assert "kappa" in run("review", trajectories, "--reviewer=oracle", cwd=tmp_path)
  said = run("review", trajectories, f"--reviewer={home}/repeats.py:Repeats", cwd=tmp_path)
  assert "same role in 1.000" in said or "completions: " in said
  assert "began from nothing" in run(
    "export", f"--workdir={workdir}", "--output=out", cwd=tmp_path, code=1
  )


@pytest.mark.parametrize(
  ("mine", "yours", "wanted"),
  [
    (
      '"01;>"',
      '"01;"',
      "task.tokenizer: problem 0: '>' is not in the alphabet, and would be read as '$', which ends",
    ),
    (
      "steps[-1] ==",
      "steps[99] ==",
      "verify of broken.py, line 36: IndexError: list index out of range, on problem 0;",
    ),
    (
      "return Outcome(",
      "Outcome(",
      "verify of broken.py, line 34: it returned None, which is no Outcome, on problem 0;",
    ),
  ],
)
def test_a_mistake_in_a_task_ends_in_one_sentence(home, mine, yours, wanted):
  text = (home / "parity.py").read_text()
  assert text.count(mine) == 1
  text = text.replace("right = len(steps) == self.bits and ", "right = ")
  (home / "broken.py").write_text(text.replace(mine, yours))
  command = ["train", "--config=recipe.py", "--workdir=broken"]
  said = run(*command, "--config.task.name=broken.py:Parity", cwd=home, code=1)
  assert f"dca-jax: error: {wanted}" in said
  assert "Traceback" not in said


def test_a_transport_reviews(home):
  with FakeServer() as server:
    client = [
      f"--config.reviewer.client.base_url={server.url}",
      "--config.reviewer.client.max_dollars=0",
    ]
    command = [
      "review",
      f"--trajectories={home}/run/trajectories",
      "--reviewer=chat.py:Chat:some-model",
      *client,
    ]
    said = run(*command, cwd=home)
  assert "ok" in said.split("\n")[0]
  assert {request["body"]["model"] for request in server.requests} == {"some-model"}


@pytest.mark.parametrize(
  ("settings", "wanted"),
  [
    (
      {"task": {"name": "parity.py:Parity", "bitts": 3}},
      "task.bitts: no such key; did you mean task.bits?",
    ),
    (
      {"credit": {"scheme": "spotlight.py:Spotlight", "contrst": 3.0}},
      "did you mean credit.contrast?",
    ),
    ({"reviewer": {"name": "repeats.py:Repeats", "windw": 3}}, "did you mean reviewer.window?"),
    ({"reviewer": {"name": "chat.py:Chat", "pth": "/x"}}, "did you mean reviewer.path?"),
    (
      {"reviewer": {"name": "repeats.py:Repeats", "window": 0}},
      "reviewer.window: must be at least 1",
    ),
    ({"reviewer": {"name": "parity.py:Parity"}}, "must be a frozen dataclass that extends"),
    ({"task": {"name": "raises.py:Task"}}, "RuntimeError: no luck"),
    ({"task": {"name": "parity.py:Party"}}, "has no attribute 'Party'"),
    ({"task": {"name": "nowhere.py:Task"}}, "no file"),
    ({"task": {"name": "nowhere_at_all:Task"}}, "No module named"),
    ({"reviewer": {"name": "panel", "panel": ("oracle", "repeats.py:Repeat")}}, "reviewer.panel: "),
  ],
)
def test_a_mistake_is_one_sentence(home, monkeypatch, settings, wanted):
  monkeypatch.chdir(home)
  (home / "raises.py").write_text("raise RuntimeError('no luck')\n")
  with pytest.raises(ConfigError) as told:
    build({"credit": {"scheme": "weighted"}, **settings})
  assert wanted in str(told.value)
  assert "\n" not in str(told.value)


def test_a_family_that_renames_tensors_loads_and_is_exported(tmp_path):
  model = tmp_path / "model"
  shutil.copytree(LLAMA, model)
  tensors = load_file(model / "model.safetensors")
  renamed = {name.replace("model.", "transformer.", 1): value for name, value in tensors.items()}
  save_file(renamed, model / "model.safetensors")
  described = json.loads((model / "config.json").read_text())
  (model / "config.json").write_text(json.dumps(described | {"model_type": "renamed"}))
  section = PolicyConfig(pretrained=str(model), family=f"{EXAMPLES}/renamed.py:Renamed")
  config = pretrained.resolve(section, 0)
  policy = Policy(config, config.vocab_size)
  shardings = param_shardings(make_mesh(MeshConfig()), policy)
  params = pretrained.load(policy, model, shardings)
  tokenizer = tmp_path / "tokenizer"
  tokenizer.mkdir()
  pretrained.save(params, config, str(model), epath.Path(tokenizer), tmp_path / "out")
  written = [load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
  out = {name: value for file in written for name, value in file.items()}
  assert out.keys() == renamed.keys()
  assert all((out[name] == renamed[name].astype(out[name].dtype)).all() for name in out)
  with pytest.raises(UserError, match="architecture"):  # Without its family it is unknown.
    pretrained.resolve(PolicyConfig(pretrained=str(model)), 0)


def test_a_verifier_in_a_file_runs_in_its_own_process(tmp_path):
  mine = tmp_path / "mine.py"
  mine.write_text("def right(row, completion):\n  return float(completion == row['answer'])\n")
  judge = Judge(f"{mine}:right", 10.0, 1)
  assert judge.verify({"answer": "4"}, "4").reward == 1.0
  assert judge.verify({"answer": "4"}, "5").reward == 0.0
  with pytest.raises(UserError, match=r"task\.verifier: cannot import .*mine\.py:wrong"):
    Judge(f"{mine}:wrong", 10.0, 1)


def test_a_file_is_the_same_from_everywhere_and_its_code_is_known(tmp_path, monkeypatch):
  (tmp_path / "mine.py").write_text((EXAMPLES / "parity.py").read_text())
  monkeypatch.chdir(tmp_path)
  assert absolute("mine.py:Parity") == f"{tmp_path}/mine.py:Parity"
  assert absolute(("oracle", "mine.py:A:model")) == ("oracle", f"{tmp_path}/mine.py:A:model")
  task = find("mine.py:Parity", "task.name")()
  before = source_digest(task)
  (tmp_path / "mine.py").write_text((EXAMPLES / "parity.py").read_text() + "\nMORE = 1\n")
  assert (
    source_digest(task) != before
  )  # A warm start that was kept is not taken for that of other code.
