"""The notebook, run from top to bottom by a Jupyter kernel."""

import os
import pathlib

import nbformat
import tiny
from nbclient import NotebookClient

from dca_jax.config import flatten

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / "tpu_scripts" / "colab.ipynb"


def execute() -> list[dict]:
  """The outputs of all cells."""
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
  NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources).execute()
  return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(outputs: list[dict]) -> str:
  return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def test_valid_and_stored_without_outputs():
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  nbformat.validate(notebook)
  assert not any(cell.outputs or cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


def test_runs_from_top_to_bottom_and_resumes(tmp_path, monkeypatch):
  changes = {k: v for k, v in flatten(tiny.SETTINGS).items() if k != "steps"}
  monkeypatch.setenv("DCA_JAX_SETTINGS", " ".join(f"--config.{key}={value}" for key, value in changes.items()))
  monkeypatch.setenv("DCA_JAX_WORKDIR", str(tmp_path / "run"))
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
  monkeypatch.setenv("DCA_JAX_STEPS", "2")
  outputs = execute()
  assert "cpu: " in printed(outputs)
  assert "step 1/2" in printed(outputs)
  shown = [output.data for output in outputs if output.output_type == "display_data"]
  assert any(data.get("image/png") for data in shown)
  assert any("What credit did" in data.get("text/html", "") for data in shown)
  first = (tmp_path / "run" / "metrics.jsonl").read_text()
  assert [line["step"] for line in tiny.read_lines(tmp_path / "run")] == [0, 1, 2]

  monkeypatch.setenv("DCA_JAX_STEPS", "3")
  again = printed(execute())
  assert "step 3/3" in again
  assert "step 2/3" not in again
  assert (tmp_path / "run" / "metrics.jsonl").read_text().startswith(first)
  assert [line["step"] for line in tiny.read_lines(tmp_path / "run")] == [0, 1, 2, 3]
