"""A user's verifier: called in processes of its own, so that one that hangs or crashes harms no
more than one verdict.

A verifier is a function of (row of the data set, completion) that gives whether the completion is
right, a reward from 0 to 1, or a dict with a `reward` and further named numbers. It may have an
attribute `final_answer`, a function of the completion, whose answers majority votes are counted of.
"""

import contextlib
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from multiprocessing import Pipe
from typing import Any, NamedTuple

from dca_jax.errors import UserError

_WORKER = pathlib.Path(__file__).with_name("judge_worker.py")
_STARTUP = 120.0  # Seconds that the import of a verifier may take.
_ALL = 16  # So many calls in a row without a verdict are no accident.


class Verdict(NamedTuple):
  reward: float
  parts: dict[str, float]


class NoVerdict(Exception):
  """The verifier took too long, or its process died."""


class VerifierError(Exception):
  """The verifier raised something; the message says what, and where."""


class Judge:
  """Calls the verifier MODULE:ATTRIBUTE in `workers` processes; its methods may be called from as
  many threads.

  Raises: UserError: it cannot be imported.
  """

  def __init__(self, name: str, seconds: float, workers: int):
    self.name, self._seconds = name, seconds
    self._lock, self._unanswered, self._warned = threading.Lock(), 0, False
    self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
    for _ in range(workers - 1):
      self._idle.put(None)  # Started when it is needed.
    first = _Worker(name, seconds)
    self._idle.put(first)
    self.has_final_answer = first.has_final_answer

  def verify(self, row: Mapping[str, Any], completion: str) -> Verdict | None:
    """None where the verifier gave no verdict.

    Raises:
      UserError: it gave none so often in a row that it never will.
      VerifierError: it raised an error.
    """
    try:
      answer = Verdict(*self._call("verify", row, completion))
    except NoVerdict as error:
      self._count(str(error))
      return None
    self._unanswered = 0
    return answer

  def final_answer(self, completion: str) -> str | None:
    """None also where the function took too long."""
    with contextlib.suppress(NoVerdict):
      return self._call("final_answer", completion)
    return None

  def _call(self, function: str, *arguments):
    worker = self._idle.get()
    try:
      worker = worker or _Worker(self.name, self._seconds)
      return worker.call(function, arguments, self._seconds)
    except VerifierError:
      raise
    except BaseException:  # A late answer would be taken for that to the next call.
      if worker:
        worker.stop()
      worker = None
      raise
    finally:
      self._idle.put(worker)

  def _count(self, reason: str) -> None:
    with self._lock:
      self._unanswered += 1
      warn, self._warned = not self._warned, True
    if self._unanswered >= _ALL:
      raise UserError(
        f"task.verifier {self.name}: no verdict on {_ALL} completions in a row: it {reason} on the"
        " last one; mend it or set a larger task.verifier_seconds, then run again to go on"
      )
    if warn:
      print(
        f"warning: task.verifier {self.name} {reason} on a completion; such ones are not trained on"
        " (train/unjudged)",
        file=sys.stderr,
      )


class _Worker:
  """One process and the connection to it."""

  def __init__(self, name: str, seconds: float):
    self._connection, theirs = Pipe()
    # Not multiprocessing, which would run the user's script again, and import JAX. In a session of
    # its own, Ctrl-C is not for it, and what it starts is ended with it. Its JAX, if it has one,
    # must not take this process's devices.
    self._process = subprocess.Popen(
      [sys.executable, "-P", str(_WORKER), str(theirs.fileno())],
      stdin=subprocess.DEVNULL,
      pass_fds=[theirs.fileno()],
      start_new_session=True,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    theirs.close()
    self.stop = weakref.finalize(self, _end, self._process, self._connection)
    try:
      self.has_final_answer: bool = self.call("import", (name, sys.path, seconds), _STARTUP)
    except (NoVerdict, VerifierError) as error:
      self.stop()
      said = f"cannot import {name} ({error}); its folder must be on PYTHONPATH"
      raise UserError(f"task.verifier: {said}") from None

  def call(self, function: str, arguments: tuple, seconds: float):
    """The answer; raises NoVerdict or VerifierError."""
    try:
      self._connection.send((function, arguments))
      if not self._connection.poll(seconds):
        raise NoVerdict(f"took over {seconds:g} s")
      status, answer = self._connection.recv()
    except (EOFError, OSError):
      raise NoVerdict(f"ended its process ({_ending(self._process)})") from None
    if status == "failed":
      raise VerifierError(answer)
    return answer


def _end(process: subprocess.Popen, connection) -> None:
  connection.close()
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def _ending(process: subprocess.Popen) -> str:
  try:
    code = process.wait(5)
  except subprocess.TimeoutExpired:
    return "which did not end"
  return signal.Signals(-code).name if code < 0 else f"exit status {code}"
