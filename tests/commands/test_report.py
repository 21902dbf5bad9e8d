"""report.html: one file that needs nothing else and shows what the run did."""

import dataclasses
import html
import html.parser
import json
import re
import shutil

import pytest
import tiny
from etils import epath

from dca_jax.commands.report import (
  moving_average,
  running_total,
  score_header,
  score_rows,
  text_table,
  write_report,
)
from dca_jax.episode import Review, Step
from dca_jax.loop import train
from dca_jax.store.trajectories import read_trajectories, write_trajectories


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = epath.Path(tmp_path_factory.mktemp("reported") / "run")
  train(
    tiny.make_config({"credit.scheme": "weighted", "reviewer.name": "oracle"}),
    str(workdir),
    quiet=True,
  )
  return workdir


class Page(html.parser.HTMLParser):
  """Which elements a page has, and the values of their attributes."""

  def __init__(self, text: str):
    super().__init__()
    self.tags: list[str] = []
    self.attributes: list[tuple[str, str | None]] = []
    self.settings = ""
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_data(self, data):
    if self.tags[-1:] == ["pre"]:
      self.settings = self.settings or data


def test_the_page_needs_nothing_from_elsewhere(run):
  text = write_report(run).read_text()
  page = Page(text)
  assert not {"script", "link", "img", "iframe"} & set(page.tags)
  # Names of namespaces and licences look like addresses too, but nothing is fetched from them.
  loaded = {"src", "srcset", "href", "xlink:href", "data", "poster", "style"}
  fetched = [value or "" for name, value in page.attributes if name in loaded]
  assert not [value for value in fetched if "//" in value]
  assert not re.search(r"url\(\s*['\"]?(http|//)|@import", text)


def test_the_page_shows_curves_scores_steps_and_settings(run):
  text = write_report(run).read_text()
  page = Page(text)
  assert page.tags.count("svg") == 2
  assert "<path" in text
  lines = tiny.read_lines(run)
  for name in ("greedy", "sampled", "pass@2", "maj@2"):
    for line in (lines[0], lines[-1]):
      assert f"{line[f'eval/{name}']:.3f}" in text
  assert "step 3" in text
  assert "Step 1" in text
  shown = [
    t
    for step in (1, 3)
    for t in read_trajectories(run / "trajectories", step)
    if t.problem.prompt in text
  ]
  assert shown
  assert any(html.escape(s.text) in text for t in shown for s in t.steps)
  assert "class=step" in text
  assert page.settings == json.dumps(json.loads((run / "config.json").read_text()), indent=2)
  assert page.tags[0] == "html"


def said_of(episode, role: str) -> Review:
  """A review that says the same of every step."""
  n = len(episode.steps)
  return Review("ok", (role,) * n, (1.0,) * n)


def test_text_of_problems_and_answers_cannot_become_markup(run, tmp_path):
  copy = epath.Path(tmp_path / "run")
  shutil.copytree(run, copy)
  evil = "<script>alert('x')</script>\"&"
  for step in (1, 3):
    rows = [
      dataclasses.replace(
        t,
        problem=dataclasses.replace(t.problem, prompt=evil, answer=evil),
        steps=tuple(s._replace(text=evil) for s in t.steps),
        review=said_of(t, f'" onmouseover="{evil}'),
      )
      for t in read_trajectories(copy / "trajectories", step)
    ]
    write_trajectories(copy / "trajectories", step, 0, rows)
  text = write_report(copy).read_text()
  page = Page(text)
  assert "script" not in page.tags
  assert "onmouseover" not in dict(page.attributes)
  assert "&lt;script&gt;" in text


def rewritten(run, folder, change):
  """A copy of the run whose trajectories are what `change` makes of them."""
  copy = epath.Path(shutil.copytree(run, folder / "run"))
  for step in (1, 3):
    rows = [change(t) for t in read_trajectories(copy / "trajectories", step)]
    write_trajectories(copy / "trajectories", step, 0, rows)
  return copy


