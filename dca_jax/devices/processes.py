"""Several processes as one run: who is there, what each tells the others, and rows
of arrays that each holds.

Every process runs the same program and owns the rows of its devices. What they tell each other
beside the arrays (a few numbers a step) goes through the key-value store of JAX's coordination
service. A thread in each says that the process lives, and where its main thread is; it hears how
the others fare, and ends the process if they cannot go on.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, Protocol

import jax
import numpy as np
from jax._src import distributed  # See `_client`.
from jax.sharding import NamedSharding, Sharding

from dca_jax.errors import Terminated, UserError

LOST = (
  75  # Exit status where another process is missing: EX_TEMPFAIL, the same command again continues.
)

_JOIN = 120.0  # seconds that processes may start apart
_BEAT = 2.0  # seconds between signs of life
_SILENCE = 40.0  # seconds without one, after which a process counts as dead
_PATIENCE = 1800.0  # seconds that a main thread may stay at one place
_FAREWELL = (
  60.0  # seconds that process 0, who keeps the store, waits for the others to read its end
)

_LEAVE = 1.0  # seconds between what a process says last and its end, at most

_PACKAGES = (
  "jax",
  "jaxlib",
  "libtpu",
  "flax",
  "optax",
  "orbax-checkpoint",
  "numpy",
  "transformers",
  "tokenizers",
)


def connect(coordinator: str = "", processes: int = 0, process: int = -1) -> None:
  """Joins the other processes of this run; before any array is made.

  Args:
    coordinator: host and port of process 0; empty finds everything as a TPU pod,
      Slurm or Kubernetes has it.

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
  except (ValueError, OSError) as error:  # The latter where a pod's metadata cannot be had.
    raise UserError(
      f"--distributed: no TPU pod, Slurm or Kubernetes job found here ({error}); give"
      " --coordinator=HOST:PORT, --processes and --process"
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
          f"--coordinator={coordinator}: nobody answers there ({error}); it is HOST:PORT of the"
          " process that was started with --process=0"
        ) from error
      time.sleep(1.0)


# Where the main thread is, and what it says there.


@dataclasses.dataclass(frozen=True)
class _Place:
  """Where a main thread is: what it has begun, after how many meetings with the others."""

  meetings: int = 0
  name: str = "the start"
  seconds: float = 0.0
  """How much longer than usual it may stay."""
  moves: int = 0


_place = _Place()
_said: list[str] = []  # What this process has told the others, and they may not all have read.


def mark(name: str, seconds: float = 0.0, meetings: int = 0) -> None:
  """Says that the main thread goes on, so that nobody takes it for stuck."""
  global _place
  _place = _Place(_place.meetings + meetings, name, seconds, _place.moves + 1)


def gather(place: str, value: Any) -> list[Any]:
  """The `value` of every process, in their order; each gives something that JSON can hold.

  Args:
    place: a name for where this is called; the processes must all be there.

  Raises:
    UserError: another process is elsewhere.
  """
  if jax.process_count() == 1:
    return [value]
  mark(place, _place.seconds, meetings=1)
  client, me, number = _client(), jax.process_index(), _place.meetings
  _say(client, f"dca_jax/{number}/{me}", [place, value])
  values = [_hear(client, process, place) for process in range(jax.process_count())]
  # All are here, so all have read what was said before.
  for key in _said[:-1]:
    client.key_value_delete(key)
  del _said[:-1]
  return values


def agree(place: str, value: Any, seconds: float = 0.0) -> Any:
  """The `value` of process 0, which the others take for theirs; cheaper than to gather."""
  mark(place, seconds, meetings=1)
  if jax.process_count() == 1:
    return value
  if jax.process_index() == 0:
    _say(_client(), f"dca_jax/{_place.meetings}/0", [place, value])
    return value
  return _hear(_client(), 0, place)


def _say(client, key: str, said: list[Any]) -> None:
  client.key_value_set(key, json.dumps(said))
  _said.append(key)


