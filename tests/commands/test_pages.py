"""Pages: whatever a policy, a reviewer or a user wrote is text on them, and all of it."""

import html.parser

import jinja2
import pytest

from dca_jax.commands.pages import markup, render
from dca_jax.commands.view import _page

EVIL = (
  "<script>alert('x')</script>",
  '" onmouseover="alert(1)',
  "' autofocus onfocus='x",
  "</span></div><img src=x onerror=alert(1)>",
  "</pre></details><iframe srcdoc=x>",
  "</style><style>*{display:none}",
  "<!-- ",
  "&lt;b&gt; &amp; &#60;b&#62;",
  "{{ 7 * 7 }} {% raw %} {# gone #}",
  "<svg/onload=x>",
  "\\x3cb\\x3e <\u200bb>",
)


class Parsed(html.parser.HTMLParser):
  """The elements of a page with their attributes, and the text between them."""

  def __init__(self, text: str):
    super().__init__()
    self.tags: list[tuple] = []
    self.text: list[str] = []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, *attrs))

  def handle_endtag(self, tag):
    self.tags.append((tag,))

  def handle_data(self, data):
    self.text.append(data.strip())

  def handle_comment(self, data):
    self.tags.append(("comment", data))


def answers(text: str) -> str:
  step = {"given": text, "text": text, "label": text, "shade": "#ffffff", "why": text}
  return render("answers.html", answers=[{"prompt": text, "steps": [step], "verdict": text}])


def comparison(text: str) -> str:
  svg = markup("<svg></svg>")
  return render("compare.html", title=text, chart=svg, about=text, header=[text], rows=[[text]])


def report(text: str) -> str:
  lists = {"scores_header": [text], "scores": [[text]], "seconds": [[text, text]]}
  told = dict.fromkeys(("title", "about", "lost", "notation", "settings"), text)
  return _page({"findings": [text], **lists, **told}, {"runs": []}, gone=[text])


@pytest.mark.parametrize(("page", "times"), [(answers, 6), (comparison, 5), (report, 12)])
@pytest.mark.parametrize("evil", EVIL)
def test_no_text_becomes_markup_and_none_is_lost(page, times, evil):
  ours, plain = Parsed(page(evil)), Parsed(page("plain"))
  assert ours.tags == plain.tags
  assert sum(text.count(evil.strip()) for text in ours.text) == times


def test_white_space_of_an_answer_is_kept():
  text = "  one\n\n\ttwo  "
  assert f">{text} <small>" in answers(text)
  assert f"<div class=answer>{text}<br>" in answers(text)


def test_a_value_that_is_missing_is_an_error():
  with pytest.raises(jinja2.UndefinedError):
    render("compare.html", title="x", chart="", about="", header=[])
