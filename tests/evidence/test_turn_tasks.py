"""The tasks with environments: their labels are exact, and a run on one can be killed."""

import shutil

import pytest
import tiny
from ml_collections import ConfigDict

import dca_jax
from dca_jax import config as config_lib
from dca_jax.episode import Problem
from dca_jax.tasks.tokenizer import text_of
from evidence.tasks import Calculator, Search

SUMS = "7+3*4-2>"  # 7, 0, 0, 8.


@pytest.mark.parametrize(
  ("steps", "roles"),
  [
    (["7+3$", "0*4$", "0-2$", "#8$"], ["necessary"] * 4),
    (["7+3$", "7+3$", "5+5$", "0*4$", "0-2$", "#8$"],
     ["necessary", "redundant", "irrelevant", "necessary", "necessary", "necessary"]),
    # A wrong call, what follows from it, and the way back.
    (["7+3$", "1*4$", "4-2$", "#2$"], ["necessary", "error", "inherits", "inherits"]),
    (["7+3$", "1*4$", "0*4$", "0-2$", "#8$"],
     ["necessary", "error", "repair", "necessary", "necessary"]),
    # In the head; and what is asked for afterwards.
    (["0*4$", "7+3$", "#8$"], ["necessary", "redundant", "necessary"]),
    (["#3$"], ["error"]),
    (["hm$", "7+"], ["error", "irrelevant"]),
  ],
)  # fmt: skip
def test_the_calculators_labels(steps, roles):
  assert Calculator().label_steps(SUMS, steps, truncated=steps[-1] == "7+") == roles


def test_the_searchs_labels():
  task = Search()
  prompt = next(p for i in range(99) if len(task._path(p := task.problem("train", i).prompt)) == 3)
  first, second, digit = task._path(prompt)
  other = next(key for key in task.table(prompt) if key not in (first, second))
  steps = [f"{first}$", f"{other}$", f"{first}$", f"{second}$", f"#{digit}$"]
  wanted = ["necessary", "irrelevant", "redundant", "necessary", "necessary"]
  assert task.label_steps(prompt, steps, False) == wanted
  wrong = f"#{(int(digit) + 1) % 10}$"
  assert task.label_steps(prompt, [*steps[:1], "??$", wrong], False) == [
    "necessary", "error", "error",
  ]  # fmt: skip


@pytest.mark.parametrize("task", [Calculator(), Search()], ids=["calculator", "search"])
@pytest.mark.parametrize("mistakes", [False, True])
def test_demonstrations_are_what_an_episode_would_be(task, mistakes):
  """Played against the environment, turn by turn."""
  right = []
  for i in range(60):
    prompt, text = task.demonstration(i, mistakes)
    problem = Problem(i, prompt, task.problem("demonstrations", i).answer)
    environment, turns, left = task.environment(problem, 0), [], text
    while left:
      said, _, left = left.partition("$")
      turns.append(f"{said}$")
      turn = environment.step(turns[-1])
      assert turn.done == (not left)
      assert 0 <= turn.score <= 1 or turn.done
      assert left.startswith(turn.observation or "")
      left = left.removeprefix(turn.observation or "")
    right.append(turn.outcome.correct)
    roles = task.label_steps(prompt, turns, False)
    assert (roles[-1] in ("necessary", "repair")) == turn.outcome.correct
    if not mistakes:
      once = [r for r, t in zip(roles, turns, strict=True) if turns.count(t) == 1]
      assert {*once} == {"necessary"}
      assert turn.outcome.correct
    tokenizer = task.tokenizer()
    assert text_of(tokenizer, tokenizer(text)["input_ids"]) == text
  assert mistakes == (sum(right) < len(right))


def test_a_run_with_an_environment_goes_on_where_it_was(tmp_path):
  """Also with potential credit from the environment's own scores, and with spot checks."""
  changes = {
    "task": {"name": "evidence.tasks:Search", "longest": 2, "needless": 0.3},
    "rollout.max_tokens": 24,
    "credit.scheme": "potential",
    "value.source": "environment",
    "spot.share": 0.5,
  }
  settings = tiny.settings(changes)
  whole = dca_jax.train(settings, tmp_path / "whole", quiet=True)
  shutil.copytree(tmp_path / "whole", tmp_path / "cut")
  ours = dca_jax.train(settings, tmp_path / "cut", "2", quiet=True)
  assert ours.episodes(3) == whole.episodes(3)
  tiny.assert_same_arrays(tiny.saved_state(tmp_path / "cut"), tiny.saved_state(tmp_path / "whole"))
  episodes = whole.episodes(3)
  assert any(len(e.segments) > 2 for e in episodes)
  for episode in episodes:
    given = [i for s, e, own in episode.spans() if not own.sampled for i in range(s, e)]
    assert not any(episode.credit[i] for i in given)
    turns = [k for k, segment in enumerate(episode.segments) if segment.sampled]
    assert len(episode.steps) == len(turns)
  assert any(e.checks for step in (1, 2, 3) for e in whole.episodes(step))
  last = whole.metrics[-1]
  assert last["train/unjudged_further"] == 0
  label = Search(longest=2).label_steps
  true = [
    label(e.problem.prompt, [step.text for step in e.steps], e.outcome.truncated) for e in episodes
  ]
  needless = sum(role in ("redundant", "irrelevant") for own in true for role in own)
  assert last["train/needless"] == needless / len(episodes)
  assert last["train/turns"] > 1
  assert last["seconds/environments"] > 0


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"task.max_turns": 0}, "task.max_turns: must be at least 1"),
    ({"task.name": "chains", "value.source": "environment", "credit.scheme": "potential"},
     "value.source: needs a task with an environment"),
  ],
)  # fmt: skip
def test_what_cannot_be_is_refused(changes, said):
  given = {"task.name": "evidence.tasks:Search"} | changes
  nested = config_lib.nested(given) if hasattr(config_lib, "nested") else given
  with pytest.raises(config_lib.ConfigError, match=said):
    config_lib.build(ConfigDict(nested))
