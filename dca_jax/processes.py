"""Several processes as one run: who is there, what each tells the others, and rows of arrays that each holds.

Every process runs the same program and owns the rows of its devices. What they tell each other beside the arrays (a
few numbers a step) goes through the key-value store of JAX's coordination service, because that has time limits, and
can say who is missing.
"""

import contextlib
import functools
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # The client of the key-value store has no public name.
from jax.sharding import NamedSharding, Sharding

from dca_jax.errors import Terminated, UserError

LOST = 75  # Exit status where another process is missing: EX_TEMPFAIL, the same command again continues.

_JOIN = 120.0  # seconds that processes may start apart
_BEAT = 2.0  # seconds between signs of life
_SILENCE = 40.0  # seconds without one, after which a process counts as dead
_PATIENCE = 1800.0  # seconds that a live process may take to arrive where the others are

_rounds = itertools.count()


def connect(coordinator: str = "", processes: int = 0, process: int = -1) -> None:
  """Joins the other processes of this run; before any array is made.

  Args:
    coordinator: host and port of process 0; empty finds everything as a TPU pod, Slurm or Kubernetes has it.

  Raises:
    UserError: there is no such environment, or nobody listens at `coordinator`.
  """
  if coordinator and (process > 0 or not coordinator.rpartition(":")[2].isdigit()):
    _wait_for(coordinator)  # JAX would end the process with a stack trace.
  try:
    if coordinator:
      jax.distributed.initialize(coordinator, processes, process)
    else:
      jax.distributed.initialize()
  except ValueError as error:
    raise UserError(
      f"--distributed: no TPU pod, Slurm or Kubernetes job found here ({error}); give --coordinator=HOST:PORT,"
      " --processes and --process"
    ) from error


def _wait_for(coordinator: str) -> None:
  host, _, port = coordinator.rpartition(":")
  end = time.monotonic() + _JOIN
  while True:
    try:
      socket.create_connection((host, int(port)), 5.0).close()
      return
    except (OSError, ValueError) as error:
      if isinstance(error, ValueError) or time.monotonic() > end:
        raise UserError(
          f"--coordinator={coordinator}: nobody answers there ({error}); it is HOST:PORT of the process that was"
          " started with --process=0"
        ) from error
      time.sleep(1.0)


def leave() -> None:
  """Leaves when all processes do; if process 0 went first, the others would take it for dead."""
  if jax.process_count() > 1:
    jax.distributed.shutdown()


def gather(value: Any) -> list[Any]:
  """The `value` of every process, in their order; each gives something that JSON can hold, at the same place.

  Raises:
    UserError: a process did not come here; the message names it.
  """
  if jax.process_count() == 1:
    return [value]
  client, me, number = _client(), jax.process_index(), next(_rounds)
  client.key_value_set(f"dca_jax/{number}/{me}", json.dumps(value))
  values, end = [], time.monotonic() + _PATIENCE
  for process in range(jax.process_count()):
    try:
      left = max(1, int(1000 * (end - time.monotonic())))
      values.append(json.loads(client.blocking_key_value_get(f"dca_jax/{number}/{process}", left)))
    except jax.errors.JaxRuntimeError as error:
      raise UserError(f"process {process} did not come to where process {me} waits for it ({error})") from error
  if number:
    client.key_value_delete(f"dca_jax/{number - 1}/{me}")  # All are here, so all have read what was said before.
  return values


def _client() -> Any:
  return distributed.global_state.client


@contextlib.contextmanager
def watched() -> Iterator[None]:
  """Within it, the death of another process ends this one with a message that names it.

  Otherwise this one would wait for ever in an operation on arrays that both of them hold.
  """
  if jax.process_count() == 1:
    yield
    return
  client, me = _client(), jax.process_index()
  done = threading.Event()
  thread = threading.Thread(target=_watch, args=(client, me, done), name="watch", daemon=True)
  thread.start()
  try:
    yield
    gather("done")
  except BaseException as error:
    if not isinstance(error, (UserError, Terminated, KeyboardInterrupt)):
      # The death of another process shows here first as an error of an operation; the watch will tell, and end us.
      thread.join(_SILENCE + 3 * _BEAT)
    if not isinstance(error, Terminated):
      with contextlib.suppress(jax.errors.JaxRuntimeError):  # Where the store is gone too, `error` is what to tell.
        client.key_value_set(f"dca_jax/left/{me}", str(error) or type(error).__name__)
      time.sleep(2 * _BEAT)  # For the others to hear of it; process 0 takes the store along.
    raise
  finally:
    done.set()
    thread.join()


def _watch(client, me: int, done: threading.Event) -> None:
  heard: dict[str, tuple[str, float]] = {}
  for n in itertools.count():
    try:
      client.key_value_set(f"dca_jax/alive/{me}", str(n), allow_overwrite=True)
      signs = dict(client.key_value_dir_get("dca_jax/alive/"))
      left = client.key_value_dir_get("dca_jax/left/")
    except jax.errors.JaxRuntimeError as error:
      _end(f"process 0, which keeps the others together, is gone ({str(error).splitlines()[0][:200]})")
    for key, reason in left:
      if not key.endswith(f"/{me}"):
        _end(f"process {key.rpartition('/')[2]} has ended: {reason}")
    now = time.monotonic()
    for key, sign in signs.items():
      if heard.get(key, ("", 0.0))[0] != sign:
        heard[key] = (sign, now)
      elif now - heard[key][1] > _SILENCE:
        _end(f"process {key.rpartition('/')[2]} has not been heard of for {_SILENCE:.0f} s")
    if done.wait(_BEAT):
      return


def _end(reason: str) -> NoReturn:
  print(f"dca-jax: {reason}; the same command again continues, in every process", file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(LOST)


# Arrays.


def own_rows(rows: NamedSharding, count: int) -> np.ndarray:
  """Which of `count` rows this process holds, in order.

  Raises:
    UserError: another process holds some of them too.
  """
  owner: dict[int, int] = {}
  device: Any
  for device, index in rows.devices_indices_map((count,)).items():
    for row in range(*index[0].indices(count)):
      if owner.setdefault(row, device.process_index) != device.process_index:
        raise UserError(
          f"processes {owner[row]} and {device.process_index} would hold the same problems; mesh.tensor must not be"
          " larger than the number of devices of a process"
        )
  return np.array(sorted(row for row, process in owner.items() if process == jax.process_index()))


def put(tree, sharding: Sharding):
  """Host arrays onto the devices; where `sharding` spreads rows, each process gives the rows that it owns."""
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)
  with jax.transfer_guard("allow"):  # Meant, as every `device_put` is.
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def fetch(tree, rows: NamedSharding):
  """The rows of device arrays that this process owns, on the host."""
  if jax.process_count() == 1:
    return jax.device_get(tree)

  def own(x):
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([jax.device_get(shards[start]) for start in sorted(shards)])

  return jax.tree.map(own, _laid_out(rows)(tree))


@functools.lru_cache
def _laid_out(rows: NamedSharding):
  return jax.jit(lambda tree: tree, out_shardings=rows)
