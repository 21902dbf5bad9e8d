"""Who drifts towards steps that only please the reviewer, and that accuracy does not show it."""

import json

import numpy as np
import pytest

from evidence.lab import checks, drift, room
from evidence.lab.__main__ import main

ROOMS = ("uniform (RLOO)", "weighted, fooled")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
  """What `python -m evidence.lab` leaves: its folder and its numbers."""
  folder = tmp_path_factory.mktemp("lab") / "new"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(drift, "SEEDS", 16)  # Enough for what is asked below.
    patch.setattr(checks, "DRAWS", 2)
    patch.setattr(room, "SEEDS", 4)
    patch.setattr(room, "STARTS", {"some succeed": room.STARTS["some succeed"]})
    patch.setattr(room, "ARMS", {name: room.ARMS[name] for name in ROOMS})
    main([f"--workdir={folder}"])
    yield folder, json.loads((folder / "lab.json").read_text())


def error(end):
  return end["spread"] / drift.SEEDS**0.5


@pytest.mark.slow
def test_every_arm_learns_and_only_some_drift(lab):
  ends = lab[1]["drift"]
  assert all(end["worst"] > 0.99 for end in ends.values())
  start = drift.SLOTS / 3
  drifts = (
    "weighted, fooled",
    "weighted, lambda 1, fooled",
    "return_to_go, fooled",
    "potential 0, fooled",
  )
  for name, end in ends.items():
    moved = (end["checks"] - start) / error(end)
    assert moved > 4 if name in drifts else moved < -4


@pytest.mark.slow
def test_what_drifts_drifts_because_the_reviewer_is_fooled(lab):
  ends = lab[1]["drift"]
  for scheme in ("potential 0", "weighted"):
    assert ends[f"{scheme}, fooled"]["checks"] > ends[f"{scheme}, honest"]["checks"] + 2


@pytest.mark.slow
def test_potential_1_with_a_fooled_reviewer_ends_where_rloo_does(lab):
  rloo, safe = (lab[1]["drift"][name] for name in ("uniform (RLOO)", "potential 1, fooled"))
  noise = np.hypot(error(rloo), error(safe))
  assert noise < 0.25  # Otherwise the next line would prove nothing.
  assert abs(safe["checks"] - rloo["checks"]) < 3 * noise


@pytest.mark.slow
def test_theatre_that_costs_something_is_kept_up_where_it_is_applauded(lab):
  rloo, fooled = (lab[1]["room"]["some succeed"][name] for name in ROOMS)
  assert rloo["checks"] < 0.5
  assert fooled["checks"] > rloo["checks"] + 1
  assert fooled["worst"] > 0.97


@pytest.mark.slow
def test_lab_writes_its_figures_and_prints_its_tables(lab, capsys):
  folder, numbers = lab
  for name in ("lab.png", "checks.png", "drift.png", "room.png"):
    assert (folder / name).read_bytes().startswith(b"\x89PNG")
  assert numbers["tree"][0]["name"] == "uniform (RLOO)"
  with pytest.raises(SystemExit, match="2"):
    main([f"--workdir={folder}", "--config.seed=1"])
  assert "--config.seed=1" in capsys.readouterr().err


def test_the_value_table_is_the_chance_of_a_policy_that_picks_at_random():
  rng = np.random.default_rng(0)
  advances = rng.integers(0, 3, (200_000, drift.SLOTS)) == 0
  table = drift.value_table()
  for slot, progress in ((0, 0), (3, 1), (8, 2), (8, 3), (9, 4)):
    share = np.mean(progress + advances[:, slot:].sum(1) >= drift.NEEDED)
    assert table[slot, progress] == pytest.approx(share, abs=0.01)
