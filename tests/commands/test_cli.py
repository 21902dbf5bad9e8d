"""What a user sees: every bad input ends in one clear line,
and what was saved before stays usable."""

import contextlib
import importlib.metadata
import pathlib
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tiny

from dca_jax.commands import cli
from dca_jax.devices import processes
from dca_jax.loop import train


def refused(capsys, *arguments: str) -> str:
  """Runs a command that must fail; returns its only line on stderr."""
  capsys.readouterr()
  status = cli.main(arguments)
  lines = capsys.readouterr().err.splitlines()
  assert status == 1
  assert len(lines) == 1, lines
  assert lines[0].startswith("dca-jax: error: ")
  return lines[0]


def damage(workdir: pathlib.Path, step: int) -> None:
  """Cuts every file that holds arrays of a checkpoint in half, as an interrupted copy would."""
  files = [
    path
    for path in (workdir / "checkpoints" / str(step)).rglob("*")
    if path.is_file() and path.parent.name == "d"
  ]
  assert files
  for path in files:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
  """A finished run of the tiny settings; copy it before changing it."""
  workdir = tmp_path_factory.mktemp("finished") / "run"
  train(tiny.make_config(), str(workdir), quiet=True)
  return workdir


@pytest.fixture
def recipe(tmp_path) -> str:
  return tiny.write_recipe(tmp_path)


@pytest.fixture
def run(finished, tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(finished, tmp_path / "run"))


# Configs.


def test_an_unknown_key(capsys, recipe, tmp_path):
  said = refused(
    capsys,
    "train",
    f"--config={recipe}",
    f"--workdir={tmp_path / 'run'}",
    "--config.learner.los=ppo",
  )
  assert "learner.los" in said
  assert "learner.loss" in said
  assert not (tmp_path / "run").exists()


def test_an_unknown_key_in_the_recipe(capsys, tmp_path):
  recipe = tiny.write_recipe(tmp_path, {"learner.los": "ppo"})
  assert "learner.los" in refused(
    capsys, "train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}"
  )


def test_an_impossible_value(capsys, recipe, tmp_path):
  said = refused(
    capsys,
    "train",
    f"--config={recipe}",
    f"--workdir={tmp_path / 'run'}",
    "--config.rollout.group=1",
  )
  assert "rollout.group" in said


def test_a_stray_argument(capsys, recipe, tmp_path):
  assert "learner.lr=3" in refused(
    capsys, "train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}", "learner.lr=3"
  )


def test_a_task_that_does_not_exist(capsys, recipe, tmp_path):
  said = refused(
    capsys,
    "train",
    f"--config={recipe}",
    f"--workdir={tmp_path / 'run'}",
    "--config.task.name=chess",
  )
  assert "task.name" in said


def test_a_missing_recipe(capsys, tmp_path):
  said = refused(
    capsys, "train", f"--config={tmp_path / 'nowhere.py'}", f"--workdir={tmp_path / 'run'}"
  )
  assert "nowhere.py" in said


def test_a_recipe_without_get_config(capsys, tmp_path):
  (tmp_path / "recipe.py").write_text("steps = 3\n")
  said = refused(
    capsys, "train", f"--config={tmp_path / 'recipe.py'}", f"--workdir={tmp_path / 'run'}"
  )
  assert "get_config" in said
  assert "recipe.py" in said


def test_a_recipe_with_a_syntax_error(capsys, tmp_path):
  (tmp_path / "recipe.py").write_text("def get_config():\n  return (\n")
  said = refused(
    capsys, "train", f"--config={tmp_path / 'recipe.py'}", f"--workdir={tmp_path / 'run'}"
  )
  assert "recipe.py" in said
  assert "line 2" in said


def test_a_recipe_that_is_no_python_file(capsys, tmp_path):
  (tmp_path / "recipe.yaml").write_text("steps: 3\n")
  said = refused(
    capsys, "train", f"--config={tmp_path / 'recipe.yaml'}", f"--workdir={tmp_path / 'run'}"
  )
  assert "recipe.yaml" in said


@pytest.mark.parametrize("returned", ["None", "3", "[1]"])
def test_a_recipe_that_returns_no_config(capsys, tmp_path, returned):
  (tmp_path / "recipe.py").write_text(f"def get_config():\n  return {returned}\n")
  said = refused(
    capsys, "train", f"--config={tmp_path / 'recipe.py'}", f"--workdir={tmp_path / 'run'}"
  )
  assert "recipe.py" in said


def test_a_mesh_that_does_not_fit(capsys, recipe, tmp_path):
  said = refused(
    capsys, "train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}", "--config.mesh.fsdp=3"
  )
  assert "mesh.fsdp" in said
  assert "1 device" in said


# Limits.


