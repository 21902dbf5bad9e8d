"""A run as a process, or as one of several that work on it together."""

import jax

from dca_jax import loop
from dca_jax.commands import report, view
from dca_jax.config import Config, ConfigError
from dca_jax.devices import processes
from dca_jax.store.metrics import read_metrics
from dca_jax.store.workdir import locate


def connect(distributed: bool, coordinator: str, count: int | None, number: int | None) -> None:
  """Finds the other processes of a run, as the command line says; there are none where it says
  nothing."""
  if not coordinator and (count, number) != (None, None):
    raise ConfigError("--processes and --process need --coordinator=HOST:PORT")
  if coordinator:
    if count is None or number is None or not 0 <= number < count:
      needs = "--processes=N and, in each of them, --process=0 to N - 1"
      raise ConfigError(f"--coordinator needs {needs}")
    processes.connect(coordinator, count, number)
  elif distributed:
    processes.connect()


def train(config: Config, workdir: str, resume: str, quiet: bool = False) -> str:
  """Trains, writes the report, and returns the scores as text;
  empty in every process but the first.

  Raises:
    UserError, Terminated: see `loop.train`.
  """
  loop.train(config, workdir, resume, quiet)
  folder = locate(workdir)
  metrics = read_metrics(folder) if jax.process_index() == 0 else []
  if not any("train/accuracy" in row for row in metrics):
    return ""
  scores = report.text_table(report.score_header(metrics), report.score_rows(metrics))
  return f"\n{scores}\n\nreport: {view.write_report(folder)}"
