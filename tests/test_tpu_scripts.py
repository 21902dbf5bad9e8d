"""The scripts for TPUs, run for real; in place of Google Cloud a `gcloud`
that records how it was called.

What it is told to run on a worker it runs here, with a home directory that the test has made.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

SCRIPTS = pathlib.Path(__file__).parents[1] / "tpu_scripts"
PROVISIONING = [
  "on-demand",
  "spot",
  "queued",
  "queued-spot",
  "compute-engine",
  "compute-engine-spot",
]
NODE = ["compute", "tpus", "tpu-vm"]

# Every call is one line of calls.jsonl. Whoever asks for a state gets the next line of `states`,
# the last one for ever.
GCLOUD = """#!{python}
import json, os, pathlib, shutil, subprocess, sys
home = pathlib.Path(os.environ["WORKER"])
calls, states = home.parent / "calls.jsonl", home.parent / "states"
argv = sys.argv[1:]
with calls.open("a") as file:
  file.write(json.dumps(argv) + "\\n")
# A virtual machine has a home of its own; the workers of a TPU are one here.
home = next((home.parent / a.rstrip(":") for a in argv if a.rstrip(":") in ("vm-a", "vm-b")), home)
home.mkdir(exist_ok=True)
option = {{a.split("=")[0]: a.partition("=")[2] for a in argv if a.startswith("--")}}
if option.get("--format", "").endswith(("tate)", "instanceStatus)", "state.state)")):
  state, *more = states.read_text().splitlines()
  states.write_text("\\n".join(more or [state]))
  if state in ("NOT_FOUND", "PERMISSION_DENIED"):
    sys.exit(f"ERROR: (gcloud) {{state}}: it was " + state.lower())
  print(state.replace("+", "\\n"))
elif option.get("--format") == "value(name)":
  print("vm-b\\nvm-a")
elif "describe" in argv and "projects" not in argv:
  sys.exit(os.environ.get("EXISTS", "") == "")
elif "ssh" in argv:
  env = {{**os.environ, "HOME": str(home)}}
  sys.exit(subprocess.run(["bash", "-c", option["--command"]], cwd=home, env=env).returncode)
elif "scp" in argv:
  shutil.copy(next(a for a in argv if a.endswith("dca-jax.tgz")), home)
elif "projects" in argv:
  print(4711)
