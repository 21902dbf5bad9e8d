# PYTHON_ARGCOMPLETE_OK
"""`dca-jax COMMAND`: the parser, and what it calls."""

import argparse
import importlib.metadata
import json
import os
import re
import signal
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import argcomplete

Command = Callable[[argparse.Namespace, Sequence[str]], None]


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; returns its exit status."""
  # It would say on every start that there is no PyTorch.
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  known = parser()
  argcomplete.autocomplete(known)
  args, overrides = known.parse_known_args(argv)
  quiet = getattr(args, "quiet", False) or getattr(args, "json", False)
  if quiet:
    os.environ["TQDM_DISABLE"] = "1"
  from dca_jax.errors import Terminated, UserError

  try:
    if not args.settings and overrides:
      raise UserError(f"cannot read the argument {overrides[0]!r}")
    args.run(args, overrides)
    return 0
  except UserError as error:
    print(f"dca-jax: error: {error}{_page(str(error))}", file=sys.stderr)
  except Terminated as error:
    print(f"dca-jax: {error}", file=sys.stderr)
    return error.status
  except OSError as error:
    what = f"{error.filename or getattr(args, 'workdir', '')}: {error.strerror or error}"
    print(f"dca-jax: error: {what}; what was saved before is intact", file=sys.stderr)
  except KeyboardInterrupt:
    print("\ndca-jax: interrupted; what was saved before is intact", file=sys.stderr)
    return 130
  finally:
    if quiet:
      os.environ.pop("TQDM_DISABLE", None)
  return 1


_PAGES = {
  "task": "tasks",
  "reviewer": "reviewers",
  "credit": "method",
  "value": "method",
  "spot": "method",
  "rewrite": "method",
  "policy": "models",
  "mesh": "tpu",
}


def _page(said: str) -> str:
  """Where a mistake that begins with its setting is explained."""
  key = re.match(r"(\w+)\.[\w.]+: ", said)
  return f" (docs/{_PAGES.get(key[1], 'settings')}.md)" if key else ""


class _Version(argparse.Action):
  """Says the version; to look it up takes a while, so it is done on request."""

  def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
    print(f"dca-jax {importlib.metadata.version('dca-jax')}")
    parser.exit()


def parser() -> argparse.ArgumentParser:
  """What can be said on the command line; settings, `--config.section.key=value`, are left over."""
  what = "Reinforcement learning with Deliberative Credit Assignment."
  top = argparse.ArgumentParser(prog="dca-jax", description=what)
  what = "show the version and exit"
  top.add_argument("--version", action=_Version, nargs=0, help=what)
  commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

  def command(
    run: Command, what: str, settings: bool, workdir: str | None = ""
  ) -> argparse.ArgumentParser:
    """The parser of a command that `run` carries out; `settings` where it reads
    `--config.section.key=value`."""
    epilog = "any setting can be overridden: --config.section.key=value" if settings else None
    name = run.__name__[1:].replace("_", "-")
    p = commands.add_parser(name, help=what, epilog=epilog, allow_abbrev=False)
    p.set_defaults(run=run, settings=settings)
    if run in (_train, _compare, _plan, _bench):
      p.add_argument("--config", required=True, help="a recipe, such as configs/quickstart.py")
    if workdir is not None:
      p.add_argument("--workdir", required=True, help=workdir or None)
    if run in (_train, _compare, _eval, _audit):
      p.add_argument("--quiet", action="store_true", help="no progress, only the result")
    if run in (_compare, _eval):
      p.add_argument("--json", action="store_true", help="the result as one line of JSON")
    return p

  _that_run(command)
  _that_look(command)
  return top


Made = Callable[..., argparse.ArgumentParser]


def _that_run(command: Made) -> None:
  """Commands that train, or say what training takes."""
  where = "where the run lives; the same command again continues it"
  p = command(_train, "train a policy, or continue a run", True, where)
  what = "auto, never, or the number of a saved step to go back to"
  p.add_argument("--resume", default="auto", help=what)
  _several_processes(p)

  p = command(
    _compare, "train several arms and draw their curves", True, "where the runs and the figure go"
  )
  what = "credit schemes or the recipe's ARMS, NAME[:section.key=value...], by commas; [a,b] as a"
  what += " value makes an arm of each"
  p.add_argument("--arms", required=True, help=what)
  p.add_argument("--seeds", default="0", help="numbers, by commas")
  what = "accuracy that the samples are counted to"
  p.add_argument("--threshold", type=float, default=0.8, help=what)
  what = "runs that go on at a time, each in a process and on an accelerator of its own"
  p.add_argument("--parallel", type=int, default=1, help=what)

  p = command(_plan, "how much memory a run takes on each device", True, workdir=None)
  p.add_argument("--devices", type=int, help="how many; those of this machine if not given")

  p = command(_bench, "how fast the devices of this machine train", True, workdir=None)
  what = "of a run, whose policy is taken instead of random weights"
  p.add_argument("--workdir", default="", help=what)
  p.add_argument("--output", help="a file for the JSON, which else is printed")


def _that_look(command: Made) -> None:
  """Commands that read what a run has left."""
  command(_status, "what a run is doing", False)

  p = command(_eval, "score a policy on held-out problems of any task", True, workdir=None)
  _what_is_scored(p)

  p = command(_chat, "type problems and watch the answers come", True, "of a run")
  p.add_argument("--step", type=int, help="of the checkpoint; the newest when left out")
  what = "NAME or NAME:MODEL, which then reads each answer whose outcome is known"
  p.add_argument("--review", default="", metavar="REVIEWER", help=what)

  p = command(_view, "look at a run in a browser (report writes the page as a file)", False)
  p.add_argument("--output", help=argparse.SUPPRESS)
  p.add_argument("--against", help="another run's workdir, to compare answers and curves with")
  p.add_argument("--port", type=int, default=0, help="where to listen; any free one if not given")
  p = command(_report, "write the page of a run as one file", False)
  p.add_argument("--output", help="WORKDIR/report.html if not given")

  p = command(_export, "write a run's policy as a Hugging Face folder", False)
  p.add_argument("--output", required=True, help="the folder to make")
  p.add_argument("--step", type=int, help="of the checkpoint; the newest when left out")
  what = "LoRA's adapters alone, for peft; else they are merged"
  p.add_argument("--adapters", action="store_true", help=what)

  p = command(_rewrites, "write the rewrites that a run has learnt from as data", False)
  p.add_argument("--output", required=True, help="a file of JSON lines to make")

  p = command(_review, "have stored trajectories read by another reviewer", True, workdir=None)
  p.add_argument("--trajectories", required=True, help="the folder of that name in a run's workdir")
  what = "NAME or NAME:MODEL, such as gemini:gemini-3.5-flash-lite"
  p.add_argument("--reviewer", required=True, help=what)
  p.add_argument("--limit", type=int, default=200, help="completions to read")
  p.add_argument("--estimate", action="store_true", help="only say what it would cost")

  p = command(_audit, "how good a reviewer is, and whether to train with it", True, "its results")
  _what_is_audited(p)

  p = command(_fit_reviewer, "train a reviewer for a task", True, "where it is written")
  _what_is_learnt(p)


def _what_is_learnt(p: argparse.ArgumentParser) -> None:
  from_what = ("oracle", "planted", "reviews", "spot-checks")
  what = "the task's labels, faults planted in right answers, stored reviews, measured steps"
  p.add_argument("--from", required=True, choices=from_what, dest="labels", help=what)
  answers = p.add_mutually_exclusive_group(required=True)
  answers.add_argument("--config", help="a recipe, whose policy answers")
  answers.add_argument("--trajectories", help="answers that a run has kept")
  p.add_argument("--limit", type=int, default=2000, help="answers to learn from")
  what = "answers that measure each step, with --from=spot-checks and --config"
  p.add_argument("--spot-checks", type=int, default=1, help=what)
  p.add_argument("--epochs", type=int, default=8)
  p.add_argument("--batch", type=int, default=64)
  p.add_argument("--lr", type=float, default=3e-3)
  p.add_argument("--seed", type=int, default=0)
  what = "of the adapters, where the policy is a published model"
  p.add_argument("--lora-rank", type=int, default=8, help=what)


def _what_is_scored(p: argparse.ArgumentParser) -> None:
  policy = p.add_mutually_exclusive_group(required=True)
  policy.add_argument("--workdir", help="of a run, whose checkpoint is scored")
  policy.add_argument("--config", help="a recipe, whose policy.pretrained is scored")
  p.add_argument("--step", type=int, help="of the checkpoint; the newest when left out")
  p.add_argument("--by", default="", help="a field of the data set to tell scores apart by")
  p.add_argument("--output", help="a file for the answers, a line of JSON for each problem")


def _what_is_audited(audit: argparse.ArgumentParser) -> None:
  audit.add_argument("--reviewer", required=True, help="NAME or NAME:MODEL")
  truth = audit.add_mutually_exclusive_group(required=True)
  truth.add_argument("--config", help="a recipe, whose policy answers")
  truth.add_argument("--trajectories", help="answers that a run has kept")
  truth.add_argument("--processbench", help="a JSONL file with problem, steps and label")
  audit.add_argument("--limit", type=int, default=256, help="answers to read")
  what = "faults of each kind to plant in right answers"
  audit.add_argument("--planted", type=int, default=12, help=what)
  what = "with --config: answers that the policy writes from before and after each step"
  audit.add_argument("--spot-checks", type=int, default=0, help=what)
  what = "share of the questions that is asked twice"
  audit.add_argument("--repeat", type=float, default=0.0, help=what)


def _several_processes(train: argparse.ArgumentParser) -> None:
  group = train.add_argument_group("several processes, each with the same command")
  what = "find the others as a TPU pod, Slurm or Kubernetes say"
  group.add_argument("--distributed", action="store_true", help=what)
  what = "or by hand: where process 0 listens"
  group.add_argument("--coordinator", default="", metavar="HOST:PORT", help=what)
  group.add_argument("--processes", type=int, help="how many there are")
  group.add_argument("--process", type=int, help="which one this is, from 0")


def run() -> NoReturn:
  """The program: `main`, and the end of the process."""
  for number in (signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, _end_now)
  sys.unraisablehook = _unraisable
  try:
    status = main()
  except Exception:
    traceback.print_exc()
    status = 1
  if not status:
    sys.exit(0)
  from dca_jax.devices.processes import end

  # At once: after a full disk, threads of libraries would add tracebacks to what has been said.
  end(status)


def _end_now(number: int, frame: types.FrameType | None) -> NoReturn:
  """What a signal does where no run handles it; every file is written whole, so a process may end
  anywhere."""
  name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
  os.write(2, f"\ndca-jax: ended by {name}; what was saved before is intact\n".encode())
  os._exit(128 + number)


def _unraisable(error: Any) -> None:
  """Leaves out what TensorStore says of a file that it still wanted when the disk was full
  already."""
  if str(error.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(error)


def _train(args: argparse.Namespace, overrides: Sequence[str]) -> None:
  from dca_jax import config
  from dca_jax.commands import train

  settings = config.load(args.config, overrides)
  if args.resume not in ("auto", "never") and not args.resume.isdigit():
    must = "must be auto, never, or the number of a saved step"
    raise config.ConfigError(f"--resume={args.resume}: {must}")
  train.connect(args.distributed, args.coordinator, args.processes, args.process)
  if said := train.train(settings, args.workdir, args.resume, args.quiet):
    print(said)


def _compare(args: argparse.Namespace, overrides: Sequence[str]) -> None:
  from dca_jax import config
  from dca_jax.commands.compare import Grid, arms_of, compare
  from dca_jax.store.workdir import locate

  arms = arms_of(args.arms)
  seeds = [int(seed) for seed in args.seeds.split(",") if seed.isascii() and seed.isdigit()]
  if len(seeds) != args.seeds.count(",") + 1 or max(seeds) >= 2**31:
    must = "must be whole numbers from 0 to 2^31 - 1, separated by commas"
    raise config.ConfigError(f"--seeds={args.seeds}: {must}")
  for name, values in (("arms", arms), ("seeds", seeds)):
    if len(set(values)) < len(values):
      raise config.ConfigError(f"--{name}={getattr(args, name)}: names one of them twice")
  _between(args, "threshold", 0, 1)
  _between(args, "parallel", 1)
  recipe = config.read_recipe(args.config)
  quiet = args.quiet or args.json
  where = args.threshold, args.workdir
  table = compare(recipe, Grid(arms, seeds), *where, overrides, quiet, args.parallel)
  if args.json:
    print((locate(args.workdir) / "compare.json").read_text(), end="")
    return
  print(f"\n{table}\n\npage: {os.path.join(args.workdir, 'compare.html')} (and compare.png)")


def _plan(args: argparse.Namespace, overrides: Sequence[str]) -> None:
  import jax

  from dca_jax import config
  from dca_jax.commands.plan import plan

  if args.devices is not None:
    _between(args, "devices", 1)
  print(plan(config.load(args.config, overrides), args.devices or jax.device_count()))


def _bench(args: argparse.Namespace, overrides: Sequence[str]) -> None:
  from dca_jax import config
  from dca_jax.commands import bench
  from dca_jax.store.workdir import locate

  found = bench.bench(config.load(args.config, overrides), args.workdir)
  text = json.dumps({"config": os.path.basename(args.config), **found}, indent=2)
  if args.output:
    locate(args.output).write_text(f"{text}\n")
  else:
    print(text)
  print(bench.table(found), file=sys.stderr)


def _between(args: argparse.Namespace, name: str, least: float, most: float = float("inf")) -> None:
  from dca_jax.config import ConfigError

  if not least <= getattr(args, name) <= most:
    must = f"between {least} and {most}" if most < float("inf") else f"at least {least}"
    raise ConfigError(f"--{name.replace('_', '-')}={getattr(args, name)}: must be {must}")


def _status(args: argparse.Namespace, _: Sequence[str]) -> None:
  from dca_jax.commands.status import status

  print(status(args.workdir))


def _eval(args: argparse.Namespace, overrides: Sequence[str]) -> None:
  from dca_jax.commands import evaluate
  from dca_jax.commands.report import text_table
  from dca_jax.store.workdir import locate

  config = evaluate.settings(args.workdir, args.config, overrides)
  output = locate(args.output) if args.output else None
  found = evaluate.evaluate(config, args.workdir or "", args.step, args.by, output)
  print(json.dumps(found) if args.json else text_table(*evaluate.table(found)))


def _chat(args: argparse.Namespace, overrides: Sequence[str]) -> None:
  from dca_jax.commands.chat import chat

  chat(args.workdir, args.step, args.review, overrides)


def _report(args: argparse.Namespace, _: Sequence[str]) -> None:
  from dca_jax.commands.view import write_report
  from dca_jax.store.workdir import locate

  output = locate(args.output) if args.output else None
  print(f"report: {write_report(locate(args.workdir), output)}")


def _view(args: argparse.Namespace, _: Sequence[str]) -> None:
  from dca_jax.commands.view import view
  from dca_jax.errors import UserError

  if args.output:
    raise UserError(f"--output={args.output}: view serves the page; dca-jax report writes a file")
  _between(args, "port", 0, 65535)
  with view(args.workdir, args.against, args.port) as server:
    print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
    server.serve_forever()


def _export(args: argparse.Namespace, _: Sequence[str]) -> None:
  from dca_jax.commands.export import export

  print(export(args.workdir, args.output, args.step, args.adapters))


def _rewrites(args: argparse.Namespace, _: Sequence[str]) -> None:
  from dca_jax.commands.rewrites import rewrites

  print(rewrites(args.workdir, args.output))


def _review(args: argparse.Namespace, overrides: Sequence[str]) -> None:
  from dca_jax.commands import review as rereview

  _between(args, "limit", 1)
  work = rereview.estimate if args.estimate else rereview.rereview
  print(work(args.trajectories, args.reviewer, args.limit, overrides))


def _fit_reviewer(args: argparse.Namespace, overrides: Sequence[str]) -> None:
  from dca_jax.commands.fit_reviewer import From, fit_reviewer
  from dca_jax.reader import FitConfig

  for name in ("limit", "spot_checks", "epochs", "batch", "lora_rank"):
    _between(args, name, 1)
  _between(args, "lr", 0, 1)
  _between(args, "seed", 0)
  source = From(
    args.labels, args.config or "", args.trajectories or "", args.limit, args.spot_checks
  )
  how = FitConfig(args.epochs, args.batch, args.lr, args.seed)
  print(fit_reviewer(source, args.workdir, overrides, how, args.lora_rank))


def _audit(args: argparse.Namespace, overrides: Sequence[str]) -> None:
  from dca_jax.commands import audit

  _between(args, "limit", 1)
  _between(args, "repeat", 0, 1)
  _between(args, "planted", 0)
  _between(args, "spot_checks", 0)
  where = {name: getattr(args, name) for name in ("config", "trajectories", "processbench")}
  sizes = {name: getattr(args, name) for name in audit.Sizes._fields}
  given = {name: path for name, path in where.items() if path}
  print(audit.audit(args.reviewer, args.workdir, settings=overrides, **given, **sizes).table)
