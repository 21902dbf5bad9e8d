"""What runs on Kubernetes: the JobSet by the published schemas, and its container's entry point for
real, with what GKE puts into the environment; Kubernetes itself is played here."""

import os
import pathlib
import subprocess
import sys
import time

import kubernetes_validate
import pytest
import tiny
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = ROOT / "tpu_scripts"
SETTINGS = {
  "PROJECT": "p",
  "ZONE": "us-west4-a",
  "NAME": "run",
  "PROVISIONING": "gke",
  "CLUSTER": "c",
  "IMAGE": "here/dca-jax:1",
  "BUCKET": "gs://b",
}
CHIPS = {
  "v5e": ("ct5lp-hightpu-4t", "4x4", "tpu-v5-lite-podslice", 4),
  "v6e": ("ct6e-standard-4t", "4x4", "tpu-v6e-slice", 4),
  "tpu7x": ("tpu7x-standard-4t", "2x2x2", "tpu7x", 2),
}


def gke(*arguments: str, **settings: str) -> str:
  env = {"PATH": os.environ["PATH"], **SETTINGS, **settings}
  command = ["bash", str(SCRIPTS / "gke.sh"), "--dry-run", *arguments]
  done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  return done.stdout


def jobset(**settings: str) -> dict:
  return yaml.safe_load(gke(**settings).split("at most")[0])


def pod(made: dict) -> dict:
  return made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("chip", CHIPS)
def test_the_jobset_is_one_by_the_published_schemas(chip):
  machine, topology, label, hosts = CHIPS[chip]
  arguments = ["--config.seed=1", '--config.task.name=a "b" \\ $(HOME)']
  quoted = " ".join("'" + argument + "'" for argument in arguments)
  spot = {"PROVISIONING": "gke-spot", "SLICES": "2", "RESERVATION": "r", "MAX_HOURS": "3"}
  made = jobset(ACCELERATOR=machine, TOPOLOGY=topology, ARGS=quoted, **spot)
  # Models made of JobSet's schema; what it does not know is lost on the way.
  assert JobsetV1alpha2JobSet.from_dict(made).to_dict() == made
  replicated = made["spec"]["replicatedJobs"][0]
  job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
  kubernetes_validate.validate(job | {"spec": replicated["template"]["spec"]}, "1.34", strict=True)
  assert replicated["replicas"] == 2
  spec = replicated["template"]["spec"]
  assert spec["completions"] == spec["parallelism"] == hosts
  assert spec["activeDeadlineSeconds"] == 3 * 3600 + 600
  selector = pod(made)["nodeSelector"]
  assert selector["cloud.google.com/gke-tpu-accelerator"] == label
  assert selector["cloud.google.com/gke-tpu-topology"] == topology
  assert selector["cloud.google.com/gke-spot"] == "true"
  assert selector["cloud.google.com/reservation-name"] == "r"
  container = pod(made)["containers"][0]
  assert container["resources"] == {"limits": {"google.com/tpu": 4}}
  # Kubernetes makes $( of $$(.
  assert [a.replace("$$(", "$(") for a in container["args"][2:]] == arguments
  end = int(container["env"][0]["value"])
  assert 0 <= end - time.time() - 3 * 3600 + 60 < 120


def test_xpk_and_the_bill():
  assert "Usage:" in gke("--help")
  machine, topology, *_ = CHIPS["tpu7x"]
  out = gke("--xpk", ACCELERATOR=machine, TOPOLOGY=topology, SLICES="2", MAX_HOURS="5")
  assert "at most $960: 16 chips x 5 hours x $12.00" in out
  assert "+ xpk workload create --project=p --zone=us-west4-a --cluster=c" in out
  assert "--tpu-type=tpu7x-2x2x2 --num-slices=2" in out
  assert gke("--delete", ACCELERATOR=machine, TOPOLOGY=topology).startswith("+ kubectl delete")


def entry(folder: pathlib.Path, *arguments: str, **environment: str) -> subprocess.Popen:
  """The container: `folder` is where its `dca-jax` is found, and its standard error goes."""
  env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **environment}
  with (folder / "errors").open("a") as errors:
    command = ["bash", str(SCRIPTS / "entry.sh"), *arguments]
    return subprocess.Popen(command, env=env, stdout=errors, stderr=errors, start_new_session=True)


def program(folder: pathlib.Path, text: str) -> None:
  path = folder / "dca-jax"
  path.write_text(text)
  path.chmod(0o755)


@pytest.mark.parametrize(
  ("codes", "code"), [((0,), 0), ((1, 0), 0), ((1, 1, 1), 1), ((75,), 75), ((1, 134), 134)]
)
def test_the_entry_point_tries_again_after_an_error_alone(tmp_path, codes, code):
  count = f"{tmp_path}/count"
  program(
    tmp_path,
    f'#!/bin/bash\necho "$*" >>{count}\ncodes=({" ".join(map(str, codes))})\n'
    f"exit ${{codes[$(wc -l <{count}) - 1]}}\n",
  )
  done = entry(tmp_path, "--config=a b", DEADLINE=str(int(time.time()) + 600))
  assert done.wait() == code
  lines = pathlib.Path(count).read_text().splitlines()
  assert lines == ["train --config=a b --distributed"] * len(codes)


