"""A run to look at, and a browser to look with."""

import dataclasses
import pathlib
import shutil

import pytest
import tiny
from etils import epath

from dca_jax.loop import train
from dca_jax.store.trajectories import read_trajectories, write_trajectories


@pytest.fixture(scope="session")
def reviewed(tmp_path_factory) -> epath.Path:
  """The workdir of a finished run with reviews; copy it before changing it."""
  workdir = epath.Path(tmp_path_factory.mktemp("reviewed") / "run")
  settings = {"credit.scheme": "weighted", "reviewer.name": "oracle"}
  train(tiny.make_config(settings), str(workdir), quiet=True)
  return workdir


@pytest.fixture(scope="session")
def rewritten(reviewed):
  """Makes a copy of the run in a folder, with trajectories that a function makes of its own."""

  def make(folder: pathlib.Path, change) -> epath.Path:
    copy = epath.Path(shutil.copytree(reviewed, folder / "run"))
    for step in (1, 3):
      rows = [change(t) for t in read_trajectories(copy / "trajectories", step)]
      write_trajectories(copy / "trajectories", step, 0, rows)
    return copy

  return make


@pytest.fixture(scope="module")  # While it is open, its thread has an event loop.
def chromium():
  """A real browser."""
  api = pytest.importorskip("playwright.sync_api")
  found = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), 0
  )
  arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
  with api.sync_playwright() as playwright:
    path = found or playwright.chromium.executable_path
    if not pathlib.Path(path).exists():
      pytest.skip("there is no Chromium")
    browser = playwright.chromium.launch(executable_path=path, args=arguments)
    yield browser
    browser.close()


@dataclasses.dataclass
class Looked:
  """Pages that were opened, and what they complained of."""

  browser: object
  errors: list[str] = dataclasses.field(default_factory=list)

  def open(self, address: str, **how):
    """A page, when its table has come."""
    page = self.browser.new_page(**how)
    page.on("console", lambda said: self.errors.append(said.text))
    page.on("pageerror", lambda error: self.errors.append(str(error)))
    page.on("dialog", lambda dialog: self.errors.append("a dialog"))
    page.goto(address)
    page.locator("#count", has_text="episodes").wait_for()
    return page


@pytest.fixture
def look(chromium):
  """Opens pages; a page that has an error on its console fails the test."""
  looked = Looked(chromium)
  yield looked.open
  for context in chromium.contexts:
    context.close()
  assert not looked.errors