sys.exit(any(word in argv for word in os.environ.get("FAILS", "").split()))
"""


class Cloud:
  """A Google Cloud of a test's own."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self.worker, self.bin = folder, folder / "worker", folder / "bin"
    self.worker.mkdir()
    self.bin.mkdir()
    self.write(self.bin / "gcloud", GCLOUD.format(python=sys.executable))
    self.env = {
      **{
        k: v
        for k, v in os.environ.items()
        if k not in ("NAME", "ZONE", "REGION", "RUNTIME", "ARGS", "TOPOLOGY")
      },
      "PATH": f"{self.bin}:{os.environ['PATH']}",
      "WORKER": str(self.worker),
      "PROJECT": "p",
      "BUCKET": "gs://b",
      "POLL": "0",
      "TRIES": "3",
      "WAIT_SECONDS": "0",
    }
    self.states("READY")

  @staticmethod
  def write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)

  def states(self, *states: str) -> None:
    (self.folder / "states").write_text("\n".join(states))

  def trainer(self, text: str) -> None:
    """A `dca-jax` for the worker that leaves its arguments behind; `text` is the rest of it.
    And the repository."""
    remember = (
      'import json, os, pathlib, signal, sys, time\nhome = pathlib.Path(os.environ["HOME"])\n'
    )
    remember += 'file = (home / "trained.jsonl").open("a")\n'
    remember += "print(json.dumps(sys.argv[1:]), file=file, flush=True)\n"
    remember += 'count = len((home / "trained.jsonl").read_text().splitlines())\n'
    self.write(self.worker / "dca-jax-env/bin/dca-jax", f"#!{sys.executable}\n{remember}{text}")
    shutil.copytree(SCRIPTS, self.worker / "dca-jax" / "tpu_scripts")

  def trained(self) -> list[list[str]]:
    path = self.worker / "trained.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def run(self, script: str, *arguments: str, code: int = 0, answer: str = "", **env: str) -> str:
    done = subprocess.run(
      ["bash", SCRIPTS / script, *arguments],
      env={**self.env, **env},
      input=answer,
      capture_output=True,
      text=True,
      timeout=600,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr

  def calls(self) -> list[list[str]]:
    path = self.folder / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def changes(self) -> list[list[str]]:
    """The calls that do more than look."""
    return [c for c in self.calls() if not {"describe", "list-instances"} & set(c)]

  def loop(self, *arguments: str) -> str:
    command = ["bash", self.worker / "dca-jax/tpu_scripts/loop.sh", *arguments]
    env = {**self.env, "HOME": str(self.worker)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    return done.stdout + done.stderr

  def wait_for(self, state: str) -> None:
    end = time.monotonic() + 300
    while f"run: {state}" not in (said := self.loop("state")):
      assert time.monotonic() < end, said + (self.worker / "dca-jax-run/log").read_text()
      time.sleep(0.05)


@pytest.fixture
def cloud(tmp_path):
  cloud = Cloud(tmp_path)
  yield cloud
  if (cloud.worker / "dca-jax").exists():
    cloud.loop("stop")


def shellcheck() -> str:
  beside = pathlib.Path(sys.executable).with_name("shellcheck")
  return str(beside) if beside.exists() else "shellcheck"


def test_shellcheck():
  done = subprocess.run(
    [shellcheck(), *sorted(SCRIPTS.glob("*.sh"))], cwd=SCRIPTS, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout + done.stderr


COMMANDS = [
  path.name
  for path in sorted(SCRIPTS.glob("*.sh"))
  if path.name not in ("common.sh", "settings.sh", "loop.sh", "limit.sh", "entry.sh", "gke.sh")
]


@pytest.mark.parametrize("script", COMMANDS)
def test_help_and_dry_run_call_nobody(script, cloud):
  assert "Usage:" in cloud.run(script, "--help")
  assert "no option --frobnicate" in cloud.run(script, "--frobnicate", code=1)
  options = ["--to=" + str(cloud.folder / "out")] if script == "fetch.sh" else []
  for provisioning in PROVISIONING:
    out = cloud.run(
      script, "--dry-run", *options, PROVISIONING=provisioning, **accelerator(provisioning)
    )
    assert "+ gcloud " in out
  assert not cloud.calls()
  assert not (cloud.folder / "out").exists()


def accelerator(provisioning: str) -> dict[str, str]:
  engine = provisioning.startswith("compute-engine")
  return {"ACCELERATOR": "ct6e-standard-4t", "TOPOLOGY": "2x4"} if engine else {}


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"PROJECT": ""}, "PROJECT is not set"),
    ({"PROVISIONING": "preemptible"}, "PROVISIONING=preemptible: must be"),
    ({"ACCELERATOR": "v99-8"}, "set RUNTIME"),
    ({"BUCKET": "b"}, "BUCKET=b: must be"),
    ({"MAX_HOURS": "0"}, "MAX_HOURS=0: must be"),
    ({"SLICES": "2"}, "SLICES=2: several slices"),
    ({"PROVISIONING": "gke"}, "gke.sh does all of it"),
    (
      {"PROVISIONING": "compute-engine", "TOPOLOGY": "2x4", "ACCELERATOR": "v6e-8"},
      "wants such as",
    ),
  ],
)
def test_settings_that_are_wrong_are_found_before_anything_is_made(settings, message, cloud):
  cloud.states("NOT_FOUND")
  out = cloud.run("create.sh", code=1, **settings)
  assert message in out
  assert out.splitlines()[-1].startswith("create.sh: error: ")
  assert not cloud.changes()


@pytest.mark.parametrize(
  ("provisioning", "accelerator", "expected"),
  [
    (
      "on-demand",
      "v5litepod-16",
      ["tpu-vm", "--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"],
    ),
    ("spot", "v6e-8", ["tpu-vm", "--version=v2-alpha-tpuv6e", "--spot"]),
    (
      "queued",
      "v5p-32",
      ["queued-resources", "--runtime-version=v2-alpha-tpuv5", "--node-id=dca-jax"],
    ),
    (
      "queued-spot",
      "v4-8",
      ["queued-resources", "--runtime-version=tpu-ubuntu2204-base", "--spot"],
    ),
  ],
)
def test_create(provisioning, accelerator, expected, cloud):
  cloud.states(
    "NOT_FOUND", "CREATING", "ACTIVE" if provisioning.startswith("queued") else "READY", "READY"
  )
  assert "dca-jax is ready" in cloud.run(
    "create.sh", PROVISIONING=provisioning, ACCELERATOR=accelerator
  )
  (call,) = cloud.changes()
  assert {"create", "dca-jax", "--project=p", "--zone=us-west4-a", *expected} <= set(call)
  assert ("--spot" in call) == provisioning.endswith("spot")


