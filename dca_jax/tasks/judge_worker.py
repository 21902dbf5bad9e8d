"""A process that runs a user's verifier for `judge.Judge`; started by path, so that it imports
nothing of ours."""

import faulthandler
import importlib.util
import math
import operator
import os
import pkgutil
import queue
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any


def main(connection: Connection) -> None:
  """Answers the requests (function, arguments) that come, in order, until the other end is
  closed."""
  requests: queue.SimpleQueue[tuple[str, tuple]] = queue.SimpleQueue()
  # The verifier has the main thread, where alarms work; this one notices when nobody asks any more.
  threading.Thread(target=_listen, args=(connection, requests), daemon=True).start()
  _, (name, sys.path[:], seconds) = requests.get()
  try:
    verifier = _find(name)
    if not callable(verifier):
      raise TypeError("it is no function")
    connection.send(("ready", hasattr(verifier, "final_answer")))
  except BaseException as error:
    connection.send(("failed", _describe(error)))
    return
  devnull = os.open(os.devnull, os.O_WRONLY)
  while True:
    function, arguments = requests.get()
    # Whoever asked ends this process after `seconds`; a call that hangs may not outlive them.
    faulthandler.dump_traceback_later(2 * seconds + 5, exit=True, file=devnull)
    try:
      connection.send(("ok", _answer(verifier, function, arguments)))
    except BaseException as error:  # It may raise anything.
      connection.send(("failed", _describe(error)))
    faulthandler.cancel_dump_traceback_later()


def _find(name: str) -> Any:
  """What MODULE:ATTRIBUTE or path/to/file.py:ATTRIBUTE names."""
  path, _, attribute = name.rpartition(":")
  if not path.endswith(".py"):
    return pkgutil.resolve_name(name)
  spec = importlib.util.spec_from_file_location("verifier", path)
  assert spec is not None
  assert spec.loader is not None
  sys.modules["verifier"] = module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return operator.attrgetter(attribute)(module)


def _listen(connection: Connection, requests: queue.SimpleQueue) -> None:
  while True:
    try:
      requests.put(connection.recv())
    except (EOFError, OSError):
      os._exit(0)


def _answer(verifier, function: str, arguments: tuple):
  """A final answer, or the reward and its named parts, as plain values."""
  if function == "final_answer":
    answer = verifier.final_answer(*arguments)
    return None if answer is None else str(answer)
  given = verifier(*arguments)
  named = given if isinstance(given, dict) else {"reward": given}
  if "reward" not in named:
    raise ValueError(f"it gave {given!r}, which has no 'reward'")
  parts = {str(name): float(value) for name, value in named.items()}
  reward = parts.pop("reward")
  if not 0 <= reward <= 1:
    raise ValueError(f"it gave {reward}, which is not from 0 to 1")
  if not all(map(math.isfinite, parts.values())):
    raise ValueError(f"it gave {given!r}, with a part that is not finite")
  return reward, parts


def _describe(error: BaseException) -> str:
  """The last line of a traceback, and where in the user's code it came from."""
  frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
  where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
  return f"{type(error).__name__}: {error}"[:500] + where


if __name__ == "__main__":
  main(Connection(int(sys.argv[1])))
