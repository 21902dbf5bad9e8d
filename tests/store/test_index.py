"""An index of trajectories: what is found, and that it follows a run that goes on."""

import json

import numpy as np
import pytest
from etils import epath

from dca_jax.episode import Episode, Outcome, Problem, Review, Segment, Step
from dca_jax.store.index import PAGE, Index
from dca_jax.store.trajectories import read_trajectories, write_trajectories


def episode(step: int, problem: int, sample: int, right: bool = True, role: str = "error"):
  n = 1 + sample
  tokens = np.arange(n, dtype=np.int32)
  review = Review("ok", (role,), (1.0,)) if role else Review("skipped")
  return Episode(
    f"{step}/{problem}/{sample}",
    Problem(problem, f"question {problem} 東", "7"),
    (Segment(tokens, True, np.zeros(n, np.float32)),),
    Outcome(float(right), right, False),
    (Step(0, n, "x" * n),),
    review=review,
    advantage=-0.5 * sample,
    credit=[0.25] * n,
  )


@pytest.fixture
def folder(tmp_path) -> epath.Path:
  folder = epath.Path(tmp_path / "run" / "trajectories")
  for step in (1, 2):
    groups = [(2**40 + 2 * step, "necessary"), (2 * step + 1, "")]
    own = [episode(step, p, g, right=g > 0, role=role) for p, role in groups for g in range(30)]
    write_trajectories(folder, step, 0, own)
  return folder


@pytest.fixture
def index(folder, tmp_path) -> Index:
  index = Index(folder, tmp_path / "cache")
  index.update()
  return index


@pytest.mark.parametrize(
  ("wanted", "count"),
  [
    ({}, 120),
    ({"step": "2"}, 60),
    ({"step": "9"}, 0),
    ({"problem": "3"}, 30),
    ({"problem": str(2**40 + 4)}, 30),
    ({"problem": "question 3"}, 30),
    ({"problem": "' OR 1=1 --"}, 0),
    ({"outcome": "wrong"}, 4),
    ({"review": "skipped", "step": "1"}, 30),
    ({"role": "necessary"}, 60),
    ({"role": "necess"}, 0),
    ({"least": "29"}, 8),
  ],
)
def test_what_is_wanted_is_found(index, wanted, count):
  assert index.find(wanted)["total"] == count


def test_pages_in_order(index):
  first, second = (index.find({}, "length", True, page)["rows"] for page in (0, 1))
  lengths = [row["length"] for row in (*first, *second)]
  assert (len(first), len(second)) == (PAGE, PAGE)
  assert lengths == sorted(lengths, reverse=True)
  assert {(r["step"], r["problem"], r["sample"]) for r in first}.isdisjoint(
    (r["step"], r["problem"], r["sample"]) for r in second
  )
  assert first[0]["problem"] == "3"  # As text: a browser's numbers end at 2^53.
  assert first[0]["prompt"] == "question 3 東"


@pytest.mark.parametrize("wanted", [{"stepp": "1"}, {"step": "x"}, {"step": "1; DROP TABLE files"}])
def test_nonsense_is_refused(index, wanted):
  with pytest.raises((KeyError, ValueError)):
    index.find(wanted)
  with pytest.raises(KeyError):
    index.find({}, sort="step; DROP TABLE files")


def test_an_episode_is_read_as_it_was_written(index, folder):
  (found,) = index.read({"step": "2", "problem": "5", "sample": "3"})
  assert found == [*read_trajectories(folder, 2)][33]
  (folder / "step_000002.jsonl").write_text("{}\n")
  assert index.read({"step": "2", "problem": "5"}) == []  # Until the next update.


def test_it_follows_the_folder_and_writes_nothing_there(index, folder):
  before = {path.name for path in folder.iterdir()}
  write_trajectories(folder, 3, 1, [episode(3, 7, 0)])
  index.update()
  assert index.find({})["total"] == 121
  line = (folder / "step_000001.jsonl").read_text().splitlines()[0]
  damaged = json.dumps({**json.loads(line), "credit": "x"})
  (folder / "step_000001.jsonl").write_text(f"{damaged}\nno line\n{line}\n")
  (folder / "step_000002.jsonl").unlink()
  index.update()
  assert index.find({})["total"] == 2
  assert len(index.read({"step": "1"})) == 1
  assert {path.name for path in folder.iterdir()} == {"step_000001.jsonl", "step_000003_1.jsonl"}
  assert before == {"step_000001.jsonl", "step_000002.jsonl"}
  assert [path.name for path in folder.parent.iterdir()] == ["trajectories"]


def test_an_index_that_is_there_is_taken_up(index, folder, tmp_path, monkeypatch):
  again = Index(folder, tmp_path / "cache")
  monkeypatch.setattr("dca_jax.store.index.parsed", None)  # Nothing is read again.
  again.update()
  assert again.find({})["total"] == 120
  assert again.statuses() == {"ok": 60, "skipped": 60}


def test_a_damaged_index_is_made_anew(index, folder, tmp_path):
  for path in (tmp_path / "cache").iterdir():
    path.write_bytes(b"no database, of some length" * 100)
  again = Index(folder, tmp_path / "cache")
  again.update()
  assert again.find({})["total"] == 120
