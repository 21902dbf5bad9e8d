"""report.html: one file that needs nothing else and shows what the run did."""

import dataclasses
import json
import re
import shutil

import numpy as np
import tiny
from etils import epath

from dca_jax.commands.report import (
  moving_average,
  running_total,
  score_header,
  score_rows,
  text_table,
)
from dca_jax.commands.view import write_report
from dca_jax.episode import Review, Segment, Step
from dca_jax.store.trajectories import read_trajectories


def words(page, selector: str) -> list[str]:
  return page.locator(selector).all_text_contents()


def test_the_page_needs_nothing_from_elsewhere(reviewed, look):
  path = write_report(reviewed)
  page = look(f"file://{path}")
  asked = page.evaluate("performance.getEntriesByType('resource').map((entry) => entry.name)")
  assert asked == []
  assert not re.search(r"url\(\s*['\"]?(http|//)|@import", path.read_text())
  assert page.locator("link, img, iframe, script[src]").count() == 0


def test_the_page_shows_curves_scores_steps_and_settings(reviewed, look):
  page = look(f"file://{write_report(reviewed)}")
  text = page.inner_text("body")
  assert page.get_by_role("img", name=re.compile(r"^Accuracy, by step: accuracy from")).count() == 1
  assert page.locator("polyline").count() >= 10
  assert "Two chains of arithmetic" in text
  lines = tiny.read_lines(reviewed)
  for name in ("greedy", "sampled", "pass@2", "maj@2"):
    for line in (lines[0], lines[-1]):
      assert f"{line[f'eval/{name}']:.3f}" in text
  kept = [t for step in (1, 3) for t in read_trajectories(reviewed / "trajectories", step)]
  assert page.inner_text("#count") == f"{len(kept)} episodes, page 1 of 1"
  moved = next(t for t in kept if t.advantage and t.review.roles)
  page.get_by_role("button", name=f"Open episode {moved.id}").click()
  steps = words(page, "#episode .answer >> nth=0 >> .step")
  assert len(steps) == len(moved.steps)
  for said, step, role in zip(steps, moved.steps, moved.review.roles, strict=True):
    assert said.startswith(f"{step.text}{role} ")
  group = [t for t in kept if t.id.rpartition("/")[0] == moved.id.rpartition("/")[0]]
  assert page.locator("#episode .answer").count() == len(group)
  settings = json.dumps(json.loads((reviewed / "config.json").read_text()), indent=2)
  assert page.locator("pre").text_content() == settings


def test_it_says_why_an_answer_was_not_reviewed(reviewed, rewritten, tmp_path, look):
  page = look(f"file://{write_report(reviewed)}")
  page.locator("#episode .step").first.wait_for()
  assert "skipped:" not in page.inner_text("#episode")  # It begins with one that was.
  kept = [t for step in (1, 3) for t in read_trajectories(reviewed / "trajectories", step)]
  alike = next(t for t in kept if t.review.status == "skipped" and not t.advantage)
  page.get_by_role("button", name=f"Open episode {alike.id}", exact=True).click()
  page.get_by_text("skipped: all answers of the group fared alike, so no review could").wait_for()

  copy = rewritten(tmp_path, lambda t: dataclasses.replace(t, review=Review("none"), values=()))
  saved = json.loads((copy / "config.json").read_text())
  saved["reviewer"]["name"] = "none"
  (copy / "config.json").write_text(json.dumps(saved))
  page = look(f"file://{write_report(copy)}")
  page.get_by_text("This run has no reviewer").wait_for()
  assert {*words(page, "#episodes .of-review")} == {"no reviewer"}
  assert all(s.startswith("no reviewer ") for s in words(page, "#episode .step small"))