NETWORK = {
  "NETWORK": "n",
  "SUBNETWORK": "s",
  "INTERNAL_IPS": "true",
  "SERVICE_ACCOUNT": "a",
  "RESERVATION": "r",
  "MAX_HOURS": "7",
}


def test_create_limits_the_hours_and_says_the_largest_bill(cloud):
  tpu = {"--network=n", "--subnetwork=s", "--internal-ips", "--service-account=a", "--reserved"}
  engine = {"--network=n", "--subnet=s", "--no-address", "--service-account=a", "--reservation=r"}
  engine |= {"--max-run-duration=7h", "--instance-termination-action=STOP"}
  for provisioning in ("on-demand", "queued", "compute-engine"):
    cloud.states("NOT_FOUND", "RUNNING+RUNNING" if provisioning == "compute-engine" else "READY")
    settings = {"PROVISIONING": provisioning, "ACCELERATOR": "v5p-16", **NETWORK}
    before = len(cloud.changes())
    out = cloud.run("create.sh", **{**settings, **accelerator(provisioning)})
    call = cloud.changes()[before]
    if provisioning == "compute-engine":
      assert "at most $151: 8 chips x 7 hours x $2.70" in out
      assert engine <= set(call)
      continue
    assert "at most $235: 8 chips x 7 hours x $4.20" in out
    assert tpu <= set(call)
    assert f"--metadata-from-file=startup-script={SCRIPTS / 'limit.sh'}" in call
    (metadata,) = [a for a in call if a.startswith("--metadata=")]
    kind = "queued-resources" if provisioning == "queued" else "tpu-vm"
    assert metadata.startswith("--metadata=dca-max-hours=7,dca-idle-minutes=30,dca-delete=gcloud ")
    assert f"tpus {kind} delete dca-jax" in metadata
    assert ("--valid-until-duration=7h" in call) == (provisioning == "queued")
  # The end of a run deletes nothing that is nowhere else; what has no price has no bill.
  out = cloud.run("create.sh", "--dry-run", ACCELERATOR="v3-8", WORKDIR="/nfs/run")
  assert "the bill is unknown" in out
  assert "dca-idle-minutes=0" in out
  assert "at most $4:" in cloud.run("create.sh", "--dry-run", PRICE="0.01")


def test_several_slices_are_one_queued_resource(cloud):
  cloud.states("NOT_FOUND", "ACTIVE", "READY", "PREEMPTED")
  settings = {"PROVISIONING": "queued", "SLICES": "2"}
  assert "dca-jax is PREEMPTED" in cloud.run("create.sh", code=1, **settings)
  (call,) = cloud.changes()
  assert {"--node-count=2", "--node-prefix=dca-jax"} <= set(call)
  out = cloud.run("launch.sh", "--dry-run", **settings)
  assert all(f"tpu-vm ssh dca-jax-{slice} " in out for slice in range(2))
  assert "dca-jax-1" not in cloud.run("logs.sh", "--dry-run", **settings)


def limit(cloud, hours: int, idle: int, state: str, **env: str) -> subprocess.CompletedProcess:
  """The script that a machine starts with, for at most a second."""
  told = {"dca-max-hours": hours, "dca-idle-minutes": idle, "dca-delete": "gcloud delete me"}
  for name, value in told.items():
    cloud.write(cloud.folder / "metadata" / name, str(value))
  cloud.write(cloud.folder / "homes/someone/dca-jax-run/state", state)
  os.utime(cloud.folder / "homes/someone/dca-jax-run/state", (0, time.time() - 300))
  places = {"METADATA": "metadata", "HOMES": "homes", "STATE": "."}
  env = {**cloud.env, **{k: str(cloud.folder / v) for k, v in places.items()}, "POLL": "9", **env}
  command = ["timeout", "1", "bash", str(SCRIPTS / "limit.sh")]
  return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_a_machine_deletes_itself_after_its_hours_or_after_the_end_of_its_run(cloud):
  cloud.write(cloud.bin / "shutdown", '#!/bin/sh\necho "$*" >"$WORKER/shutdown"\n')
  for kept in ((1, 4, "running\n"), (1, 0, "finished\n"), (1, 6, "finished\n")):
    assert limit(cloud, *kept).returncode == 124, kept
  assert not cloud.calls()
  assert limit(cloud, 1, 4, "failed\n").returncode == 0
  assert cloud.calls() == [["delete", "me"]]
  (cloud.folder / "dca-jax-born").write_text(str(int(time.time()) - 3600))
  assert not (cloud.worker / "shutdown").exists()
  assert limit(cloud, 1, 0, "running\n", FAILS="delete").returncode == 0
  assert (cloud.worker / "shutdown").read_text() == "-h now\n"


