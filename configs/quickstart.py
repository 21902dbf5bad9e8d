"""Two interleaved chains of modular arithmetic from a policy that has learnt them wrong:
credit by step against RLOO.

The warm start teaches a policy of about 150,000 parameters to write worked solutions. Three fifths
of the entries of its arithmetic table are wrong more often than not, in a fixed way, so that the
wrong digit is often the likeliest one. From there reinforcement learning has only the final digit
to go by.

Expect sampled accuracy on held-out problems to rise from 0.18 (greedy 0.20). In 120 steps of 128
completions, three seeds: `weighted` passes 0.8 after 3,000 to 4,500 completions and ends at 0.96 to
0.97, `uniform` (RLOO) after 9,300 to 11,700 and at 0.90 to 0.94; README.md has the command. The
first run makes the warm start, which is kept.
"""

from ml_collections import ConfigDict

# Arms for `dca-jax compare`, each with its own best learning rate; docs/method.md says how they
# were chosen. The guard is off where the scheme itself is to be seen.
_POTENTIAL = {"credit.scheme": "potential", "credit.discount": 0.0}
ARMS = {
  "uniform": {"learner.lr": 5e-4},
  "weighted": {"learner.lr": 1.5e-3},
  "calibrated": {"learner.lr": 1e-3},
  "noisy": {
    "credit.scheme": "weighted",
    "credit.guard": False,
    "reviewer.name": "noisy",
    "reviewer.flip": 0.3,
    "learner.lr": 1e-3,
  },
  "fooled": {
    "credit.scheme": "weighted",
    "credit.guard": False,
    "reviewer.name": "fooled",
    "learner.lr": 1.5e-3,
  },
  "guarded": {
    "credit.scheme": "weighted",
    "reviewer.name": "fooled",
    "learner.lr": 1.5e-3,
  },
  "signed": {"learner.lr": 2e-3},
  "potential_0": {**_POTENTIAL, "learner.lr": 1.5e-3},
  "potential_1": {**_POTENTIAL, "credit.discount": 1.0, "learner.lr": 7e-4},
  "return_to_go": {"learner.lr": 5e-4},
  "capo": {"learner.lr": 2e-3},
  "learned": {
    **_POTENTIAL,
    "credit.discount": 0.95,
    "reviewer.name": "none",
    "value.source": "learned",
    "learner.lr": 7e-4,
  },
  "monte_carlo": {
    **_POTENTIAL,
    "reviewer.name": "none",
    "value.source": "monte_carlo",
    "learner.lr": 1e-3,
  },
}


def get_config():
  c = ConfigDict()
  c.steps = 80
  c.policy = dict(heads=4, kv_heads=2, head_dim=16, rope_theta=100.0, qk_norm=True)
  c.warmstart = dict(clean_steps=600, steps=250)
  c.task = dict(misconceptions=0.6, wrong_low=0.5, wrong_high=0.65)
  c.rollout = dict(max_prompt_tokens=43)
  c.reviewer = dict(name="oracle")
  c.credit = dict(scheme="weighted")
  c.learner = dict(
    micro_batches=4
  )  # Smaller arrays stay in the processor's cache: a faster update, the same gradient.
  return c
