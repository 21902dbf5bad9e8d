"""The commands that README and the docs print can be typed as they stand."""

import dataclasses
import pathlib
import re
import shlex

import pytest

from dca_jax import config
from dca_jax.commands import cli
from dca_jax.commands.compare import arm_config, arm_configs, arms_of
from dca_jax.commands.review import reviewer_config
from dca_jax.credit import SCHEMES
from dca_jax.learner.values import VALUES
from dca_jax.review import REVIEWERS, REWRITERS, trained
from dca_jax.tasks import TASKS
from evidence.tasks import KeyDoor

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CHOSEN = {
  "task": TASKS,
  "reviewer": REVIEWERS,
  "rewrite": REWRITERS,
  "credit": SCHEMES,
  "value": VALUES,
}
KNOWN = {
  key
  for section in (
    dataclasses.asdict(config.Config()),
    *(
      {name: dataclasses.asdict(kind())}
      for name, known in CHOSEN.items()
      for kind in known.values()
    ),
    {"task": dataclasses.asdict(KeyDoor())},
    {"task": dataclasses.asdict(config.load(str(ROOT / "configs" / "smollm2_sums.py")).task)},
  )
  for key in config.flatten(section)
}


def commands(page: pathlib.Path) -> list[str]:
  """Everything that calls `dca-jax` with arguments, in a block or between backticks;
  variables filled in."""
  text = page.read_text()
  variables = dict(
    re.findall(r'([A-Z]+)=("[^"]*"|\S+)', "\n".join(re.findall(r"export (.+)", text)))
  )
  blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
  blocks += ["\n".join(re.findall(r"^    (.+)", text, re.MULTILINE))]
  lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
  prose = re.sub(r"^(```.*?^```|    .+?$)", "", text, flags=re.DOTALL | re.MULTILINE)
  lines += [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose)]
  found = [
    m[1] for line in lines if (m := re.search(r"(?:^|/)(dca-jax \w+ --[^#]*)", line.strip()))
  ]
  for name, value in variables.items():
    found = [command.replace(f"${name}", value.strip('"')) for command in found]
  return [command for command in found if "..." not in command]


def every(find) -> list:
  return [pytest.param(page, x, id=f"{page.name}: {x}"[:90]) for page in PAGES for x in find(page)]


@pytest.mark.parametrize(("page", "command"), every(commands))
def test_a_command_of_the_docs_is_understood(page, command, monkeypatch):
  monkeypatch.chdir(ROOT)
  # The command before it makes the folder.
  monkeypatch.setattr(trained, "describe", lambda folder: {"gives": ["roles", "effects"]})
  args, overrides = cli.parser().parse_known_args(shlex.split(command)[1:])
  assert args.settings or not overrides
  if args.command == "compare":
    recipe = config.read_recipe(args.config)
    arm_configs(recipe, arms_of(args.arms), 0, overrides)
  elif args.command == "review":
    reviewer_config(args.reviewer, overrides, {})
  elif args.command in ("train", "plan"):
    settings = config.load(args.config, overrides)
    if args.command == "plan" and settings.task.name == "chains":
      args.run(args, overrides)


def fragments(page: pathlib.Path) -> list[str]:
  return re.findall(r"--config\.([\w.]+)=", page.read_text())


def test_every_key_that_the_docs_name_exists():
  unknown = [(page.name, key) for page in PAGES for key in fragments(page) if key not in KNOWN]
  assert unknown in ([], [("README.md", "section.key")])


def arms(page: pathlib.Path) -> list[str]:
  """Arms of the quickstart that a sentence gives as another choice, without the whole command."""
  return [
    arm
    for found in re.findall(r"`--arms=(\S+?)(?: --seeds|`)", page.read_text())
    for arm in arms_of(found)
  ]


@pytest.mark.parametrize(("page", "arm"), every(arms))
def test_an_arm_of_the_docs_builds(page, arm):
  arm_config(config.read_recipe(str(ROOT / "configs" / "quickstart.py")), arm, 0, [])


def test_the_files_that_the_docs_name_exist():
  for page in PAGES:
    for path in re.findall(
      r"`(?:python |pytest )?"
      r"((?:evidence/benchmarks|tests|configs|tpu_scripts|dca_jax)/[\w/]+\.\w+)",
      page.read_text(),
    ):
      assert (ROOT / path).exists(), (page.name, path)
    for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
      place, _, anchor = target.partition("#")
      linked = page.parent / place if place else page
      assert linked.exists(), (page.name, target)
      headings = re.findall(r"^#+ (.+)", linked.read_text(), re.MULTILINE) if anchor else []
      slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
      assert not anchor or anchor in slugs, (page.name, target)


def test_the_examples_of_extending_are_the_files():
  """Those files are run by tests/doors."""
  text = (ROOT / "docs" / "extending.md").read_text()
  for path in (ROOT / "docs" / "examples").glob("*.py"):
    assert f"```python\n{path.read_text()}```" in text, path.name


def test_every_metric_is_explained():
  page = (ROOT / "docs" / "metrics.md").read_text()
  rooms = "train|data|learner|sampler|credit|value|spot|rollout|rewrite|review|guard|calibration"
  named = re.compile(rf'f?"((?:{rooms})/[a-z_0-9]+)"')
  metrics = {
    name for path in (ROOT / "dca_jax").rglob("*.py") for name in named.findall(path.read_text())
  }
  metrics -= {
    "credit/token",
    "review/status_",
    "review/status_ok",
    "review/premium_",
    "review/planted_found",
  }
  assert len(metrics) > 50
  missing = [name for name in metrics if name not in page and not name.startswith("calibration/")]
  assert not missing