def test_noise_does_not_fill_a_chart(reviewed, tmp_path, look):
  copy = epath.Path(shutil.copytree(reviewed, tmp_path / "run"))
  rows = tiny.read_lines(copy)
  for row in rows[1:]:
    row |= {"credit/moved": 1 + 1e-7 * (row["step"] % 2), "train/length": 0.0}
  (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  page = look(f"file://{write_report(copy)}")

  def axis(name: str) -> list[str]:
    chart = page.get_by_role("img", name=re.compile(f"^{name}"))
    return chart.locator("text[text-anchor=end]").all_text_contents()[:3]

  assert axis("Credit moved") == ["0.99", "1", "1.01"]
  assert axis("Length") == ["0", "0.5", "1"]


def test_what_stands_between_backticks_is_code(reviewed, look):
  page = look(f"file://{write_report(reviewed)}")
  assert "`" not in page.locator(".note", has_text="Two chains of arithmetic").text_content()
  assert "a0;c6;#6$" in words(page, "code")


def said_of(episode, role: str) -> Review:
  """A review that says the same of every step."""
  n = len(episode.steps)
  return Review("ok", (role,) * n, (1.0,) * n)


CORPUS = (
  "<script>alert('x')</script>\"&",
  "</script><script>alert(1)</script>",
  '" onmouseover="alert(1)',
  "<img src=x onerror=alert(1)>",
  '<a href="javascript:alert(1)">x</a>',
  "javascript:alert(1)",
  "\u202eright to left\u202c\u2067\u200f",
  "<!--<script>",
  "x" * 2**20,
)


def test_text_of_problems_and_answers_cannot_become_markup(rewritten, tmp_path, look):
  own: dict[str, str] = {}

  def change(t):
    """An episode with one of the texts wherever there can be any."""
    evil = own.setdefault(t.id, CORPUS[len(own) % len(CORPUS)])
    if evil == CORPUS[-1] and [*own.values()].count(evil) > 1:
      return t
    return dataclasses.replace(
      t,
      problem=dataclasses.replace(t.problem, prompt=evil, answer=evil),
      steps=tuple(s._replace(text=evil) for s in t.steps[:1]),
      review=dataclasses.replace(
        said_of(t, evil), roles=(evil,), weights=(1.0,), model=evil, reasons=(evil,)
      ),
      values=(),
    )

  copy = rewritten(tmp_path, change)
  shutil.rmtree(copy / "tokenizer")  # So that the text of steps is shown, and not that of tokens.
  page = look(f"file://{write_report(copy)}")
  for id, evil in [*own.items()][: len(CORPUS)]:
    page.get_by_role("button", name=f"Open episode {id}", exact=True).click()
    page.get_by_role("heading", name=f"Episode {id}").wait_for()
    assert page.locator(".prompt-text").text_content() == evil
    said = page.locator("#episode .answer").first.text_content()
    assert said.count(evil) >= 4  # Model, text, role, reason.
  assert page.locator("script").count() == 2
  assert page.locator("main a, main img, [onmouseover]").count() == 0
  isolated = page.locator("#episode .step").first.evaluate("(e) => getComputedStyle(e).unicodeBidi")
  assert "isolate" in isolated
  assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_no_script_but_its_own_runs(reviewed, chromium, tmp_path):
  """Also where markup had found a way into it."""
  path, said = tmp_path / "page.html", []
  text = write_report(reviewed).read_text()
  path.write_text(text.replace("<main>", "<main><script>document.title = 'evil'</script>"))
  page = chromium.new_page()
  page.on("console", lambda message: said.append(message.text))
  page.goto(f"file://{path}")
  assert page.title() != "evil"
  assert "Content Security Policy" in said[0]


def test_a_colour_means_the_same_credit_in_every_answer(rewritten, tmp_path, look):
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

  page = look(f"file://{write_report(rewritten(tmp_path, change))}")
  colours: dict[str, set[str]] = {}
  for opened in page.get_by_role("button", name="Open episode").all()[:2]:
    opened.click()
    for step in page.locator("#episode .step").all():
      said = step.locator("small").text_content()
      colour = step.evaluate("(e) => getComputedStyle(e).backgroundColor")
      colours.setdefault(said.split()[-1], set()).add(colour)
  assert {*colours} == {"\u22121.50", "\u22120.30", "+0.00", "+0.10", "+0.30", "+2.00"}
  assert all(len(own) == 1 for own in colours.values())
  assert len(set.union(*colours.values())) == 6


def test_what_a_step_did_can_be_read_without_a_mouse(reviewed, look):
  page = look(f"file://{write_report(reviewed)}")
  assert page.locator("[title]").count() == 0
  opened = page.get_by_role("button", name="Open episode").first
  opened.focus()
  page.keyboard.press("Enter")
  page.locator("#episode h2:focus").wait_for()
  assert all(re.search(r"[a-z (]+\)?.* [+\u2212]\d\.\d\d", s) for s in words(page, ".step small"))
  page.locator("#episode .step[tabindex]").first.focus()
  assert re.search(r". [+\u2212]\d\.\d\d\d", page.inner_text("#token"))
  page.keyboard.press("Escape")
  page.locator("#episode").wait_for(state="hidden")


def test_what_an_environment_says_stands_between_the_steps(rewritten, tmp_path, look):
  def change(t):
    cut = t.steps[0].end
    parts = [t.tokens[:cut], [1, 2], t.tokens[cut:]]
    segments = [
      Segment(np.array(own, np.int32), i != 1, np.zeros(len(own)), "<b>a tool</b>" * (i == 1))
      for i, own in enumerate(parts)
    ]
    later = (s._replace(start=s.start + 2, end=s.end + 2) for s in t.steps[1:])
    credit = [*t.credit[:cut], 0.0, 0.0, *t.credit[cut:]]
    steps = t.steps[0], *later
    return dataclasses.replace(t, segments=tuple(segments), steps=steps, credit=credit)

  page = look(f"file://{write_report(rewritten(tmp_path, change))}")
  page.get_by_role("button", name="Open episode").first.click()
  parts = page.locator("#episode .answer").first.locator(".step, .given")
  assert parts.nth(1).text_content() == "<b>a tool</b>"


def test_a_section_with_nothing_in_it_says_why(rewritten, tmp_path):
  copy = rewritten(tmp_path, lambda t: t)
  (copy / "trajectories" / "step_000001.jsonl").unlink()
  assert write_report(copy).read_text().count("The trajectories of this step are not in") == 1


def test_what_looks_wrong_is_shown(reviewed, tmp_path):
  copy = epath.Path(shutil.copytree(reviewed, tmp_path / "run"))
  assert "What looks wrong" not in write_report(copy).read_text()
  row = tiny.read_lines(copy)[-1] | {"train/truncated": 1.0}
  lines = "".join(json.dumps(row | {"step": step}) + "\n" for step in range(4, 10))
  (copy / "metrics.jsonl").write_text((copy / "metrics.jsonl").read_text() + lines)
  assert "step 8: every completion has been cut off" in write_report(copy).read_text()


def test_writing_it_touches_no_other_file(reviewed, tmp_path):
  before = {path.name for path in reviewed.iterdir()} | {"report.html"}
  write_report(reviewed)
  assert {path.name for path in reviewed.iterdir()} == before
  assert write_report(reviewed, epath.Path(tmp_path / "page.html")).stat().length > 5000


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
