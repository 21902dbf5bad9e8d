"""Two interleaved chains of modular arithmetic from a policy that has learnt them wrong: credit by step against GRPO.

The warm start teaches a policy of about 170,000 parameters to write worked solutions, half of whose arithmetic
table is sometimes wrong in a fixed way, so that the wrong digit is often the likeliest one. From there reinforcement
learning has only the final digit to go by.
"""

from ml_collections import ConfigDict

# Each arm at the best of the learning rates tried for it; see `benchmarks/learning.sh`.
ARMS = {
  "uniform": {"learner.lr": 5e-4},
  "weighted": {"learner.lr": 1e-3},
  "noisy": {"credit.scheme": "weighted", "reviewer.name": "noisy", "reviewer.flip": 0.3, "learner.lr": 5e-4},
}


def get_config():
  c = ConfigDict()
  c.steps = 80
  c.policy = dict(heads=8, kv_heads=4, head_dim=16, mlp=160, rope_theta=100.0, qk_norm=True)
  c.warmstart = dict(clean_steps=250, steps=500, lr=1.2e-2)
  c.rollout = dict(max_prompt_tokens=43)
  c.reviewer = dict(name="oracle")
  c.credit = dict(scheme="weighted")
  return c
