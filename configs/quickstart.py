from ml_collections import ConfigDict


def get_config():
  c = ConfigDict()
  c.steps = 100
  c.policy = dict(heads=4, kv_heads=2, head_dim=16, rope_theta=100.0, qk_norm=True)
  c.warmstart = dict(clean_steps=600, steps=100, lr=1.2e-2)
  c.rollout = dict(max_prompt_tokens=43)
  c.reviewer = dict(name="oracle")
  c.credit = dict(scheme="weighted")
  return c
