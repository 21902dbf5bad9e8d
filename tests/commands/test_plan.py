"""The memory that is planned, against what XLA says it takes."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
import tiny

from dca_jax import learner
from dca_jax.commands.plan import batch_shapes, memory, plan
from dca_jax.devices import mesh
from dca_jax.devices.memory import check_fits
from dca_jax.errors import UserError
from dca_jax.policy import Policy
from dca_jax.rollout import Wanted, slots

VOCAB = 300
CHANGES = {
  "policy.width": 128,
  "policy.depth": 4,
  "policy.heads": 4,
  "policy.kv_heads": 2,
  "policy.head_dim": 32,
  "policy.mlp": 384,
  "rollout.problems": 8,
  "rollout.group": 4,
  "rollout.max_tokens": 96,
  "rollout.max_prompt_tokens": 32,
  "learner.micro_batches": 2,
}


def planned(changes, devices=1):
  config = tiny.make_config({**CHANGES, **changes})
  return config, memory(
    config, Policy(config.policy, VOCAB), *mesh.abstract_meshes(config.mesh, devices)
  )


@pytest.mark.parametrize(
  "changes", [{}, {"learner.micro_batches": 1}, {"policy.dtype": "bfloat16"}], ids=str
)
def test_the_update_takes_about_what_is_planned(changes):
  config, ours = planned(changes)
  policy, optimizer = (
    Policy(config.policy, VOCAB),
    learner.make_optimizer(config.learner, config.steps),
  )
  state = jax.eval_shape(lambda p: learner.init_state(optimizer, p), mesh.param_shapes(policy))
  settings = policy, config.learner, config.rollout.sampling, optimizer
  update = functools.partial(learner.update, learner.Learner(*settings))
  compiled = (
    jax.jit(update)
    .lower(
      state,
      batch_shapes(config, config.rollout.problems, config.rollout.group),
      jax.ShapeDtypeStruct((), bool),
    )
    .compile()
  )
  theirs = compiled.memory_analysis()
  assert ours.parameters + ours.optimizer == pytest.approx(theirs.output_size_in_bytes, rel=0.05)
  assert 0.5 < sum(ours.updating.values()) / theirs.temp_size_in_bytes < 2


def test_remat_keeps_less():
  kept = [
    planned({"policy.remat": r})[1].updating["activations of a part"]
    for r in ("all", "projections", "layers")
  ]
  assert kept[0] > 1.5 * kept[1] > 3 * kept[2] > 0


@pytest.mark.parametrize("continuations", [0, 6])
def test_sampling_takes_about_what_is_planned(continuations):
  """Evaluation draws batches of training's shape; continuations have answers
  that were begun as their prompts."""
  values = {
    "credit.scheme": "potential",
    "value.source": "monte_carlo",
    "value.continuations": continuations,
  }
  config, ours = planned(values if continuations else {})
  policy, r = Policy(config.policy, VOCAB), config.rollout
  p, s, g = r.problems, r.max_prompt_tokens, r.group
  if continuations:
    p, s, g = p * g, s + r.max_tokens, 1
  shapes, key = mesh.param_shapes(policy), jax.eval_shape(lambda: jax.random.key(0))
  given = Wanted(
    *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((p, s), (p,), (p,), (p, g), (p,), (p,)))
  )
  start = functools.partial(slots.begin, policy, ring=r.max_tokens, most=r.max_tokens)
  rows = jax.eval_shape(start, shapes, given, key)
  one = jax.ShapeDtypeStruct((), jnp.int32)
  ends = slots.Ends(jax.ShapeDtypeStruct((1,), jnp.int32), one, one)
  live = jax.ShapeDtypeStruct((p * g,), jnp.bool_)
  lowered = slots.decode.lower(policy, r.sampling, shapes, ends, rows, live)
  theirs = lowered.compile().memory_analysis()
  held = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(rows.context))
  assert 0.5 < sum(ours.sampling.values()) / (theirs.temp_size_in_bytes + held) < 2


def test_devices_share_what_the_mesh_says():
  _, one = planned({})
  _, fsdp = planned({"mesh.fsdp": 4, "mesh.data": 1}, 4)
  assert fsdp.parameters == pytest.approx(one.parameters / 4, rel=0.01)
  assert fsdp.optimizer == pytest.approx(one.optimizer / 4, rel=0.01)
  assert fsdp.sampling["keys and values"] == one.sampling["keys and values"] // 4
  _, data = planned({"mesh.data": 4}, 4)
  assert data.parameters == one.parameters
  assert data.updating["activations of a part"] < one.updating["activations of a part"] / 3
  _, apart = planned({"mesh.fsdp": 4, "mesh.data": 1, "mesh.sampler": (4, 1, 1)}, 4)
  assert apart.sampling["parameters as the sampler has them"] == one.parameters


def test_copies_of_the_policy_count():
  _, alone = planned({})
  _, both = planned(
    {
      "learner.reference": True,
      "reviewer.name": "oracle",
      "credit.scheme": "weighted",
      "reviewer.overlap": 1,
      "learner.loss": "ppo",
    }
  )
  assert (alone.copies, both.copies) == (0, 2 * alone.parameters)


def test_a_plan_says_which_chips_it_fits():
  small = plan(tiny.make_config(CHANGES), 1)
  assert "v5e, 14.9 GiB: fits" in small
  large = {
    "policy.width": 4096,
    "policy.depth": 32,
    "policy.mlp": 16384,
    "policy.head_dim": 128,
    "policy.heads": 32,
  }
  said = plan(tiny.make_config({**CHANGES, **large, "mesh.fsdp": 4, "mesh.data": 1}), 4)
  assert "v5e, 14.9 GiB: does not fit" in said
  assert "v5p, 88.5 GiB: fits" in said
  assert "tpu7x, 89.4 GiB: fits" in said


def test_a_policy_that_cannot_fit_is_refused():
  config = tiny.make_config(
    {**CHANGES, "policy.width": 16384, "policy.mlp": 65536, "policy.depth": 64}
  )
  policy, optimizer = (
    Policy(config.policy, VOCAB),
    learner.make_optimizer(config.learner, config.steps),
  )
  state = jax.eval_shape(lambda p: learner.init_state(optimizer, p), mesh.param_shapes(policy))
  shardings = mesh.state_shardings(mesh.make_mesh(config.mesh), policy, optimizer)
  state = jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings
  )
  with pytest.raises(UserError, match=r"take \d+\.\d GiB on each device, .* raise mesh\.fsdp"):
    check_fits(state)
