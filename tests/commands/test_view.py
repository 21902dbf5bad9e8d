"""The server of a run's page, and the page in a real browser."""

import contextlib
import http.client
import json
import re
import shutil
import threading
import time

import pytest
from etils import epath

from dca_jax.commands.view import view
from dca_jax.store.trajectories import read_trajectories


@contextlib.contextmanager
def served(workdir, against=None):
  """The port of a server."""
  with view(str(workdir), against and str(against), 0) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()


@pytest.fixture(scope="module")
def port(reviewed):
  with served(reviewed) as port:
    yield port


def get(port: int, path: str, method: str = "GET", host: str = ""):
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
  connection.request(method, path, headers={"Host": host or f"localhost:{port}"})
  answer = connection.getresponse()
  return answer.status, answer.read().decode()


@pytest.mark.parametrize("host", ["evil.example:80", "evil.example", "127.0.0.1.evil.example:1"])
def test_another_sites_name_is_refused(port, host):
  for path in ("/", "/episodes", "/metrics"):
    assert get(port, path, host=host)[0] == 403


@pytest.mark.parametrize(
  ("path", "status"),
  [
    ("/config.json", 404),
    ("/../config.json", 404),
    ("/episodes?sort=file", 400),
    ("/episodes?run=7", 400),
    ("/episodes?page=x", 400),
    ("/metrics?since=" + "9" * 400, 200),
    ("/episode?step=1", 400),
    ("/episode?step=99&problem=1&sample=0", 200),
  ],
)
def test_nonsense_ends_in_a_status(port, path, status):
  assert get(port, path)[0] == status


def test_it_answers_questions_alone(port):
  for method in ("POST", "PUT", "DELETE"):
    assert get(port, "/", method)[0] == 501


def wait_for(port: int, count: int) -> None:
  """Returns when so many episodes are in the index."""
  pause = threading.Event()
  while json.loads(get(port, "/episodes")[1])["total"] != count:
    pause.wait(0.05)


def test_it_follows_a_run_that_goes_on(reviewed, tmp_path, look):
  copy = epath.Path(shutil.copytree(reviewed, tmp_path / "run"))
  metrics = copy / "metrics.jsonl"
  lines, shard = metrics.read_text().splitlines(), copy / "trajectories" / "step_000003.jsonl"
  last = shard.read_bytes()
  metrics.write_text("\n".join(lines[:-1]) + "\n")
  shard.unlink()
  with served(copy) as port:
    wait_for(port, 32)
    page = look(f"http://127.0.0.1:{port}/")
    page.get_by_role("img", name=re.compile("^Length")).wait_for()
    before = page.get_by_role("img", name=re.compile("^Length")).locator("polyline")
    assert before.get_attribute("points").count(",") == 2
    metrics.write_text("\n".join(lines) + "\n")
    shard.write_bytes(last)
    page.locator("#count", has_text="48 episodes").wait_for()
    length = page.get_by_role("img", name=re.compile("^Length")).locator("polyline")
    end = time.monotonic() + 60
    while length.get_attribute("points").count(",") != 3:
      assert time.monotonic() < end


def test_the_table_filters_and_sorts(port, reviewed, look):
  kept = [t for step in (1, 2, 3) for t in read_trajectories(reviewed / "trajectories", step)]
  wait_for(port, len(kept))
  page = look(f"http://localhost:{port}/")

  def shows(count: int) -> None:
    page.locator("#count", has_text=re.compile(f"^{count} episodes")).wait_for()

  shows(len(kept))
  page.get_by_role("combobox", name="Outcome").select_option("right")
  shows(sum(t.outcome.correct for t in kept))
  page.get_by_role("textbox", name="Step").fill("2")
  shows(sum(t.outcome.correct for t in kept if t.id.startswith("2/")))
  page.get_by_role("button", name="Show all").click()
  shows(len(kept))
  page.get_by_role("combobox", name="Role").select_option("error")
  shows(sum("error" in t.review.roles for t in kept))
  page.get_by_role("button", name="Tokens", exact=False).click()
  page.locator("th[aria-sort=ascending]", has_text="Tokens").wait_for()
  page.get_by_role("button", name="Tokens", exact=False).click()
  page.locator("th[aria-sort=descending]", has_text="Tokens").wait_for()
  lengths = [int(n) for n in page.locator("#episodes tbody td:nth-child(8)").all_text_contents()]
  assert lengths == sorted(lengths, reverse=True)
  assert page.locator("th[aria-sort=descending] button:focus").count() == 1


def test_another_run_stands_beside_it(reviewed, look):
  with served(reviewed, reviewed) as port:
    wait_for(port, 48)
    while json.loads(get(port, "/episodes?run=1")[1])["total"] != 48:
      pass
    page = look(f"http://127.0.0.1:{port}/#1/{first_problem(port)}/0")
    page.get_by_role("heading", name="The other run on the same problem").wait_for()
    assert page.locator("#episode .answer").count() == 8
    page.locator("polyline.other").first.wait_for()


def test_it_begins_with_an_episode_in_which_credit_can_be_seen(port, reviewed, look):
  kept = [t for step in (1, 2, 3) for t in read_trajectories(reviewed / "trajectories", step)]
  best = max((t for t in kept if t.review.roles), key=lambda t: abs(t.advantage))
  wait_for(port, 48)
  page = look(f"http://127.0.0.1:{port}/")
  page.get_by_role("heading", name=f"Episode {best.id}", exact=True).wait_for()
  page.locator("#episode .answer").first.locator(
    ".p1, .p2, .p3, .p4, .m2, .m3, .m4"
  ).first.wait_for()
  assert page.locator("#episode :focus").count() == 0  # It stays where it is.
  assert page.evaluate("scrollY") == 0
  page.get_by_role("button", name=f"Open episode {best.id}", exact=True).click()
  page.locator("#episode h2:focus").wait_for()
  page.get_by_role("button", name="Close").click()
  page.locator("#episode").wait_for(state="hidden")


def test_the_table_fits_on_a_screen(port, look):
  page = look(f"http://127.0.0.1:{port}/", viewport={"width": 1300, "height": 800})
  page.locator("#episodes td.prompt").first.wait_for()
  assert page.evaluate(
    "(() => { const l = document.getElementById('list');"
    " return l.scrollWidth <= l.clientWidth; })()"
  )
  page.get_by_role("combobox", name="Run").wait_for(state="hidden")  # There is one alone.


def first_problem(port: int) -> str:
  return json.loads(get(port, "/episodes?step=1")[1])["rows"][0]["problem"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_by_day_by_night_and_on_a_phone(port, look, scheme):
  phone = {"width": 375, "height": 700}
  page = look(f"http://127.0.0.1:{port}/", color_scheme=scheme, viewport=phone)
  page.get_by_role("button", name="Open episode").first.click()
  page.locator("#episode .step").first.wait_for()
  assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
  contrasts = page.evaluate(CONTRASTS)
  assert len(contrasts) > 20
  assert min(contrasts) >= 4.5  # WCAG 2.2, AA


# Of all texts on the page with what stands behind them.
CONTRASTS = """() => {
  const of = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = of(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3]) return colour;
    }
    return [255, 255, 255];
  };
  const own = [...document.querySelectorAll("main *")].filter((e) => !e.closest("svg, figcaption")
    && !e.disabled && e.checkVisibility()
    && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()));
  return own.map((e) => {
    const [a, b] = [light(of(getComputedStyle(e).color)), light(behind(e))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  });
}"""
