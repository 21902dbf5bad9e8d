"""The notebooks, run from top to bottom by a Jupyter kernel."""

import os
import pathlib

import nbformat
import pytest
import tiny
import words
from nbclient import NotebookClient

from dca_jax.config import flatten

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / "tpu_scripts" / "colab.ipynb"
TUTORIAL = ROOT / "docs" / "tutorial.ipynb"


def execute(change: str) -> list[dict]:
  """The outputs of all cells, and then of those about Gemma once more,
  after the code in `change`."""
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  gemma = [
    cell.source for cell in notebook.cells if cell.cell_type == "code" and "gemma" in cell.source
  ]
  notebook.cells += map(nbformat.v4.new_code_cell, [change, *gemma])
  resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
  NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=resources).execute()
  return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(outputs: list[dict]) -> str:
  return "".join(
    output.text for output in outputs if output.output_type == "stream" and output.name == "stdout"
  )


def shown(outputs: list[dict], kind: str) -> list[str]:
  return [o.data[kind] for o in outputs if o.output_type == "display_data" and kind in o.data]


@pytest.mark.parametrize("path", [NOTEBOOK, TUTORIAL], ids=lambda path: path.name)
def test_valid_and_stored_without_outputs(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  assert not any(
    cell.outputs or cell.execution_count for cell in notebook.cells if cell.cell_type == "code"
  )


@pytest.mark.slow
def test_runs_from_top_to_bottom_and_resumes(tmp_path, monkeypatch):
  model = words.write_model(tmp_path, {**words.SIZES, **words.FAMILIES["gemma3"]})
  given = {
    "policy.pretrained": model,
    "task.data_dir": words.build_gsm8k(tmp_path / "data"),
    **words.SMALL_RUN,
  }
  for half, changes in (("", flatten(tiny.SETTINGS)), ("GEMMA_", given)):
    values = [f"--config.{key}={value}" for key, value in changes.items() if key != "steps"]
    monkeypatch.setenv(f"DCA_JAX_{half}SETTINGS", " ".join(values))
  monkeypatch.setenv("DCA_JAX_WORKDIR", str(tmp_path / "run"))
  monkeypatch.setenv(
    "PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
  )
  monkeypatch.setenv("DCA_JAX_STEPS", "2")
  monkeypatch.delenv("GEMINI_API_KEY", raising=False)
  # The second half is left out where there is no accelerator, and where the hub does not give the
  # model.
  outputs = execute("GEMMA_STEPS, GEMMA_SETTINGS = '1', ['--config.policy.pretrained=no/model']")
  said = printed(outputs)
  assert "cpu: " in said
  assert "step 1/2" in said
  assert "Skipped: GEMMA_STEPS is 0, or there is no accelerator" in said
  assert "Skipped: policy.pretrained: 'no/model' is no folder" in said
  assert len(shown(outputs, "image/png")) == 1
  assert "What credit did" in shown(outputs, "text/html")[0]
  first = (tmp_path / "run" / "metrics.jsonl").read_text()
  assert [line["step"] for line in tiny.read_lines(tmp_path / "run")] == [0, 1, 2]

  monkeypatch.setenv("DCA_JAX_STEPS", "3")
  monkeypatch.setenv("DCA_JAX_GEMMA_STEPS", "1")
  outputs = execute("GEMMA_STEPS = '2'")
  said = printed(outputs)
  assert "step 3/3" in said
  assert "step 2/3" not in said
  assert (tmp_path / "run" / "metrics.jsonl").read_text().startswith(first)
  assert [line["step"] for line in tiny.read_lines(tmp_path / "run")] == [0, 1, 2, 3]

  # Gemma's run, without a key for its reviewer, and on to another step.
  assert "so no reviewer: this is RLOO" in said
  assert said.count("step 1/1") == said.count("step 2/2") == 1
  assert [line["step"] for line in tiny.read_lines(tmp_path / "run-gemma-uniform")] == [0, 1, 2]
  assert len(shown(outputs, "image/png")) == len(shown(outputs, "text/html")) == 3
  assert "Task tfds, reviewer none, credit uniform" in shown(outputs, "text/html")[2]


def test_tutorial_trains_what_its_cells_define(tmp_path, monkeypatch):
  monkeypatch.setenv(
    "PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
  )
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  notebook = nbformat.read(TUTORIAL, as_version=4)
  resources = {"metadata": {"path": str(tmp_path)}}
  NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources).execute()
  outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
  assert "correct=True" in printed(outputs).splitlines()[1]
  assert printed(outputs).count("correct=False") == 2
  roles = next(o.data["text/plain"] for o in outputs if o.output_type == "execute_result")
  assert roles == "('error', 'necessary', 'necessary', 'necessary')"
  assert len(shown(outputs, "image/png")) == 1
  (page,) = [html for html in shown(outputs, "text/html") if "class=step" in html]
  assert "error \u2212" in page  # Blamed by the reviewer of a cell, under the scheme of another.
  assert "necessary +" in page
  (workdir,) = [path.parent for path in tmp_path.glob("*/metrics.jsonl")]
  lines = tiny.read_lines(workdir)
  assert lines[-1]["step"] == 20
  assert lines[-1]["eval/sampled"] > lines[0]["eval/sampled"] + 0.1
  assert lines[1]["review/ok"] == 1
