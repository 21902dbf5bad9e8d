"""Notices that the machine will be taken away: SIGTERM, and what Google Cloud's metadata server announces."""

import contextlib
import os
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator

import jax

_EVERY = 10.0  # seconds between looks at the metadata server
_QUIET = {"preempted": "FALSE", "maintenance-event": "NONE"}  # what it says while there is nothing to announce


@contextlib.contextmanager
def notices() -> Iterator[Callable[[], str]]:
  """Within it SIGTERM does not end the process. Gives a function that says what was noticed; empty while nothing was.

  The metadata server is asked on TPUs, and where GCE_METADATA_HOST names one.
  """
  noticed: list[str] = []
  done = threading.Event()
  host = os.environ.get("GCE_METADATA_HOST") or ("metadata.google.internal" if jax.default_backend() == "tpu" else "")
  if host:
    threading.Thread(target=_ask, args=(host, noticed, done), name="notices", daemon=True).start()
  in_main = threading.current_thread() is threading.main_thread()  # Python hands signals to that one only.
  before = signal.signal(signal.SIGTERM, lambda *_: noticed.append("SIGTERM")) if in_main else None
  try:
    yield lambda: noticed[0] if noticed else ""
  finally:
    done.set()
    if in_main:
      signal.signal(signal.SIGTERM, before)


def _ask(host: str, noticed: list[str], done: threading.Event) -> None:
  while not done.is_set():
    for key, quiet in _QUIET.items():
      url = f"http://{host}/computeMetadata/v1/instance/{key}"
      with contextlib.suppress(OSError):  # No such server here, or not at the moment.
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=5) as reply:
          if (said := reply.read().decode().strip()) != quiet:
            noticed.append(f"a notice of Google Cloud ({key}: {said})")
            return
    done.wait(_EVERY)
