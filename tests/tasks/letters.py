"""The smallest environment of OpenEnv, and its server: `python letters.py PORT`.

It asks for a letter; who names it has done, and every vowel that is named on the way brings
a little.
"""

import random
import sys

import uvicorn
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State


class Say(Action):
  message: str


class Heard(Observation):
  text: str


class Letters(Environment):
  SUPPORTS_CONCURRENT_SESSIONS = True

  def reset(self, seed=None, episode_id=None, **_):
    self._state = State(episode_id=episode_id, step_count=0)
    self._wanted = random.Random(seed).choice("abc")
    return Heard(text=f"{self._wanted}?")

  def step(self, action, **_):
    self._state.step_count += 1
    done = self._wanted in action.message
    share = sum(letter in "aeiou" for letter in action.message) / max(1, len(action.message))
    reward = 0.5 * done + 0.1 * share
    return Heard(text=f"{action.message[:3]}, no", done=done, reward=reward)

  @property
  def state(self):
    return self._state


if __name__ == "__main__":
  app = create_app(Letters, Say, Heard, max_concurrent_envs=256)
  uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")
