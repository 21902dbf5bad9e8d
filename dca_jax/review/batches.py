"""Questions gathered into jobs that are answered within a day, at half the price."""

import asyncio
import contextlib
import hashlib
import json
from typing import Any

from dca_jax.review.cache import Cache
from dca_jax.review.transports import CallFailed, http_failure
from dca_jax.review.wire import connection_failure

_GATHER = 1.0
"""Seconds in which questions come together after the first one."""
_MOST = 500
"""Questions of a job; the server takes 20 MB."""
_UNDER_WAY = ("UNSPECIFIED", "QUEUED", "PENDING", "RUNNING", "UPDATING")
_SLOWEST = 60.0  # seconds


class Batches:
  """Jobs of a google-genai client. They belong to the loop in which they are asked for.

  Which job has a question is kept with the replies as soon as the job is made, so a process that
  comes after a killed one waits for that job instead of paying for another.
  """

  def __init__(self, client: Any, model: str, kept: Cache):
    self._client, self._model, self._kept = client, model, kept
    self._waiting: list[tuple[str, str, Any, asyncio.Future[str]]] = []
    self._making: set[asyncio.Task[None]] = set()
    self._jobs: dict[str, asyncio.Task[dict[str, str | CallFailed]]] = {}

  async def ask(self, user: str, config: Any) -> str:
    """The body of the reply to one question; raises CallFailed where there is none."""
    said = f"{self._model}/{user}/{config.model_dump_json(exclude_none=True)}"
    question = f"job/{hashlib.sha256(said.encode()).hexdigest()[:48]}"
    if kept := await self._kept.get(question):
      with contextlib.suppress(CallFailed):  # A job that failed or is gone answers nothing.
        return await self._answer(kept[0], question)
    made: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    self._waiting.append((question, user, config, made))
    if len(self._waiting) == 1:
      making = asyncio.create_task(self._gathered())
      self._making.add(making)  # The loop alone would forget it.
      making.add_done_callback(self._making.discard)
    return await self._answer(await made, question)

  async def _gathered(self) -> None:
    await asyncio.sleep(_GATHER)
    waiting, self._waiting = self._waiting, []
    waiting = [one for one in waiting if not one[-1].done()]  # Who is gone wants no answer.
    parts = [waiting[i : i + _MOST] for i in range(0, len(waiting), _MOST)]
    await asyncio.gather(*map(self._make, parts))

  async def _make(self, own: list[tuple[str, str, Any, "asyncio.Future[str]"]]) -> None:
    """Makes a job of these questions, and tells each the job's name."""
    from google.genai import types

    asked = [
      types.InlinedRequest(contents=user, config=config, metadata={"question": question})
      for question, user, config, _ in own
    ]
    try:
      job = await self._client.aio.batches.create(model=self._model, src=asked)
    except Exception as error:
      failed = connection_failure(error)
      for *_, made in own:
        if not made.done():
          made.set_exception(failed)
      return
    for question, *_, made in own:
      self._kept.put(question, job.name, "")
      if not made.done():
        made.set_result(job.name)

  async def _answer(self, job: str, question: str) -> str:
    """What a job says to a question, when it has ended."""
    if job not in self._jobs:
      self._jobs[job] = ending = asyncio.create_task(self._ended(job))

      def over(task: "asyncio.Task[Any]") -> None:
        del self._jobs[job]
        _ = task.cancelled() or task.exception()  # Seen, also where nobody waits any more.

      ending.add_done_callback(over)
    said = (await asyncio.shield(self._jobs[job])).get(question)
    if isinstance(said, str):
      return said
    raise said or CallFailed("server_error", "the job has no reply to it", again=True)

  async def _ended(self, name: str) -> dict[str, str | CallFailed]:
    """What the job says to each of its questions; raises CallFailed where it says nothing."""
    job, pause = None, 0.5
    while True:
      try:
        job = await self._client.aio.batches.get(name=name)
      except Exception as error:
        failed = connection_failure(error)
        if not failed.again:  # Else the job goes on, whether or not we are told of it.
          raise failed from None
      if job and job.state and job.state.name.removeprefix("JOB_STATE_") not in _UNDER_WAY:
        break
      await asyncio.sleep(pause)
      pause = min(1.5 * pause, _SLOWEST)
    if not (job.dest and job.dest.inlined_responses):
      raise CallFailed("server_error", f"the job ended as {job.state.name}", again=True)
    return {(r.metadata or {}).get("question", ""): _said(r) for r in job.dest.inlined_responses}


def _said(response: Any) -> str | CallFailed:
  if response.response is not None:
    return str(response.response.model_dump_json(by_alias=True, exclude_none=True))
  error = json.loads(response.error.model_dump_json()) if response.error else {}
  return http_failure(_HTTP.get(error.get("code") or 0, 500), {"error": error}, {})


# Of gRPC's codes, which a job uses for single questions.
_HTTP = {3: 400, 5: 404, 7: 403, 8: 429, 16: 401}