def test_create_on_compute_engine_makes_a_slice_of_all_its_hosts(cloud):
  cloud.states("NOT_FOUND", "", "STAGING+RUNNING", "RUNNING+RUNNING")
  settings = {"PROVISIONING": "compute-engine-spot", **accelerator("compute-engine")}
  cloud.run("create.sh", **settings)
  template, policy, group = cloud.changes()
  assert "--provisioning-model=SPOT" in template
  assert {"--region=us-west4", "--accelerator-topology=2x4"} <= set(policy)
  assert {"--size=2", "--template=dca-jax", "--target-size-policy-mode=bulk"} <= set(group)
  assert "--workload-policy=projects/p/regions/us-west4/resourcePolicies/dca-jax" in group
  cloud.states("RUNNING+TERMINATED")
  cloud.run("create.sh", "--replace", EXISTS="1", **settings, code=1)
  assert [c[1:4] for c in cloud.changes()[3:]] == [
    ["instance-groups", "managed", "delete"],
    ["instance-templates", "delete", "dca-jax"],
    ["resource-policies", "delete", "dca-jax"],
    ["instance-groups", "managed", "create"],  # The template is said to exist, so it is not made.
  ]


def test_create_leaves_what_is_there(cloud):
  assert "there and ready" in cloud.run("create.sh")
  for state in ("PREEMPTED", "SUSPENDED", "FAILED"):
    cloud.states(state)
    assert f"dca-jax is {state}: what is left of it is in the way" in cloud.run("create.sh", code=1)
  cloud.states("PERMISSION_DENIED")
  assert "permission_denied" in cloud.run("create.sh", code=1)
  assert not cloud.changes()
  cloud.states("PREEMPTED", "PREEMPTED", "READY")
  cloud.run("create.sh", "--replace")
  assert [c[:4] for c in cloud.changes()] == [[*NODE, "delete"], [*NODE, "create"]]


def test_create_says_what_google_cloud_said(cloud):
  cloud.states("NOT_FOUND")
  assert "docs/tpu.md" in cloud.run("create.sh", code=1, FAILS="create")
  cloud.states("NOT_FOUND", "ACTIVE", "PREEMPTED")
  assert "dca-jax is PREEMPTED" in cloud.run("create.sh", code=1, PROVISIONING="queued-spot")


def test_project_is_prepared_once(cloud):
  cloud.run("project.sh")
  assert ["storage", "buckets", "create"] in [c[:3] for c in cloud.changes()]
  assert "--member=serviceAccount:4711-compute@developer.gserviceaccount.com" in cloud.changes()[-1]
  before = len(cloud.changes())
  cloud.run("project.sh", EXISTS="1")
  assert ["storage", "buckets", "create"] not in [c[:3] for c in cloud.changes()[before:]]


def test_delete_asks_and_deletes_once(cloud):
  for answer in ("", "n\n"):
    assert "nothing was deleted" in cloud.run("delete.sh", answer=answer, code=1)
  assert not cloud.changes()
  assert "gs://b still costs" in cloud.run("delete.sh", answer="y\n", PROVISIONING="queued")
  assert cloud.changes() == [
    [
      *NODE[:2],
      "queued-resources",
      "delete",
      "dca-jax",
      "--project=p",
      "--zone=us-west4-a",
      "--quiet",
      "--force",
    ]
  ]
  cloud.states("NOT_FOUND")
  assert "there is no dca-jax" in cloud.run("delete.sh", "--yes")
  cloud.states("PERMISSION_DENIED")
  cloud.run("delete.sh", "--yes", code=1)
  assert len(cloud.changes()) == 1


