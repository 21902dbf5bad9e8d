"""How a pair of processes ends: together, with the words and the exit status of the one
that could not go on."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from dca_jax.devices.processes import LOST

# Exit statuses, and how the last line of each process begins.
ENDS = {
  "a_bug": (1, ["dca-jax: process 1 has ended: ZeroDivisionError", "ZeroDivisionError"]),
  "a_bug_in_the_first": (
    1,
    ["ZeroDivisionError", "dca-jax: process 0 has ended: ZeroDivisionError"],
  ),
  "a_mistake": (
    1,
    ["dca-jax: error: process 1 has ended: the disk is full", "dca-jax: error: the disk is full"],
  ),
  "two_mistakes": (1, ["dca-jax: error: ", "dca-jax: error: "]),
  "one_is_stuck": (
    LOST,
    ["dca-jax: process 1 has been at 'reviews' for 4 s; the same command again continues"] * 2,
  ),
  "one_takes_its_time": (0, ["came"] * 2),
  "one_is_dead": (
    LOST,
    ["dca-jax: process 1 has not been heard of for 4 s; the same command again continues", ""],
  ),
  # Either may find it out first, and then the other hears of it.
  "one_meets_once_more": (1, ["dca-jax: error: process "] * 2),
  "other_settings": (1, ["dca-jax: error: process 1 has setting steps 11 and process 0 10"] * 2),
  "one_is_stopped_while_it_starts": (
    143,
    ["dca-jax: process 1 has ended: stopped by SIGTERM", "dca-jax: stopped by"],
  ),
  "one_is_stopped_in_a_step": (143, ["dca-jax: stopped by SIGTERM"] * 2),
  "one_is_stopped_while_both_wait_for_reviews": (130, ["dca-jax: stopped by Ctrl-C"] * 2),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  """All pairs at once: the folder of what they said, and how they ended."""
  folder = tmp_path_factory.mktemp("pairs")
  script = str(pathlib.Path(__file__).with_name("pairs.py"))
  made = subprocess.run(
    [sys.executable, script, str(folder)], capture_output=True, text=True, check=True
  )
  return folder, json.loads(made.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ENDS)
def test_a_pair_ends_together(pairs, name):
  folder, ended = pairs
  status, begins = ENDS[name]
  said = [(folder / f"{name}_{me}.out").read_text() for me in range(2)]
  last = [(text.strip().splitlines() or [""])[-1] for text in said]
  assert ended[name] == [status, -9 if name == "one_is_dead" else status], said
  for line, begin in zip(last, begins, strict=True):
    assert line.startswith(begin), said
  if "bug" in name:  # The traceback, on both.
    assert all("print(1 // 0)" in text for text in said)
  if name == "one_is_stopped_in_a_step":  # At the same place.
    steps = [[line for line in text.splitlines() if line.isdigit()] for text in said]
    assert steps[0] == steps[1]
    assert len(steps[0]) > 3


def test_processes_at_different_places_are_told_apart_by_both(pairs):
  folder, _ = pairs
  for me in range(2):
    said = (folder / f"one_meets_once_more_{me}.out").read_text().strip().splitlines()[-1]
    assert re.search("process 0 (is )?at 'metrics'", said), said
    assert re.search("process 1 (is )?at 'refill'", said), said
