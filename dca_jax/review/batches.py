"""Questions gathered into jobs that are answered within a day, at half the price."""

import asyncio
import json
from typing import Any

from dca_jax.review.transports import CallFailed, http_failure
from dca_jax.review.wire import connection_failure

_GATHER = 1.0
"""Seconds in which questions come together after the first one."""
_MOST = 500
"""Questions of a job; the server takes 20 MB."""
_UNDER_WAY = ("UNSPECIFIED", "QUEUED", "PENDING", "RUNNING", "UPDATING")
_SLOWEST = 60.0  # seconds


class Batches:
  """Jobs of a google-genai client. They belong to the loop in which they are asked for."""

  def __init__(self, client: Any, model: str):
    self._client, self._model = client, model
    self._waiting: list[tuple[str, Any, asyncio.Future[str]]] = []
    self._jobs: set[asyncio.Task[None]] = set()

  async def ask(self, user: str, config: Any) -> str:
    """The body of the reply to one question; raises CallFailed where there is none."""
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    self._waiting.append((user, config, answer))
    if len(self._waiting) == 1:
      job = asyncio.create_task(self._gathered())
      self._jobs.add(job)  # The loop alone would forget it.
      job.add_done_callback(self._jobs.discard)
    return await answer

  async def _gathered(self) -> None:
    await asyncio.sleep(_GATHER)
    waiting, self._waiting = self._waiting, []
    parts = [waiting[i : i + _MOST] for i in range(0, len(waiting), _MOST)]
    await asyncio.gather(*map(self._job, parts))

  async def _job(self, own: list[tuple[str, Any, "asyncio.Future[str]"]]) -> None:
    answers = [answer for _, _, answer in own]
    try:
      responses = await self._responses(own, answers)
    except Exception as error:
      responses = dict.fromkeys(map(str, range(len(own))), connection_failure(error))
    for i, answer in enumerate(answers):
      said = responses.get(str(i)) or CallFailed("server_error", "the job has no reply to it", True)
      if answer.done():  # Nobody waits for it any more.
        continue
      if isinstance(said, CallFailed):
        answer.set_exception(said)
      else:
        answer.set_result(said)

  async def _responses(self, own: Any, answers: Any) -> dict[str, str | CallFailed]:
    """What the job says of each question, by its number."""
    from google.genai import types

    asked = [
      types.InlinedRequest(contents=user, config=config, metadata={"number": str(i)})
      for i, (user, config, _) in enumerate(own)
    ]
    job, pause = await self._client.aio.batches.create(model=self._model, src=asked), 0.5
    while job.state is None or job.state.name.removeprefix("JOB_STATE_") in _UNDER_WAY:
      await asyncio.sleep(pause)
      pause = min(1.5 * pause, _SLOWEST)
      if all(answer.done() for answer in answers):
        return {}
      try:
        job = await self._client.aio.batches.get(name=job.name)
      except Exception as error:  # The job goes on, whether or not we are told of it.
        if not connection_failure(error).again:
          raise
    if not (job.dest and job.dest.inlined_responses):
      raise CallFailed("server_error", f"the job ended as {job.state.name}", again=True)
    return {str((r.metadata or {}).get("number")): _said(r) for r in job.dest.inlined_responses}


def _said(response: Any) -> str | CallFailed:
  if response.response is not None:
    return str(response.response.model_dump_json(by_alias=True, exclude_none=True))
  error = json.loads(response.error.model_dump_json()) if response.error else {}
  return http_failure(_HTTP.get(error.get("code") or 0, 500), {"error": error}, {})


# Of gRPC's codes, which a job uses for single questions.
_HTTP = {3: 400, 5: 404, 7: 403, 8: 429, 16: 401}
