"""Where metrics go beside metrics.jsonl; wandb and trackio are the real ones, without a network."""

import json
import struct
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import tiny
from etils import epath

from dca_jax.config import ConfigError
from dca_jax.errors import UserError
from dca_jax.loop import train
from dca_jax.store.metrics import Reporter, read_metrics
from dca_jax.store.writers import Log, LogConfig

SETTINGS = {"seed": 3, "task": {"name": "chains"}}


def report(workdir: epath.Path, start: int, steps, *to: str, scores=()) -> None:
  """Reports steps; `scores` are added to the step that the run goes on from."""
  log = Log(LogConfig(to, "words"), workdir, SETTINGS)
  with Reporter(workdir, start, 10, quiet=True, log=log) as reporter:
    if scores:
      reporter.amend(start, dict(scores))
    for step in steps:
      reporter.log(step, {"train/x": step / 4, "train/y": 1e-9})


def finished_records(path) -> list:
  """Those of an offline run, whose file another process completes."""
  end = time.monotonic() + 60
  while True:
    records = [*wandb_records(path)]
    if records and records[-1].HasField("exit"):
      return records
    assert time.monotonic() < end
    time.sleep(0.02)


def wandb_records(path) -> Iterator:
  """A LevelDB log of protocol buffers after seven bytes; a last one
  that is not whole is left out."""
  from wandb.proto import wandb_internal_pb2

  data, place, whole = path.read_bytes(), 7, b""
  while place + 7 <= len(data):
    if 2**15 - place % 2**15 < 7:  # Blocks end with zeros.
      place += 2**15 - place % 2**15
      continue
    length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
    if place + 7 + length > len(data):
      return
    whole += data[place + 7 : place + 7 + length]
    place += 7 + length
    if kind in (1, 4):  # A whole record, or the last part of one.
      record = wandb_internal_pb2.Record()
      record.ParseFromString(whole)
      whole = b""
      yield record


def sent_to_wandb(workdir: epath.Path) -> tuple[set, list[dict]]:
  """Of all processes of a run: its id, project, name and settings, and the rows."""
  runs, rows = set(), []
  for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
    for record in finished_records(path):
      if record.HasField("run"):
        settings = [(c.key, c.value_json) for c in record.run.config.update]
        said = {key: json.loads(value) for key, value in settings if key in SETTINGS}
        runs.add((record.run.run_id, record.run.project, record.run.display_name, str(said)))
      if record.HasField("history"):
        row = {(i.key or "/".join(i.nested_key)): i.value_json for i in record.history.item}
        rows.append({k: json.loads(v) for k, v in row.items() if not k.startswith("_")})
  return runs, rows


def sent_to_trackio(workdir: epath.Path) -> tuple[set, list[dict]]:
  import trackio
  from trackio.sqlite_storage import SQLiteStorage

  runs, rows = set(), []
  for run in trackio.Api().runs("words"):
    settings = {key: value for key, value in (run.config or {}).items() if key in SETTINGS}
    runs.add((run.name.rpartition("-")[2], "words", run.name.rpartition("-")[0], str(settings)))
    rows += SQLiteStorage.get_logs("words", run.name)
  return runs, [{k: v for k, v in row.items() if k != "timestamp"} for row in rows]


SENT = {"wandb": sent_to_wandb, "trackio": sent_to_trackio}


@pytest.fixture
def workdir(tmp_path, monkeypatch):
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_SILENT", "true")
  monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
  for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
    monkeypatch.delitem(sys.modules, name)  # It reads its folder once.
  folder = epath.Path(tmp_path / "runs" / "one")
  folder.mkdir(parents=True)
  return folder


@pytest.mark.parametrize("name", SENT)
def test_a_run_that_goes_on_is_the_same_run_with_every_row_once(workdir, name):
  pytest.importorskip(name)
  report(workdir, 0, range(5), name)
  report(workdir, 3, [4, 5], name, scores={"eval/greedy": 0.5})
  ((own, *said),), rows = SENT[name](workdir)
  assert own == json.loads((workdir / "writers.json").read_text())[name][0]
  assert said == ["words", "runs/one", str(SETTINGS)]
  plain = [{"step": step, "train/x": step / 4, "train/y": 1e-9} for step in range(6)]
  assert [row for row in rows if "eval/greedy" not in row] == plain
  assert [row for row in rows if "eval/greedy" in row] == [{"step": 3, "eval/greedy": 0.5}]
  assert [row["step"] for row in read_metrics(workdir)] == [*range(6)]


@pytest.mark.parametrize("name", SENT)
def test_a_writer_that_comes_later_hears_what_has_been(workdir, name):
  pytest.importorskip(name)
  report(workdir, 0, range(5))
  report(workdir, 3, [4], name)
  _, rows = SENT[name](workdir)
  assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]


