"""A calculator as a tool: episodes of several turns, one sum in each.

The warm start teaches a policy of about 150,000 parameters to hand on a line of sums one after the
other, with wrong calls, needless ones and guesses (`evidence/tasks/calculator.py`). Reinforcement
learning has only the final digit to go by.

Expect sampled accuracy on held-out problems to rise from 0.25 to above 0.9 in 15 steps of 64
episodes. docs/environments.md has the numbers. It needs the repository: the task is not in the
package.
"""

from ml_collections import ConfigDict

from evidence.tasks.arms import arms

# docs/environments.md says how the rates were chosen.
ARMS = arms(
  {
    "uniform": 2e-3,
    "calibrated": 2e-3,
    "fooled": 2e-3,
    "redistributed": 1e-3,
    "redistributed_fooled": 1e-3,
    "progress_0": 5e-4,
    "progress_1": 2e-3,
  }
)


def get_config():
  c = ConfigDict()
  c.steps = 25
  c.policy = dict(heads=4, kv_heads=2, head_dim=16, rope_theta=100.0, qk_norm=True)
  c.warmstart = dict(clean_steps=1200, steps=80)
  c.task = dict(name="evidence.tasks:Calculator", sums=3, wrong=0.1, needless=0.3, early=0.15)
  c.rollout = dict(problems=8, group=8, max_prompt_tokens=8, max_tokens=48)
  c.reviewer = dict(name="oracle")
  c.credit = dict(scheme="calibrated")
  c.learner = dict(lr=2e-3, micro_batches=2)
  c.evaluate = dict(problems=64, samples=7)
  return c