def test_a_prompt_that_is_too_long(capsys, recipe, tmp_path):
  short = ["--config.rollout.max_prompt_tokens=10", "--config.warmstart.seed=77"]
  said = refused(capsys, "train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}", *short)
  assert "rollout.max_prompt_tokens" in said
  assert "problem 0" in said
  assert "13 tokens" in said


def test_a_demonstration_that_is_too_long(capsys, recipe, tmp_path):
  said = refused(
    capsys,
    "train",
    f"--config={recipe}",
    f"--workdir={tmp_path / 'run'}",
    "--config.task.repeat=1",
    "--config.task.drop=0",
  )
  assert "rollout.max_tokens" in said
  assert "demonstration" in said
  assert "15 tokens" in said


# Workdirs.


def test_a_workdir_that_holds_a_different_run(capsys, recipe, run):
  before = (run / "metrics.jsonl").read_bytes()
  said = refused(capsys, "train", f"--config={recipe}", f"--workdir={run}", "--config.seed=4")
  assert "seed was 0 and is now 4" in said
  assert str(run) in said
  assert (run / "metrics.jsonl").read_bytes() == before


def test_a_workdir_with_foreign_files(capsys, recipe, tmp_path):
  assert f"--workdir={tmp_path}" in refused(
    capsys, "train", f"--config={recipe}", f"--workdir={tmp_path}"
  )


def test_a_workdir_that_is_a_file(capsys, recipe, tmp_path):
  (tmp_path / "run").write_text("")
  said = refused(capsys, "train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}")
  assert str(tmp_path / "run") in said


def test_a_finished_run_again_changes_nothing(capsys, recipe, run):
  before = (run / "metrics.jsonl").read_bytes()
  assert cli.main(["train", f"--config={recipe}", f"--workdir={run}"]) == 0
  assert (run / "metrics.jsonl").read_bytes() == before
  assert "report.html" in capsys.readouterr().out


def test_a_finished_run_can_be_made_longer(recipe, run, tmp_path):
  assert cli.main(["train", f"--config={recipe}", f"--workdir={run}", "--config.steps=5"]) == 0
  train(tiny.make_config({"steps": 5}), str(tmp_path / "whole"), quiet=True)
  # Only the evaluation after the old last step is left over.
  ours = [
    {k: v for k, v in tiny.timeless(line).items() if "eval/" not in k}
    for line in tiny.read_lines(run)
  ]
  theirs = [
    {k: v for k, v in tiny.timeless(line).items() if "eval/" not in k}
    for line in tiny.read_lines(tmp_path / "whole")
  ]
  assert ours == theirs
  tiny.assert_same_arrays(tiny.saved_state(run), tiny.saved_state(tmp_path / "whole"))


# Failures on the way.


def test_a_loss_that_is_not_finite(capsys, recipe, tmp_path):
  # At this rate the first update is finite and the second step's logits are not.
  run = tmp_path / "run"
  said = refused(
    capsys, "train", f"--config={recipe}", f"--workdir={run}", "--config.learner.lr=1e10"
  )
  assert "not finite at step 2" in said
  assert "learner.lr" in said
  assert "step 1 " in said
  assert str(run / "checkpoints") in said
  state = tiny.saved_state(run, 1)
  assert all(np.isfinite(array).all() for array in state.values())
  assert [line["step"] for line in tiny.read_lines(run)] == [
    0,
    1,
  ]  # What is not finite was not recorded.
  assert [path.name for path in (run / "checkpoints").iterdir()] == ["1"]


def test_the_newest_checkpoint_damaged(capsys, recipe, run, finished):
  damage(run, 3)
  capsys.readouterr()
  assert cli.main(["train", f"--config={recipe}", f"--workdir={run}"]) == 0
  warnings = capsys.readouterr().err.splitlines()
  assert len(warnings) == 1
  assert warnings[0].startswith("warning: checkpoint 3 is damaged")
  assert str(run) in warnings[0]
  tiny.assert_same_run(run, finished)


def test_a_checkpoint_damaged_twice(capsys, recipe, run, finished):
  for _ in range(2):
    damage(run, 3)
    assert cli.main(["train", f"--config={recipe}", f"--workdir={run}"]) == 0
  tiny.assert_same_run(run, finished)


def test_a_checkpoint_with_a_missing_part(recipe, run, finished):
  shutil.rmtree(run / "checkpoints" / "3" / "state")
  assert cli.main(["train", f"--config={recipe}", f"--workdir={run}"]) == 0
  tiny.assert_same_run(run, finished)