def _hear(client, process: int, place: str) -> Any:
  """What `process` says at this meeting; waits for it: `watched` ends a wait
  for a process that is gone."""
  while True:
    try:
      # In pieces, between which Python looks after signals.
      key = f"dca_jax/{_place.meetings}/{process}"
      theirs, value = json.loads(client.blocking_key_value_get(key, int(1000 * _BEAT)))
      break
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise
  if theirs != place:
    raise UserError(
      f"process {jax.process_index()} is at {place!r} and process {process} at {theirs!r}; all"
      " processes need the same program, settings and data"
    )
  return value


def _client() -> Any:
  """The client of the key-value store, which has no public name: not in `jax.distributed` or
  `jax.experimental.multihost_utils` (jax 0.10.2), nor in `orbax.checkpoint.multihost` (0.11.20 to
  0.12.8)."""
  return distributed.global_state.client


def check_alike(own: Mapping[str, Any]) -> None:
  """Compares what the processes run: versions, and what else they must share.

  Raises:
    UserError: a process differs; the message says in what.
  """
  if jax.process_count() == 1:
    return
  everyone = gather("versions", {"Python": platform.python_version(), **versions(), **own})
  first = everyone[0]
  for process, theirs in enumerate(everyone):
    for key in {**first, **theirs}:
      if theirs.get(key) != first.get(key):
        raise UserError(
          f"process {process} has {key} {theirs.get(key)!r} and process 0 {first.get(key)!r}; all"
          " processes need the same versions, settings and data"
        )


def versions() -> dict[str, str | None]:
  """Of the packages that decide what a run computes; None where one is not installed."""
  versions: dict[str, str | None] = {}
  for name in _PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = None
  return versions


# How the others fare.


class Asked(Protocol):
  """Who knows whether the run was asked to stop."""

  reason: str
  together: bool

  def notice(self, reason: str) -> None: ...


@dataclasses.dataclass
class _Farewell:
  """What a process says when it ends before the run does."""

  status: int
  text: str


@contextlib.contextmanager
def watched(asked: Asked) -> Iterator[None]:
  """Within it, the failure of a process ends all of them, with its words and its exit status.

  Otherwise they would wait forever in an operation on arrays that they hold together. So they
  would for a process that is dead or stuck; then the message names it.
  """
  if jax.process_count() == 1:
    yield
    return
  done = threading.Event()
  watch = _Watch(asked)
  thread = threading.Thread(target=watch.run, args=(done,), name="watch", daemon=True)
  thread.start()
  together = False
  try:
    yield
    gather("the end", None)
  except BaseException as error:
    together = isinstance(error, Terminated) and asked.together
    if not together:
      if _may_be_an_echo(error):
        thread.join(_SILENCE + 3 * _BEAT)  # The watch will tell what really happened, and end us.
      watch.tell(_farewell(error))
    raise
  finally:
    done.set()
    thread.join()
    if together:  # If process 0 went first, the others would be taken along.
      jax.distributed.shutdown()


def _may_be_an_echo(error: BaseException | None) -> bool:
  """Whether this is how another's death shows: as the error of an operation on arrays of both."""
  while error:
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
      return True
    error = error.__cause__ or error.__context__
  return False


def _farewell(error: BaseException) -> _Farewell:
  me = jax.process_index()
  if isinstance(error, KeyboardInterrupt):
    return _Farewell(getattr(error, "status", 130), f"dca-jax: process {me} has ended: {error}")
  if isinstance(error, (UserError, OSError)):  # As the command line does, without a traceback.
    return _Farewell(1, f"dca-jax: error: process {me} has ended: {error}")
  lines = traceback.format_exception(error)
  return _Farewell(1, f"{''.join(lines)}dca-jax: process {me} has ended: {lines[-1].strip()}")