@pytest.fixture
def uv(cloud):
  """Makes the environment that the scripts ask for, with a Python that believes in TPUs;
  records its arguments."""
  cloud.write(
    cloud.bin / "uv",
    '#!/bin/sh\necho "$*" >>"$HOME/uv"\n[ "$1" = pip ] && exit\nmkdir -p "$HOME/dca-jax-env/bin"\n'
    'printf "#!/bin/sh\\necho checked: \\"\\$2\\"\\n" >"$HOME/dca-jax-env/bin/python"\n'
    'chmod +x "$HOME/dca-jax-env/bin/python"\n',
  )
  return cloud.worker / "uv"


def test_setup_copies_the_repository_and_makes_an_environment_once(cloud, uv):
  repository = cloud.folder / "a repository's"
  (repository / ".git").mkdir(parents=True)
  (repository / ".venv-test").mkdir()
  (repository / "setup.py").touch()
  for _ in range(2):
    assert "checked: import jax" in cloud.run("setup.sh", REPOSITORY=str(repository))
  assert sorted(os.listdir(cloud.worker / "dca-jax")) == ["setup.py"]
  python, source = f"{cloud.worker}/dca-jax-env/bin/python", f"{cloud.worker}/dca-jax[tpu,gcs]"
  pinned = f"--constraint {cloud.worker}/dca-jax/constraints/tpu.txt"
  wanted = f"pip install --quiet --python {python} {pinned} -e {source}"
  assert uv.read_text().splitlines() == [
    f"venv --quiet --python 3.12 {cloud.worker}/dca-jax-env",
    wanted,
    wanted,
  ]
  before = len(cloud.changes())
  cloud.run("setup.sh", REPOSITORY=str(repository), PROVISIONING="compute-engine")
  assert sorted(c[2] for c in cloud.changes()[before:] if "ssh" in c) == [
    "vm-a",
    "vm-a",
    "vm-b",
    "vm-b",
  ]
  assert all((cloud.folder / vm / "dca-jax/setup.py").exists() for vm in ("vm-a", "vm-b"))
  assert "holds no setup.py" in cloud.run("setup.sh", REPOSITORY=str(cloud.worker), code=1)


def test_launch_survives_awkward_values_and_never_starts_twice(cloud):
  cloud.trainer("time.sleep(600)")
  arguments = ['--config.task.name=it\'s "$HOME" & *', "--resume=never"]
  workdir = "gs://b/a run; rm -rf $HOME"
  settings = {"WORKDIR": workdir, "CONFIG": "configs/my recipe.py"}
  settings["ARGS"] = " ".join("'" + a.replace("'", "'\\''") + "'" for a in arguments)
  assert "started" in cloud.run("launch.sh", **settings)
  end = time.monotonic() + 300
  while not cloud.trained() and time.monotonic() < end:
    time.sleep(0.05)
  assert "already running" in cloud.run("launch.sh", **settings)
  assert "something else is running" in cloud.run("launch.sh", WORKDIR="gs://b/other", code=1)
  assert cloud.trained() == [
    ["train", "--config=configs/my recipe.py", f"--workdir={workdir}", "--distributed", *arguments]
  ]
  assert "a run is going on here" in cloud.run("setup.sh", code=1)
  assert (cloud.worker / "dca-jax").exists()


def test_the_loop_resumes_until_the_run_has_finished(cloud):
  cloud.trainer(
    "sys.exit([143, 1, -9, 1, 0][count - 1]) if count != 3 else os.kill(os.getpid(), 9)"
  )
  cloud.run("launch.sh")
  cloud.wait_for("finished")
  assert len(cloud.trained()) == 5
  log = (cloud.worker / "dca-jax-run/log").read_text()
  assert [f"ended with {code}" in log for code in (143, 1, 137)] == [True] * 3


def test_the_loop_stops_after_three_mistakes_in_a_row_or_twenty_failures(cloud):
  cloud.trainer('sys.exit("dca-jax: error: no such key" if count != 3 else 7)')
  cloud.run("launch.sh")
  cloud.wait_for("failed")
  assert len(cloud.trained()) == 6
  cloud.write(
    cloud.worker / "dca-jax-env/bin/dca-jax",
    '#!/bin/sh\necho "[]" >>"$HOME/trained.jsonl"\necho Traceback; exit 1\n',
  )
  cloud.run("launch.sh")
  cloud.wait_for("failed")
  assert len(cloud.trained()) == 6 + 20