def test_a_colour_means_the_same_credit_in_every_answer(run, tmp_path):
  credits = (-1.5, -0.3, 0.0, 0.1, 0.3, 2.0)

  def change(t):
    """Steps whose credit is that of `credits` in turn, in answers of different advantages."""
    spans = range(min(len(credits), len(t.tokens)))
    steps = tuple(Step(k, k + 1, f"s{k}") for k in spans)
    t = dataclasses.replace(
      t, steps=steps, values=(), advantage=0.01 * (1 + int(t.id.split("/")[2]))
    )
    return dataclasses.replace(
      t, credit=[*credits, *[0.0] * 50][: len(t.tokens)], review=said_of(t, "repair")
    )

  text = write_report(rewritten(run, tmp_path, change)).read_text()
  shown = re.findall(r"background:(#\w+)\">s(\d) <small>repair ([^<]+)</small>", text)
  assert len(shown) > 10
  colours = {k: {colour for colour, step, _ in shown if step == k} for k in "012345"}
  assert all(len(own) == 1 for own in colours.values())
  assert len(set.union(*colours.values())) == 6
  # The legend has every colour that is used, and the credit stands there as text too.
  legend = set(re.findall(r"background:(#\w+)\">[^s<]", text))
  assert set.union(*colours.values()) <= legend
  assert {said for _, step, said in shown if step == "0"} == {"\u22121.50"}


def test_what_a_step_did_can_be_read_without_a_mouse(run):
  text = write_report(run).read_text()
  assert "title" not in dict(Page(text).attributes)
  steps = text.split("class=step")[1:]
  labelled = [
    step for step in steps if re.search(r"<small>[a-z (]+\)? [+\u2212]\d\.\d\d</small>", step)
  ]
  assert len(steps) - len(labelled) == 9  # The legend.


def test_a_section_with_nothing_in_it_says_why(run, tmp_path):
  copy = rewritten(run, tmp_path, lambda t: dataclasses.replace(t, advantage=0.0))
  assert write_report(copy).read_text().count("The completions of every problem fared alike") == 2
  (copy / "trajectories" / "step_000001.jsonl").unlink()
  assert write_report(copy).read_text().count("The trajectories of this step are not in") == 1
  wins = rewritten(
    run,
    tmp_path / "wins",
    lambda t: dataclasses.replace(
      t, advantage=0.5, outcome=dataclasses.replace(t.outcome, correct=True)
    ),
  )
  assert write_report(wins).read_text().count("none was wrong") == 2


def test_what_looks_wrong_is_shown(run, tmp_path):
  copy = epath.Path(shutil.copytree(run, tmp_path / "run"))
  assert "What looks wrong" not in write_report(copy).read_text()
  row = tiny.read_lines(copy)[-1] | {"train/truncated": 1.0}
  lines = "".join(json.dumps(row | {"step": step}) + "\n" for step in range(4, 10))
  (copy / "metrics.jsonl").write_text((copy / "metrics.jsonl").read_text() + lines)
  assert "step 8: every completion has been cut off" in write_report(copy).read_text()


def test_writing_it_touches_no_other_file(run):
  before = {path.name for path in run.iterdir()}
  write_report(run)
  assert {path.name for path in run.iterdir()} == before | {"report.html"}


def test_score_rows_compare_the_first_and_the_last_evaluation():
  def scores(value):
    return {"eval/greedy": value, "eval/greedy_low": value - 0.1, "eval/greedy_high": value + 0.1}

  metrics = [
    {"step": 0, **scores(0.2)},
    {"step": 1, "train/reward": 0.5},
    {"step": 2, **scores(0.7)},
  ]
  assert score_rows(metrics) == [["greedy", "0.200 [0.100, 0.300]", "0.700 [0.600, 0.800]"]]


def test_score_rows_say_which_steps_they_are_of():
  def row(step, **scores):
    return {"step": step} | {
      f"eval/{name}{end}": x for name, x in scores.items() for end in ("", "_low", "_high")
    }

  several = [row(0, length=1.0), row(5, length=5.0), {"step": 6}, row(7, length=7.0, greedy=0.5)]
  assert score_header(several) == ["held-out", "step 0", "step 7"]
  assert score_rows(several) == [["length", "1.0", "7.0"], ["greedy", "-", "0.5"]]
  assert score_header(several[1:3]) == ["held-out", "step 5"]
  assert score_rows(several[1:3]) == [["length", "5.0"]]
  assert (score_header([]), score_rows([])) == (["held-out"], [])


def test_a_row_of_another_version_adds_nothing_to_a_total():
  assert running_total([{"x": 2.0}, {}, {"x": 3.0}], "x") == [2.0, 2.0, 5.0]


def test_moving_average_is_over_what_has_been_so_far():
  assert moving_average([0.0] * 4 + [5.0, 0.0, 0.0, 0.0, 0.0, 0.0]) == [0.0] * 4 + [1.0] * 5 + [0.0]
  assert moving_average([1.0, 3.0, 5.0], window=2) == [1.0, 2.0, 4.0]


def test_text_table_aligns_its_columns():
  table = text_table(["a", "long header"], [["wide cell", "x"]]).splitlines()
  assert table[0].index("long") == table[2].index("x")