def test_every_checkpoint_damaged(capsys, recipe, run):
  damage(run, 2)
  damage(run, 3)
  capsys.readouterr()
  metrics = (run / "metrics.jsonl").read_bytes()
  for _ in range(2):  # The second time must not quietly begin again from nothing.
    assert cli.main(["train", f"--config={recipe}", f"--workdir={run}"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dca-jax: error: ")
    assert str(run) in error
    assert (run / "metrics.jsonl").read_bytes() == metrics


# Disks.


def test_a_checkpoint_that_cannot_be_written(capsys, recipe, run, tmp_path):
  # Files of more than 12,000 bytes fail, which are those of a checkpoint alone.
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
  try:
    said = refused(capsys, "train", f"--config={recipe}", f"--workdir={run}", "--config.steps=6")
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert str(run / "checkpoints") in said
  assert "step 3" in said
  assert cli.main(["train", f"--config={recipe}", f"--workdir={run}", "--config.steps=6"]) == 0
  train(tiny.make_config({"steps": 6}), str(tmp_path / "whole"), quiet=True)
  tiny.assert_same_arrays(tiny.saved_state(run), tiny.saved_state(tmp_path / "whole"))


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, size: str):
  folder.mkdir()
  made = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder],
    capture_output=True,
    check=False,
  )
  if made.returncode:
    pytest.skip("a small disk can only be mounted by root")
  try:
    yield folder
  finally:
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(path: pathlib.Path) -> None:
  """Writes until the disk is full to the last byte."""
  with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
    while True:
      file.write(bytes(4096))


def test_a_disk_that_fills_up(recipe, finished, tmp_path):
  with small_disk(tmp_path / "disk", "1500k") as disk:
    run = disk / "run"
    shutil.copytree(finished, run)
    # Without TensorBoard, whose own events may find the disk full first and then say so.
    arguments = ["train", f"--config={recipe}", f"--workdir={run}", "--config.log.to=()"]
    # A process of its own, because what libraries log from their threads reaches its stderr too.
    process = tiny.start(*arguments, "--config.steps=400", "--config.checkpoint.keep=400")
    _, err = process.communicate(timeout=1200)
    saved = [int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
    last = max(saved)
    assert last > 3
    tiny.saved_state(run, last)  # Complete, with the disk still full.
    assert process.returncode == 1
    said, *more = err.splitlines()
    assert not more, err
    assert said.startswith("dca-jax: error: ")
    assert str(run) in said
    # Space is freed, and the same command goes on from there.
    for step in sorted(saved)[:-2]:
      shutil.rmtree(run / "checkpoints" / str(step))
    assert cli.main([*arguments, f"--config.steps={last + 2}"]) == 0
    train(tiny.make_config({"steps": last + 2}), str(tmp_path / "whole"), quiet=True)
    tiny.assert_same_arrays(tiny.saved_state(run), tiny.saved_state(tmp_path / "whole"))


def test_a_disk_that_is_full_from_the_start(capsys, recipe, tmp_path):
  with small_disk(tmp_path / "disk", "64k") as disk:
    fill(disk / "filler")
    said = refused(capsys, "train", f"--config={recipe}", f"--workdir={disk / 'run'}")
    assert str(disk) in said
    assert "None" not in said
    (disk / "filler").unlink()
    # Now there is room for config.json, so the refusal is about something else than the folder's
    # contents.
    said = refused(capsys, "train", f"--config={recipe}", f"--workdir={disk / 'run'}")
    assert "no run" not in said


# Processes.


def test_ctrl_c_and_the_same_command_again(tmp_path):
  # A shell that runs the tests in the background has them ignore Ctrl-C, and a process would
  # inherit that.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  recipe = tiny.write_recipe(tmp_path, {"steps": 2000})
  run = tmp_path / "run"
  arguments = ["train", f"--config={recipe}", f"--workdir={run}"]
  process = tiny.start(*arguments, "--config.checkpoint.keep=1")
  tiny.wait_until(lambda: len(tiny.read_lines(run)) >= 4, process)
  process.send_signal(signal.SIGINT)
  try:
    _, err = process.communicate(timeout=1200)
  finally:
    process.kill()  # Where it hangs.
  assert process.returncode == 130
  assert "Traceback" not in err
  assert "the same command again continues" in err
  done = tiny.read_lines(run)[-1]["step"]
  assert done < 2000
  assert cli.main([*arguments, f"--config.steps={done + 1}"]) == 0
  assert [line["step"] for line in tiny.read_lines(run)] == list(range(done + 2))


def test_it_says_its_version(capsys):
  with pytest.raises(SystemExit) as ended:
    cli.main(["--version"])
  assert ended.value.code == 0
  assert capsys.readouterr().out == f"dca-jax {importlib.metadata.version('dca-jax')}\n"


def test_a_shell_is_told_how_a_command_goes_on(tmp_path):
  told = tmp_path / "told"
  line = "dca-jax compare --qu"
  environment = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
  process = tiny.start(environment={**environment, "_ARGCOMPLETE_STDOUT_FILENAME": str(told)})
  process.communicate(timeout=600)
  assert told.read_text().strip() == "--quiet"


def test_quiet_leaves_the_result(capsys, recipe, run):
  arguments = ["train", f"--config={recipe}", f"--workdir={run}", "--config.steps=4", "--quiet"]
  assert cli.main(arguments) == 0
  said = capsys.readouterr().out.strip().splitlines()
  assert said[0].startswith("held-out")
  assert said[-1].startswith("report: ")


def test_help_of_the_module():
  shown = subprocess.run(
    [sys.executable, "-m", "dca_jax", "--help"], capture_output=True, text=True, check=True
  )
  assert not shown.stderr
  for word in ("train", "compare", "report"):
    assert word in shown.stdout


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["plan", "--config={recipe}", "--devices=-1"], "--devices=-1: must be at least 1"),
    (["plan", "--config={recipe}", "--devices=0"], "--devices=0: must be at least 1"),
    (
      ["review", "--trajectories={run}/trajectories", "--reviewer=oracle", "--limit=0"],
      "--limit=0: must be at least",
    ),
    (["export", "--workdir={run}", "--output={run}/model", "--step=-3"], ""),
  ],
)
def test_a_number_out_of_range(capsys, recipe, run, arguments, said):
  given = [argument.format(recipe=recipe, run=run) for argument in arguments]
  assert refused(capsys, *given).startswith(f"dca-jax: error: {said}")


