"""Environments of OpenEnv, on a server of its own and in this process."""

import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
import tiny
from scripted import Scripted

from dca_jax.errors import UserError
from dca_jax.rollout import RolloutConfig, Sampler, collect
from dca_jax.tasks.openenv import OpenEnvConfig
from dca_jax.tasks.tokenizer import text_of

pytest.importorskip("openenv")
LETTERS = pathlib.Path(__file__).with_name("letters.py")


@pytest.fixture(scope="module")
def url():
  port = tiny.free_port()
  server = subprocess.Popen([sys.executable, LETTERS, str(port)])
  yield f"http://localhost:{port}"
  server.kill()
  server.wait()


def where(kind, url) -> dict:
  names = {"local": f"{LETTERS}:Letters", "action_class": f"{LETTERS}:Say"}
  return {"url": url} if kind == "url" else names


@pytest.mark.parametrize("kind", ["url", "local"])
def test_episodes_of_an_environment(kind, url):
  config = OpenEnvConfig(observation="text", max_turns=2, **where(kind, url))
  task = config.open()
  tokenizer, rollout = task.tokenizer(), RolloutConfig(problems=4, group=4, max_tokens=40)
  engine = Scripted(lambda *_: tokenizer("bo\x03")["input_ids"], ends=(tokenizer.eos_token_id,))
  batch = collect(Sampler(engine, rollout, task, tokenizer, 97, np.arange(4)), 3, 1, None)
  asked = set()
  assert [text_of(tokenizer, row[:1]) for row in batch.prompts_PxS] == ["\n"] * 4
  assert batch.prompt_lengths_P.tolist() == [1] * 4
  for episode in batch.episodes:
    texts = [text_of(tokenizer, segment.tokens) for segment in episode.segments]
    asked.add((episode.problem.id, texts[0]))
    assert episode.outcome.judged
    if texts[0] == "b?":
      assert texts == ["b?", "bo\x03"]
      assert episode.outcome.reward == pytest.approx(0.55)
      assert not episode.outcome.truncated
    else:
      assert texts[1:] == ["bo\x03", "bo, no\n", "bo\x03"]
      assert episode.outcome.reward == pytest.approx(0.1)
      assert episode.outcome.truncated
  assert len(asked) == 4  # A problem asks all of its samples the same.
  assert len({text for _, text in asked}) > 1


def test_nobody_there_is_known_before_anything_else():
  with socket.socket() as taken:  # Nobody answers here.
    taken.bind(("localhost", 0))
    url = f"http://localhost:{taken.getsockname()[1]}"
    with pytest.raises(UserError, match=r"task.url: no environment answers there"):
      OpenEnvConfig(url=url, turn_seconds=1.5).open()