SAVES = """
def save(*_):
  time.sleep(0.2)
  (home / "saved").touch()
  sys.exit(143)
signal.signal(signal.SIGTERM, save)
(home / "ready").touch()
time.sleep(600)
"""


def test_stop_waits_for_the_save_and_is_not_what_a_shutdown_is(cloud):
  cloud.trainer(SAVES)
  for ending in ("shutdown", "stop", "shutdown"):
    cloud.run("launch.sh")
    end = time.monotonic() + 300
    while not (cloud.worker / "ready").exists():
      assert time.monotonic() < end
      time.sleep(0.05)
    (cloud.worker / "ready").unlink()
    if ending == "stop":
      assert ": stopped" in cloud.run("stop.sh")
      assert "run: stopped" in cloud.loop("state")
    else:
      os.kill(int((cloud.worker / "dca-jax-run/pid").read_text()), 15)
      cloud.wait_for("dead")
    assert (cloud.worker / "saved").exists()
    (cloud.worker / "saved").unlink()
  assert len(cloud.trained()) == 3
  assert "nothing is running" in cloud.run("stop.sh")


def test_watch_makes_a_preempted_tpu_anew_and_ends_with_the_run(cloud, uv):
  (cloud.worker / "dca-jax-env/bin").mkdir(parents=True)
  cloud.write(cloud.worker / "dca-jax-env/bin/python", "#!/bin/sh\n")
  cloud.write(cloud.worker / "dca-jax-env/bin/dca-jax", '#!/bin/sh\ntouch "$HOME/ran"\n')
  # watch.sh and create.sh look at an empty TPU; watch.sh, create.sh and delete.sh at a lost one;
  # then it is made.
  cloud.states(
    "READY", "READY", *["PREEMPTED"] * 3, "CREATING", "READY", "PERMISSION_DENIED", "READY"
  )
  out = cloud.run("watch.sh", "--delete")
  assert "dca-jax is PREEMPTED: it is made anew" in out
  assert "the run has finished" in out
  made = [c[3] for c in cloud.changes() if c[:3] == NODE and c[3] in ("create", "delete")]
  assert made == ["delete", "create", "delete"]
  assert (cloud.worker / "ran").exists()


def test_watch_sees_a_failed_and_a_stopped_run_and_starts_a_dead_one(cloud):
  cloud.trainer("")
  (cloud.worker / "dca-jax-run").mkdir()
  state = cloud.worker / "dca-jax-run/state"
  state.write_text("failed\n")
  assert "only copy of runs" in cloud.run("watch.sh", code=1, WORKDIR="runs")
  assert "delete" not in [c[3] for c in cloud.changes()]
  (cloud.worker / "dca-jax-run/log").write_text("what went wrong\n")
  out = cloud.run("watch.sh", code=1)
  assert "what went wrong" in out
  assert "the run has failed" in out
  assert [c[3] for c in cloud.changes() if c[3] in ("create", "delete")] == ["delete"]
  state.write_text("stopped\n")
  assert "was stopped" in cloud.run("watch.sh")
  assert not cloud.trained()
  state.write_text("running\n")  # And nobody holds the lock.
  assert "the run has finished" in cloud.run("watch.sh")
  assert len(cloud.trained()) == 1


def test_watch_gives_up_and_never_deletes_what_it_cannot_see(cloud):
  cloud.states("PERMISSION_DENIED")
  assert "3 failures in a row" in cloud.run("watch.sh", code=1)
  assert not cloud.changes()
  cloud.states("NOT_FOUND")
  assert "3 failures in a row" in cloud.run("watch.sh", code=1, FAILS="create")
  assert [c[3] for c in cloud.changes()] == ["create"] * 3


def test_fetch_and_logs(cloud):
  to = cloud.folder / "a folder"
  cloud.run("fetch.sh", f"--to={to}")
  assert cloud.calls()[-1][:4] == ["storage", "rsync", "gs://b/dca-jax", str(to)]
  assert any(a.startswith("--exclude=") for a in cloud.calls()[-1])
  cloud.run("fetch.sh", f"--to={to}", "--checkpoints")
  assert not any(a.startswith("--exclude=") for a in cloud.calls()[-1])
  assert "--worker=x: must be" in cloud.run("logs.sh", "--worker=x", code=1)
  out = cloud.run("logs.sh", "--worker=all", "--dry-run")
  assert "--worker=all" in out
