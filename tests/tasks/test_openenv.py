"""Environments of OpenEnv, on a server of its own and in this process."""

import pathlib
import socket
import subprocess
import sys
import time

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


def serve(port: int) -> subprocess.Popen:
  return subprocess.Popen([sys.executable, LETTERS, str(port)])


@pytest.fixture(scope="module")
def url():
  port = tiny.free_port()
  server = serve(port)
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


def write_recipe(folder: pathlib.Path, url: str) -> pathlib.Path:
  recipe = folder / "recipe.py"
  recipe.write_text(f"""
from ml_collections import ConfigDict

def get_config():
  return ConfigDict(dict(
    steps=20,
    task=dict(name="openenv", url={url!r}, observation="text", max_turns=3),
    policy=dict(width=32, depth=1, heads=2, kv_heads=1, head_dim=16, mlp=64),
    rollout=dict(
      problems=8, group=8, max_prompt_tokens=4, max_tokens=32, stop=tuple("abcdefgh")
    ),
    learner=dict(lr=3e-3),
    evaluate=dict(problems=4, samples=7, k=2),
    checkpoint=dict(every=1),
  ))
""")
  return recipe


def trained(workdir: pathlib.Path) -> list[dict]:
  return [line for line in tiny.read_lines(workdir) if line["step"]]


@pytest.mark.slow
def test_a_run_over_http_learns_and_goes_on_bit_for_bit(tmp_path, url):
  recipe = write_recipe(tmp_path, url)
  whole, cut = tmp_path / "whole", tmp_path / "cut"

  def start(workdir):
    return tiny.start("train", f"--config={recipe}", f"--workdir={workdir}")

  first = start(whole)
  assert first.wait() == 0, first.communicate()
  rewards = [line["train/reward"] for line in trained(whole)]
  assert sum(rewards[-5:]) > 1.5 * sum(rewards[:5])

  killed = start(cut)
  tiny.wait_until(lambda: len(trained(cut)) >= 8, killed)
  killed.kill()
  killed.wait()
  again = start(cut)
  assert again.wait() == 0, again.communicate()
  # Environments answer in any order, which the last digits of log-probabilities show, and nothing
  # that is learnt from.
  tiny.assert_same_arrays(tiny.saved_state(cut), tiny.saved_state(whole))


@pytest.mark.slow
def test_a_run_survives_that_its_server_is_gone(tmp_path):
  port = tiny.free_port()
  server = serve(port)
  recipe = write_recipe(tmp_path, f"http://localhost:{port}")
  workdir = tmp_path / "run"
  try:
    run = tiny.start("train", f"--config={recipe}", f"--workdir={workdir}")
    tiny.wait_until(lambda: len(trained(workdir)) >= 6, run)
    server.kill()
    server.wait()
    time.sleep(30)
    server = serve(port)
    assert run.wait() == 0, run.communicate()
  finally:
    server.kill()
    server.wait()
  rows = trained(workdir)
  assert len(rows) == 20
  assert rows[-1]["train/unjudged"] == 0