# Reports.


def test_report_of_a_finished_run(capsys, run):
  (run / "report.html").unlink(missing_ok=True)
  assert cli.main(["report", f"--workdir={run}"]) == 0
  assert str(run / "report.html") in capsys.readouterr().out
  assert (run / "report.html").stat().st_size > 5000


def test_report_of_an_empty_folder(capsys, tmp_path):
  assert str(tmp_path) in refused(capsys, "report", f"--workdir={tmp_path}")


def test_report_of_a_folder_that_does_not_exist(capsys, tmp_path):
  assert "nowhere" in refused(capsys, "report", f"--workdir={tmp_path / 'nowhere'}")


def test_report_of_a_run_without_a_step(capsys, run):
  # Stopped during the first step, which on a large model can take minutes.
  first = (run / "metrics.jsonl").read_text().splitlines()[0]
  (run / "metrics.jsonl").write_text(first + "\n")
  assert str(run) in refused(capsys, "report", f"--workdir={run}")


def test_view_says_what_writes_a_file(capsys, run):
  said = refused(capsys, "view", f"--workdir={run}", "--output=page.html")
  assert "dca-jax report writes a file" in said


def test_report_takes_no_settings(capsys, run):
  assert "--config.seed=3" in refused(capsys, "report", f"--workdir={run}", "--config.seed=3")


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["--coordinator=localhost:1"], "--coordinator needs --processes=N"),
    (
      ["--coordinator=localhost:1", "--processes=2", "--process=2"],
      "--coordinator needs --processes=N",
    ),
    (
      ["--coordinator=localhost:1", "--processes=2", "--process=1"],
      "--coordinator=localhost:1: nobody answers there",
    ),
    (
      ["--coordinator=localhost", "--processes=2", "--process=1"],
      "--coordinator=localhost: nobody answers there",
    ),
    (
      ["--coordinator=localhost", "--processes=2", "--process=0"],
      "--coordinator=localhost: nobody answers there",
    ),
    (["--processes=0"], "--processes and --process need --coordinator=HOST:PORT"),
    (
      ["--coordinator=localhost:1", "--processes=0", "--process=0"],
      "--coordinator needs --processes=N",
    ),
    (["--resume=-3"], "--resume=-3: must be auto, never, or the number of a saved step"),
    (["--resume=last"], "--resume=last: must be auto, never, or the number of a saved step"),
  ],
)
def test_processes_that_cannot_meet(capsys, monkeypatch, recipe, tmp_path, arguments, said):
  monkeypatch.setattr(processes, "_JOIN", 0.0)
  assert cli.main(["train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}", *arguments]) == 1
  assert capsys.readouterr().err.splitlines()[-1].startswith(f"dca-jax: error: {said}")
  assert not (tmp_path / "run").exists()


def test_a_machine_that_is_no_pod(recipe, tmp_path):
  process = tiny.start(
    "train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}", "--distributed"
  )
  _, errors = process.communicate(timeout=1200)
  assert process.returncode == 1
  said = "dca-jax: error: --distributed: no TPU pod, Slurm or Kubernetes job found here"
  assert errors.strip().splitlines()[-1].startswith(said)