def test_the_entry_point_hands_on_a_stop_and_knows_the_deadline(tmp_path):
  program(
    tmp_path,
    f"#!/bin/bash\ntrap 'exit 143' TERM\ntouch {tmp_path}/up\nwhile :; do sleep 0.05; done\n",
  )
  assert entry(tmp_path, DEADLINE=str(int(time.time()) - 1)).wait() == 124
  assert not (tmp_path / "up").exists()
  running = entry(tmp_path, DEADLINE=str(int(time.time()) + 600))
  tiny.wait_until((tmp_path / "up").exists, running)
  running.terminate()
  assert running.wait() == 143
  assert entry(tmp_path, DEADLINE=str(int(time.time()) + 2)).wait() == 124


def test_the_task_of_skypilot_trains_until_its_deadline(tmp_path):
  text = (SCRIPTS / "sky.yaml").read_text()
  task = yaml.safe_load(text)
  assert len(text.splitlines()) < 30
  assert (ROOT / task["envs"]["CONFIG"]).is_file()
  assert task["envs"]["BUCKET"] is task["envs"]["DEADLINE"] is None  # SkyPilot asks for them.
  home = tmp_path / "dca-jax-env" / "bin"
  home.mkdir(parents=True)
  program(home, '#!/bin/bash\nprintf "%s\\n" "$@"\n')
  end = int(time.time()) + 600
  given = {"BUCKET": "gs://b", "DEADLINE": str(end), "ARGS": "--config.steps=2 '--config.x=a b'"}
  env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **task["envs"], **given}
  command = ["bash", "-c", task["run"]]
  done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
  arguments = ["train", "--config=configs/quickstart.py", "--workdir=gs://b/dca-jax"]
  arguments += ["--config.steps=2", "--config.x=a b", "--distributed"]
  assert done.stdout.splitlines() == arguments
  late = subprocess.run(command, env={**env, "DEADLINE": "1"}, cwd=ROOT, check=False)
  assert late.returncode == 124


def wait_for_step(workdir: pathlib.Path, step: int, running: subprocess.Popen) -> None:
  tiny.wait_until(lambda: any(line["step"] >= step for line in tiny.read_lines(workdir)), running)


def run_jobset(made: dict, folder: pathlib.Path, kill_at: int | None) -> list[list[int]]:
  """Plays the JobSet controller and GKE for one slice: starts a container for each index, and all
  of them anew when one has failed, unless the JobSet's rules say that this is the end.

  Args:
    kill_at: step of the run after which the last container is killed, once.

  Returns:
    How the containers ended, at each attempt.
  """
  spec = made["spec"]["replicatedJobs"][0]["template"]["spec"]
  final = spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
  container = pod(made)["containers"][0]
  workdir = pathlib.Path(container["args"][1].partition("=")[2])
  ended: list[list[int]] = []
  while len(ended) <= made["spec"]["failurePolicy"]["maxRestarts"]:
    port = str(tiny.free_port())
    given = {one["name"]: one["value"] for one in container["env"]}
    given |= {"TPU_WORKER_HOSTNAMES": ",".join(["localhost"] * spec["completions"])}
    given |= {"TPU_SKIP_MDS_QUERY": "true", "MEGASCALE_COORDINATOR_ADDRESS": "localhost"}
    given |= {"MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"}
    # Without chips: JAX is to believe in TPU VMs, and to find its port free.
    given |= {"JAX_PLATFORMS": "cpu", "JAX_FORCE_TPU_INIT": "1", "JAX_COORDINATOR_PORT": port}
    pods = [
      entry(folder, *container["args"], TPU_WORKER_ID=str(i), JOB_COMPLETION_INDEX=str(i), **given)
      for i in range(spec["completions"])
    ]
    if kill_at is not None:
      wait_for_step(workdir, kill_at, pods[0])
      kill_at = None
      # All that runs on that host.
      subprocess.run(["pkill", "-KILL", "--session", str(pods[-1].pid)], check=True)
    while all(one.poll() in (None, 0) for one in pods) and any(one.poll() is None for one in pods):
      time.sleep(0.05)
    time.sleep(0.0 if all(one.poll() == 0 for one in pods) else 3.0)
    for one in pods:  # The others of a failed Job are told to stop, then killed.
      if one.poll() is None:
        one.terminate()
    ended.append([one.wait() for one in pods])
    if not any(ended[-1]) or any(code in final for code in ended[-1]):
      break
  return ended


@pytest.mark.slow
def test_a_host_is_lost_and_the_jobset_goes_on_as_if_nothing_had_been(tmp_path):
  program(tmp_path, f'#!/bin/sh\nexec {sys.executable} -m dca_jax "$@"\n')
  recipe = tiny.write_recipe(tmp_path, {"steps": 12, "checkpoint.every": 3})
  two = {"ACCELERATOR": "ct6e-standard-4t", "TOPOLOGY": "2x4"}
  states, ended = [], []
  for kill_at in (None, 5):
    workdir = tmp_path / f"run{kill_at}"
    made = jobset(CONFIG=recipe, WORKDIR=str(workdir), **two)
    ended.append(run_jobset(made, tmp_path, kill_at))
    assert ended[-1][-1] == [0, 0], (ended, (tmp_path / "errors").read_text())
    states.append(tiny.saved_state(workdir))
  assert [len(attempts) for attempts in ended] == [1, 2], ended
  assert any(ended[1][0])
  tiny.assert_same_arrays(*states)
