"""Notices that a run should stop: SIGTERM, Ctrl-C, and what Google Cloud's metadata server says.

A run cannot stop everywhere: once the update has begun, the parameters before it are gone. So it
is a row of phases. One process stops at once, wherever it is, except within a phase that it must
finish. Several stop together, between two phases, because what they save they save together.
"""

import contextlib
import os
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax

from dca_jax.devices import processes
from dca_jax.errors import Terminated

_EVERY = 10.0  # seconds between looks at the metadata server
_QUIET = {
  "preempted": "FALSE",
  "maintenance-event": "NONE",
}  # what it says while there is nothing to announce
_CTRL_C = "Ctrl-C"
_SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: _CTRL_C}

T = TypeVar("T")


class Stops:
  """What was asked of a run, and whether it may stop where it is."""

  def __init__(self):
    self.reason = ""
    """What asked the run to stop; empty while nothing did."""
    self.together = False
    """Whether all processes stop at the same place, so that they can save."""
    self._at_once = True
    self._before: dict[int, Callable | int | None] = {}
    self._lock = threading.Lock()

  def phase(self, name: str, at_once: bool = True, seconds: float = 0.0) -> None:
    """Begins a phase of the run, in all processes, or ends the run here if it was asked to stop.

    Args:
      at_once: whether the phase may be left anywhere. Otherwise a stop waits for the next phase.
      seconds: how much longer than others it may take.

    Raises:
      Terminated: the run stops, here or, where `at_once`, later in the phase.
    """
    self._at_once = False
    if reason := processes.agree(name, self.reason, seconds):
      raise self.agreed(reason)
    self._at_once = at_once and jax.process_count() == 1
    if self._at_once and self.reason:  # It came while nobody looked.
      raise self.agreed(self.reason)

  def wait(self, wait: Callable[[], T], then: str) -> T:
    """What `wait` returns, which is cut short in a run that stops; the phase `then` begins.

    `wait` is called again where this process had heard of a stop and the others had not.
    """
    came: list[T] = []
    with contextlib.suppress(Terminated):
      self._at_once = True
      if not self.reason:
        came.append(wait())
    self.phase(then)
    return came[0] if came else wait()

  def notice(self, reason: str) -> None:
    """Takes note of a reason to stop; from any thread."""
    self.reason = self.reason or reason
    with self._lock:
      if self._before:  # The main thread may be waiting for something.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

  def agreed(self, reason: str) -> Terminated:
    """What to raise where all processes stop."""
    self._at_once, self.together = False, True
    return _stopped(reason)

  @contextlib.contextmanager
  def heard(self) -> Iterator[None]:
    """Within it signals are notices, and a second Ctrl-C is what it was before."""
    if threading.current_thread() is threading.main_thread():  # Python hands signals to no other.
      handled = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
      self._before = {number: signal.signal(number, self._on) for number in handled}
    try:
      yield
    finally:
      with self._lock:  # From here on the main thread is not called any more.
        before, self._before = self._before, {}
      for number, handler in before.items():
        signal.signal(number, handler)

  def _on(self, number: int, frame) -> None:
    again, before = self.reason == _CTRL_C, self._before.get(number)
    if number == signal.SIGINT and again and callable(before):
      before(number, frame)
    self.reason = self.reason or _SIGNALS[signal.Signals(number)]
    if self._at_once:
      self._at_once = False
      raise _stopped(self.reason)
    if number == signal.SIGINT:  # Not `print`, which this may have interrupted.
      os.write(2, b"\ndca-jax: stops where nothing is lost; a second Ctrl-C ends it now\n")


@contextlib.contextmanager
def notices() -> Iterator[Stops]:
  """Within it SIGTERM and Ctrl-C stop the run where that loses least.

  The metadata server is asked on TPUs, and where GCE_METADATA_HOST names one.
  """
  stops, done = Stops(), threading.Event()
  host = os.environ.get("GCE_METADATA_HOST")
  with stops.heard():
    host = host or ("metadata.google.internal" if jax.default_backend() == "tpu" else "")
    if host:
      threading.Thread(target=_ask, args=(host, stops, done), name="notices", daemon=True).start()
    try:
      yield stops
    finally:
      done.set()


def _stopped(reason: str) -> Terminated:
  return Terminated(reason, 130 if reason == _CTRL_C else 143)


def _ask(host: str, stops: Stops, done: threading.Event) -> None:
  while not done.is_set():
    for key, quiet in _QUIET.items():
      url = f"http://{host}/computeMetadata/v1/instance/{key}"
      with contextlib.suppress(OSError):  # No such server here, or not at the moment.
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=5) as reply:
          if (said := reply.read().decode().strip()) != quiet and not done.is_set():
            stops.notice(f"a notice of Google Cloud ({key}: {said})")
            return
    done.wait(_EVERY)
