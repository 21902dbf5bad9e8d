"""What credit assignment costs, at 1,024 completions x 1,024 tokens.

    python evidence/benchmarks/credit.py

Prints for every scheme the seconds from the host's reviews to token advantages (arrays, transfer
and the jitted function), and their share of one update of the quickstart's policy of 150,000
parameters on the same batch. A training step samples as well, and a policy of any use is larger, so
the shares are upper bounds.
"""

import pathlib
import random
import statistics
import time

import flax.linen as nn
import jax
import numpy as np

from dca_jax import config as config_lib
from dca_jax import learner
from dca_jax.credit import SCHEMES, ReviewArrays, assign_credit
from dca_jax.episode import ROLES
from dca_jax.policy import Policy
from dca_jax.review import Review

RECIPE = str(pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py")
GROUP, B, T, STEP = 8, 1024, 1024, 16
ROUNDS = 5


def made_up_reviews() -> list[Review]:
  """Each episode has 64 steps of 16 tokens, all reviewed."""
  dice = random.Random(0)
  n = T // STEP
  return [
    Review(
      "ok",
      tuple(dice.choices(ROLES, k=n)),
      tuple(dice.random() for _ in range(n)),
      tuple(dice.random() for _ in range(n)),
    )
    for _ in range(B)
  ]


def credit_seconds() -> dict[str, tuple[float, float]]:
  """For each scheme the median seconds of the arrays on the host and of the rest."""
  reviews = made_up_reviews()
  step_ids = np.broadcast_to(np.arange(T, dtype=np.int32) // STEP, (B, T))
  rng = np.random.default_rng(0)
  outcomes = (
    rng.integers(0, 2, (B // GROUP, GROUP)).astype(np.float32),
    np.ones((B, T), bool),
    np.zeros(B, bool),
  )
  seconds = {}
  for scheme in SCHEMES:
    host, device = [], []
    for round_ in range(ROUNDS + 1):
      start = time.perf_counter()
      arrays = ReviewArrays.of(reviews, step_ids)
      middle = time.perf_counter()
      jax.block_until_ready(assign_credit(SCHEMES[scheme](), *jax.device_put((*outcomes, arrays))))
      if round_:  # The first compiles.
        host.append(middle - start)
        device.append(time.perf_counter() - middle)
    seconds[scheme] = statistics.median(host), statistics.median(device)
  return seconds


def update_seconds() -> float:
  """One update on a batch of that size, in micro-batches of 16 completions; compiled before."""
  config = config_lib.load(
    RECIPE, [f"--config.rollout.problems={B // GROUP}", "--config.learner.micro_batches=64"]
  )
  policy = Policy(config.policy, 31)
  optimizer = learner.make_optimizer(config.learner, 1)
  rng = np.random.default_rng(0)
  prompts = rng.integers(0, 31, (B // GROUP, 43), dtype=np.int32)
  batch = learner.Batch(
    prompts,
    np.full(B // GROUP, 43, np.int32),
    rng.integers(0, 31, (B, T), dtype=np.int32),
    np.ones((B, T), bool),
    np.ones(B, bool),
    np.zeros((B, T), np.float32),
    None,
    rng.normal(size=(B, T)).astype(np.float32),
  )
  params = jax.jit(lambda key: nn.unbox(policy.init_params(key)))(jax.random.key(0))
  state = learner.init_state(optimizer, params)
  settings = learner.Learner(policy, config.learner, config.rollout.sampling, optimizer)
  compiled = learner.update.lower(settings, state, batch, np.bool_(True)).compile()
  start = time.perf_counter()
  jax.block_until_ready(compiled(state, batch, np.bool_(True)))
  return time.perf_counter() - start


def main() -> None:
  step = update_seconds()
  print(f"one update: {step:.1f} s")
  for scheme, (host, device) in credit_seconds().items():
    share = (host + device) / step
    print(
      f"{scheme:12} {device * 1000:6.1f} ms, and {host * 1000:6.1f} ms for the arrays: {share:.2%}"
      " of it"
    )


if __name__ == "__main__":
  main()
