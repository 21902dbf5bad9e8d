from ml_collections import ConfigDict


def get_config():
  c = ConfigDict()
  c.steps = 10
  c.warmstart = dict(steps=20)
  c.reviewer = dict(name="oracle")
  c.credit = dict(scheme="weighted")
  return c
