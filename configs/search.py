"""A search in a hidden table: episodes of several turns, and the policy decides when to stop.

The warm start teaches a policy of about 150,000 parameters to look keys up and to answer, with
needless look-ups, repeated ones and guesses (`evidence/tasks/search.py`). Reinforcement learning
has only the final digit to go by; the arms differ in who else is heard, and how far.

Expect sampled accuracy on held-out problems to rise from 0.37 to 0.87 or more in 50 steps of 64
episodes, in three quarters of a minute of one core, the warm start included; docs/environments.md
has the numbers. It needs the repository: the task is not in the package.
"""

from ml_collections import ConfigDict

from evidence.tasks.arms import arms

# docs/environments.md says how the rates were chosen.
ARMS = arms(
  {
    "uniform": 2e-3,
    "calibrated": 4e-3,
    "fooled": 4e-3,
    "redistributed": 4e-3,
    "redistributed_fooled": 4e-3,
    "progress_0": 5e-4,
    "progress_1": 2e-3,
  }
)


def get_config():
  c = ConfigDict()
  c.steps = 50
  c.policy = dict(heads=4, kv_heads=2, head_dim=16, rope_theta=100.0, qk_norm=True)
  c.warmstart = dict(clean_steps=200, steps=120)
  c.task = dict(name="evidence.tasks:Search", longest=3)
  c.rollout = dict(problems=8, group=8, max_prompt_tokens=5, max_tokens=40)
  c.reviewer = dict(name="oracle")
  c.credit = dict(scheme="calibrated")
  c.learner = dict(lr=4e-3, micro_batches=2)
  c.evaluate = dict(problems=64, samples=7)
  return c
