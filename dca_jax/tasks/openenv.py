"""Environments of OpenEnv, on a server of theirs or in this process."""

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import json
import time
from typing import Any, ClassVar

from dca_jax.checks import one_of
from dca_jax.doors import door, find, require
from dca_jax.errors import UserError, reason
from dca_jax.tasks.chat import CHARACTERS_END, Chat, ChatConfig
from dca_jax.tasks.environments import EnvironmentConfig, Frame, Turn
from dca_jax.tasks.types import Outcome, Problem, problem_seed


@dataclasses.dataclass(frozen=True)
class OpenEnvConfig(ChatConfig, EnvironmentConfig):
  """The `task` section for `openenv`. What `reset` says is the question of `task.prompt`; it gets a
  seed that stands for the problem. Rewards are added up, and what they come to is cut to [0, 1]; 1
  is correct."""

  name: str = "openenv"
  url: str = ""
  """Of a server, such as `http://localhost:8000`. Where it cannot be reached, the beginning of an
  episode is tried for task.turn_seconds."""
  local: str = door("")
  """MODULE:CLASS of an environment that runs in this process instead."""
  action_class: str = door("")
  """MODULE:CLASS of its actions; read with task.local."""
  action: str = "message"
  """The field of an action that is what the policy said."""
  observation: str = ""
  """The field of an observation that the policy reads; empty is all of it, as JSON."""
  role: str = "user"
  """Who says it in the chat template: `user` or `tool`."""
  at_once: int = 64

  def open(self) -> "OpenEnv":
    return OpenEnv(self)

  def check(self) -> dict[str, str]:
    bad = (
      ChatConfig.check(self) | EnvironmentConfig.check(self) | one_of(self, "role", "user", "tool")
    )
    if bool(self.url) == bool(self.local):
      bad["url"] = "must be given, or task.local, and not both"
    if bool(self.local) != bool(self.action_class):
      bad["action_class"] = "must be given where task.local is, and only there"
    return bad


class OpenEnv:
  """The task."""

  step_end, step_limits, concurrency, final_answer = "\n", (4, 32), 1, None
  sizes: ClassVar[dict[str, int]] = {}

  def __init__(self, config: OpenEnvConfig):
    if config.url:
      require("openenv", "openenv", "task.name")
    self._config, self._chat = config, Chat(config, characters=True)
    self.max_turns, self.turn_seconds = config.max_turns, config.turn_seconds
    self.at_once = config.at_once
    start, self.opening = self._chat.opening
    self._start = start or "\n"  # A prompt has at least one token.
    self.between: Frame = self._chat.between(config.role)
    self._reach()

  def _reach(self) -> None:
    """Raises UserError where no environment answers."""

    async def once() -> None:
      first = self.environment(self.problem("train", 0), 0)
      async with asyncio.timeout(self.turn_seconds):
        await first.begin(self.problem("train", 0))
        await first.close()

    try:
      asyncio.run(once())
    except Exception as error:  # It raises what it likes.
      where = f"task.{'url' if self._config.url else 'local'}"
      raise UserError(f"{where}: no environment answers there ({reason(error)})") from None

  def tokenizer(self) -> Any:
    return self._chat.tokenizer

  def problem(self, split: str, index: int) -> Problem:
    return Problem(index, f"episode {index}", "", self._start, {"seed": problem_seed(split, index)})

  def render(self, prompt: str) -> str:
    return self._start

  def verify(self, problem: Problem, completion: str, truncated: bool) -> Outcome:
    return self._config.verify(problem, completion, truncated)

  def environment(self, problem: Problem, seed: int) -> "Session":
    return Session(self._config, seed)


class Session:
  """One episode."""

  def __init__(self, config: OpenEnvConfig, seed: int):
    self._config, self._seed, self._reward = config, seed, 0.0
    self._client: Any = None

  async def begin(self, problem: Problem) -> str:
    options = {"seed": problem.row["seed"], "episode_id": str(self._seed)}
    until = time.monotonic() + self._config.turn_seconds
    while True:
      try:
        self._client = self._opened()
        return self._read(await self._client.reset(**options))
      except Exception:  # The server may be on its way back.
        await self.close()
        if self._config.local or time.monotonic() > until - 1:
          raise
        await asyncio.sleep(0.5)

  def _opened(self) -> Any:
    if self._config.local:
      return _Local(find(self._config.local, "task.local")())
    from openenv.core.generic_client import GenericEnvClient

    return GenericEnvClient(self._config.url, message_timeout_s=self._config.turn_seconds)

  async def step(self, text: str) -> Turn:
    said: Any = {self._config.action: text.removesuffix(CHARACTERS_END)}
    if self._config.action_class:
      said = find(self._config.action_class, "task.action_class")(**said)
    result = await self._client.step(said)
    self._reward += float(result.reward or 0.0)
    outcome = Outcome(min(1.0, max(0.0, self._reward)), self._reward >= 1, False)
    return Turn(self._read(result), bool(result.done), outcome)

  async def close(self) -> None:
    with contextlib.suppress(Exception):
      await self._client.close()

  def _read(self, result: Any) -> str:
    said = result.observation
    said = said.model_dump(mode="json") if hasattr(said, "model_dump") else said
    if self._config.observation:
      return str(said[self._config.observation])
    return json.dumps({key: x for key, x in said.items() if key not in ("done", "reward")})


@dataclasses.dataclass
class _Result:
  """As the package's own client has it."""

  observation: Any

  @property
  def reward(self) -> Any:
    return self.observation.reward

  @property
  def done(self) -> bool:
    return self.observation.done


class _Local:
  """An environment in this process, behind the client's methods; it works in a thread."""

  def __init__(self, environment: Any):
    self._environment = environment

  async def reset(self, **options: Any) -> _Result:
    takes = inspect.signature(self._environment.reset).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    known = {key: x for key, x in options.items() if anything or key in takes}
    return _Result(await asyncio.to_thread(functools.partial(self._environment.reset, **known)))

  async def step(self, action: Any) -> _Result:
    return _Result(await asyncio.to_thread(self._environment.step, action))

  async def close(self) -> None:
    await asyncio.to_thread(self._environment.close)