class _Watch:
  """What a second thread does: says that the process lives, and listens to the others."""

  def __init__(self, asked: Asked):
    self._asked, self._client, self._me = asked, _client(), jax.process_index()
    self._signs: dict[int, tuple[int, float]] = {}
    """The last sign of each process, and when it was new."""
    self._places: dict[int, tuple[_Place, float]] = {}

  def run(self, done: threading.Event) -> None:
    for n in itertools.count():
      try:
        self._set("alive", [n, dataclasses.astuple(_place), self._asked.reason])
        told = self._all("left")
        alive = self._all("alive")
      except jax.errors.JaxRuntimeError as error:
        why = str(error).splitlines()[0][:200]
        text = f"dca-jax: process 0, which keeps the others together, is gone ({why})"
        self._end(_Farewell(LOST, text))
      if told and self._me not in told:
        self._end(_Farewell(*next(iter(told.values()))))
      self._judge(alive)
      if done.wait(_BEAT):
        return

  def _judge(self, alive: dict[int, Any]) -> None:
    """Ends this process where another is dead or stuck; passes on what another was asked."""
    now = time.monotonic()
    for process, (n, where, reason) in alive.items():
      if self._signs.get(process, (-1, now))[0] != n:
        self._signs[process] = n, now
      if self._places.get(process, (None, now))[0] != (place := _Place(*where)):
        self._places[process] = place, now
      if reason and not self._asked.reason:
        self._asked.notice(reason)
    again = "the same command again continues, in every process"
    for process, (_, heard) in self._signs.items():
      if now - heard > _SILENCE:
        text = f"dca-jax: process {process} has not been heard of for {_SILENCE:.0f} s; {again}"
        self._end(_Farewell(LOST, text))
    # Those who wait for it are further.
    waits = {p: now - since - place.seconds for p, (place, since) in self._places.items()}
    last = min(waits, key=lambda p: (self._places[p][0].meetings, -waits[p]))
    if waits[last] > _PATIENCE:
      name = self._places[last][0].name
      text = f"dca-jax: process {last} has been at {name!r} for {_PATIENCE:.0f} s; {again}"
      self._end(_Farewell(LOST, text))

  def tell(self, farewell: _Farewell) -> None:
    """Tells the others why this process ends, and lets them read it."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # Where the store is gone too.
      self._set("left", dataclasses.astuple(farewell))
      if self._me == 0:
        end = time.monotonic() + _FAREWELL
        while time.monotonic() < end and self._listening() - self._all("gone").keys():
          time.sleep(0.1)
        # Without a store JAX ends them before they do so themselves, with words of its own.
        time.sleep(_LEAVE)

  def _listening(self) -> set[int]:
    """The other processes, except those that are dead."""
    now = time.monotonic()
    dead = {p for p, (_, heard) in self._signs.items() if now - heard > _SILENCE}
    return set(range(jax.process_count())) - dead - {self._me}

  def _end(self, farewell: _Farewell) -> NoReturn:
    print(farewell.text, file=sys.stderr)
    self.tell(farewell)
    end(farewell.status)

  def _set(self, what: str, value: Any) -> None:
    key = f"dca_jax/{what}/{self._me}"
    self._client.key_value_set(key, json.dumps(value), allow_overwrite=True)

  def _all(self, what: str) -> dict[int, Any]:
    found = self._client.key_value_dir_get(f"dca_jax/{what}/")
    return {int(key.rpartition("/")[2]): json.loads(value) for key, value in found}


def end(status: int) -> NoReturn:
  """Ends this process at once, with all that it has printed; threads of libraries are cut off."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):  # A full disk, a closed pipe.
      stream.flush()
  if _client() and jax.process_index():
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      _client().key_value_set(f"dca_jax/gone/{jax.process_index()}", "true", allow_overwrite=True)
  os._exit(status)


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
          f"processes {owner[row]} and {device.process_index} would hold the same problems;"
          " mesh.tensor must not be larger than the number of devices of a process"
        )
  return np.array(sorted(row for row, process in owner.items() if process == jax.process_index()))


def put(tree, sharding: Sharding):
  """Host arrays onto the devices; where `sharding` spreads rows,
  each process gives the rows that it owns."""
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)
  with jax.transfer_guard("allow"):  # Meant, as every `device_put` is.
    return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree
    )


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