class Failing:
  """A writer that fails at one of the things that it is asked for."""

  package, waits, at = "", False, "log"
  told: list = []  # noqa: RUF012

  def __init__(self, run):
    self._do("open")

  def _do(self, what, *told):
    self.told.append((what, *told))
    if what == self.at:
      raise OSError("No space left on device")

  def log(self, step, metrics):
    self._do("log", step)

  def close(self):
    self._do("close")


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("at", ["open", "log", "close"])
def test_a_writer_that_fails_is_one_warning(workdir, capsys, monkeypatch, at, waits):
  monkeypatch.setattr(Failing, "waits", waits)
  monkeypatch.setattr(Failing, "at", at)
  monkeypatch.setattr(Failing, "told", [])
  report(workdir, 0, range(3), f"{__name__}:Failing", "tensorboard")
  (said,) = capsys.readouterr().err.splitlines()
  assert said == (
    f"warning: log.to: {__name__}:Failing failed (OSError: No space left on device) and is told no"
    " more; metrics.jsonl has everything"
  )
  assert Failing.told[-1][0] == at
  assert len(read_metrics(workdir)) == 3
  assert [*(workdir / "tensorboard").iterdir()]


class Hanging(Failing):
  waits, at, go_on = True, "", threading.Event()

  def log(self, step, metrics):
    self.go_on.wait()
    raise OSError("the server is down")


def test_nobody_waits_long_for_a_writer_that_hangs(workdir, capsys, monkeypatch):
  monkeypatch.setattr("dca_jax.store.writers._FINISH", 0.2)
  report(workdir, 0, range(3), f"{__name__}:Hanging")
  Hanging.go_on.set()
  (said,) = capsys.readouterr().err.splitlines()
  assert said.endswith("Hanging did not finish in time; metrics.jsonl has everything")


def test_a_package_that_is_missing_is_said_before_anything_is_opened(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  config = tiny.make_config({"log.to": ("tensorboard", "wandb")})
  with pytest.raises(UserError, match=r"log.to: needs the package wandb: pip .*\[wandb\]'"):
    train(config, str(tmp_path / "run"), quiet=True)
  assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"log.to": ("wanbd",)}, "log.to: must be different ones of tensorboard, wandb, trackio"),
    ({"log.to": ("trackio", "trackio")}, "log.to: must be different ones"),
    ({"log.project": "mine"}, "log.project: has no effect"),
    ({"log.to": ("wandb",), "log.project": ""}, "log.project: must be given"),
  ],
)
def test_what_cannot_be_meant_is_refused(changes, said):
  with pytest.raises(ConfigError, match=said):
    tiny.make_config(changes)


class Late(Failing):
  """A writer that was not open yet when its process was killed."""

  waits, at, opens = True, "", threading.Event()

  def __init__(self, run):
    self.opens.wait()
    self.told.append(run.id)


def test_what_a_killed_run_had_not_told_is_told_by_the_next(workdir, monkeypatch):
  monkeypatch.setattr(Late, "told", [])
  monkeypatch.setattr("dca_jax.store.writers._FINISH", 0.1)
  report(workdir, 0, range(4), name := f"{__name__}:Late")
  assert not (workdir / "writers.json").exists()
  Late.opens.set()
  while not Late.told:  # Here that process is still alive, and nobody listens to it any more.
    time.sleep(0.01)
  monkeypatch.setattr("dca_jax.store.writers._FINISH", 60.0)
  Late.told.clear()
  report(workdir, 2, [3, 4], name)
  own, *heard = Late.told
  assert heard == [*(("log", step) for step in range(5)), ("close",)]
  assert json.loads((workdir / "writers.json").read_text()) == {name: [own, 4]}
  # What it has heard of a step that is repeated, it does not hear again.
  Late.told.clear()
  report(workdir, 3, [4, 5], name)
  assert Late.told == [own, ("log", 5), ("close",)]
  # A damaged note makes it a new run there.
  (workdir / "writers.json").write_text('{"x": 1')
  Late.told.clear()
  report(workdir, 5, [6], name)
  assert Late.told[0] != own
  assert Late.told[1:] == [*(("log", step) for step in range(7)), ("close",)]


def test_a_run_writes_to_all_of_them_what_metrics_jsonl_has(workdir):
  """And changing where they go is no other run."""
  for name in SENT:
    pytest.importorskip(name)
  for steps, to in ((2, ("wandb", "trackio")), (3, ("trackio", "wandb", "tensorboard"))):
    changes = {"steps": steps, "log.to": to, "log.project": "words"}
    train(tiny.make_config(changes), str(workdir), quiet=True)
  for sent in SENT.values():
    runs, rows = sent(workdir)
    assert len(runs) == 1
    merged = {}
    for row in rows:
      merged[row["step"]] = merged.get(row["step"], {}) | row
    assert [*merged.values()] == read_metrics(workdir)
