"""The mesh: where arrays live, and that no result depends on it.
Eight devices need a process of their own."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh

from dca_jax.devices.mesh import (
  MeshConfig,
  by_process,
  check_rows,
  device_order,
  make_mesh,
  param_shapes,
  state_shardings,
)
from dca_jax.devices.processes import put
from dca_jax.errors import UserError
from dca_jax.learner import Batch, Learner, LearnerConfig, init_state, make_optimizer, update
from dca_jax.policy import Policy, PolicyConfig, Sampling
from dca_jax.policy.attention import KeyValue, flash_attend
from dca_jax.policy.sharding import batch_sharding, replicated
from dca_jax.reader import Reader, own_policy
from dca_jax.reader.network import _said
from dca_jax.reader.texts import Ids, stacked
from dca_jax.review import Request

VOCAB = 24
P, G, S, T = 8, 2, 3, 4
POLICY = Policy(PolicyConfig(width=16, depth=2, heads=4, kv_heads=2, head_dim=4, mlp=24), VOCAB)
CONFIG = LearnerConfig(reference=False)
WIDE = PolicyConfig(width=64, depth=1, heads=4, kv_heads=2, head_dim=16, mlp=256)

# What one device of fsdp 4 x tensor 2 holds: the width in four parts; heads, hidden units and
# vocabulary in two.
SHARDS = {
  "embedding": (3, 16),
  "q": (2, 4, 2, 4),
  "k": (2, 4, 1, 4),
  "v": (2, 4, 1, 4),
  "o": (2, 2, 4, 4),
  "gate": (2, 4, 12),
  "up": (2, 4, 12),
  "down": (2, 12, 4),
  "attention_norm": (2, 4),
  "mlp_norm": (2, 4),
  "final_norm": (4,),
}


def shard_shapes(state) -> list:
  """(array, parameter, shape of its first shard), for the parameters and both moments of Adam."""
  trees = {"params": state.params} | {
    key: optax.tree_utils.tree_get(state.opt_state, key) for key in ("mu", "nu")
  }
  rows = []
  for name, tree in trees.items():
    for path, leaf in jax.tree.leaves_with_path(tree):
      keys = [key.key for key in path if key.key not in ("kernel", "scale")]
      rows.append([name, keys[-1], list(leaf.addressable_shards[0].data.shape)])
  return rows


def largest_difference(a, b) -> float:
  return max(
    float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def on_eight_devices() -> dict:
  """Runs in the process with eight devices; returns what the tests look at. Long, because what is
  compared shares one batch and its parameters."""
  rng = np.random.default_rng(0)
  batch = Batch(
    prompts_PxS=rng.integers(VOCAB, size=(P, S)).astype(np.int32),
    prompt_lengths_P=rng.integers(1, S + 1, size=P).astype(np.int32),
    tokens_BxT=rng.integers(VOCAB, size=(P * G, T)).astype(np.int32),
    sampled_BxT=np.arange(T) < rng.integers(1, T + 1, size=(P * G, 1)),
    trained_B=np.arange(P * G) != 3,
    advantages_BxT=rng.normal(size=(P * G, T)).astype(np.float32),
    logprobs_BxT=np.zeros((P * G, T), np.float32),
    reference_BxT=None,
  )
  report: dict = {"devices": jax.device_count()}

  # Sharded parameters, made and updated as in training; the first moment of Adam is a tenth of the
  # gradient.
  devices = make_mesh(MeshConfig(data=1, fsdp=4, tensor=-1))
  adam = make_optimizer(CONFIG, 10)
  shardings = state_shardings(devices, POLICY, adam)
  params = jax.jit(lambda key: nn.unbox(POLICY.init_params(key)), out_shardings=shardings.params)(
    jax.random.key(0)
  )
  start = jax.tree.map(np.array, params)
  state = jax.jit(functools.partial(init_state, adam), out_shardings=shardings)(params)
  report["before"] = shard_shapes(state)
  placed = jax.device_put(batch, batch_sharding(devices))
  learner = Learner(POLICY.clone(mesh=devices), CONFIG, Sampling(), adam)
  state, _, _ = update(learner, state, placed, put(np.bool_(True), replicated(devices)))
  report["after"] = shard_shapes(state)
  first = optax.tree_utils.tree_get(state.opt_state, "mu")
  sharded = jax.tree.map(lambda m: np.array(m) / np.float32(1 - CONFIG.adam_b1), first)

  # The same update with whole parameters, on one device and on eight that share the rows; the
  # gradient is kept as is.
  keep = optax.trace(0.0)
  results = []
  for mesh in (None, make_mesh(MeshConfig())):
    state, rows, on_policy = (
      init_state(keep, jax.tree.map(jnp.array, start)),
      batch,
      jnp.bool_(True),
    )
    if mesh is not None:
      state = jax.device_put(state, state_shardings(mesh, POLICY, keep))
      rows, on_policy = (
        jax.device_put(batch, batch_sharding(mesh)),
        put(np.bool_(True), replicated(mesh)),
      )
    learner = Learner(POLICY.clone(mesh=mesh), CONFIG, Sampling(), keep)
    state, metrics, logps = update(learner, state, rows, on_policy)
    results.append(jax.tree.map(np.array, (state, metrics, logps)))
  one, eight = results
  report["data_8"] = largest_difference(one, eight)
  report["fsdp_4_tensor_2"] = largest_difference(one[0].opt_state.trace, sharded)

  # In parts of several widths, each device with parts of its own rows.
  long = 104
  uneven = batch._replace(
    tokens_BxT=np.resize(batch.tokens_BxT, (P * G, long)),
    sampled_BxT=np.arange(long) < rng.integers(1, long + 1, size=(P * G, 1)),
    advantages_BxT=rng.normal(size=(P * G, long)).astype(np.float32),
    logprobs_BxT=np.zeros((P * G, long), np.float32),
  )
  results = []
  for mesh, n in ((None, 1), (make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), 2)):
    state, rows, on_policy = init_state(keep, jax.tree.map(jnp.array, start)), uneven, np.True_
    if mesh is not None:
      state = jax.device_put(state, state_shardings(mesh, POLICY, keep))
      rows = jax.device_put(uneven, batch_sharding(mesh))
      on_policy = put(np.bool_(True), replicated(mesh))
    config = dataclasses.replace(CONFIG, micro_batches=n)
    learner = Learner(POLICY.clone(mesh=mesh), config, Sampling(), keep)
    state, metrics, _ = update(learner, state, rows, on_policy)
    results.append(jax.tree.map(np.array, (state, metrics)))
  report["parts"] = largest_difference(*results)

  # A kernel works on each device's own rows and heads; this one is the form of cuDNN's call that
  # any device computes.
  q, k, v, *before = (
    rng.normal(size=(rows, n, 10, 8))
    for rows, n in ((P * G, 4), (P * G, 2), (P * G, 2), (P, 2), (P, 2))
  )
  keys = KeyValue(k.swapaxes(2, 3), v), KeyValue(before[0].swapaxes(2, 3), before[1])
  given = jax.tree.map(jnp.float32, (q.swapaxes(1, 2), *keys))
  lengths = jnp.repeat(batch.prompt_lengths_P, G)
  flash = functools.partial(flash_attend, window=3, scale=0.5, soft_cap=0.0, kernel="xla")
  outs = [
    jax.jit(functools.partial(flash, mesh=m))(*given, lengths)
    for m in (None, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
  ]
  report["flash"] = largest_difference(*jax.device_get(outs))

  # What an update of long completions takes on each device, whether the parameters are spread or
  # copied.
  by_token = {key: x for key, x in batch._asdict().items() if key.endswith("BxT") and x is not None}
  longer = batch._replace(**{key: np.repeat(x, 64, 1) for key, x in by_token.items()})
  for name, config in (("data", MeshConfig()), ("fsdp", MeshConfig(data=1, fsdp=8))):
    mesh = make_mesh(config)
    rows, policy = batch_sharding(mesh), Policy(WIDE, VOCAB, mesh)
    shapes = jax.tree.map(
      lambda x, rows=rows: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), longer
    )
    state = jax.eval_shape(functools.partial(init_state, keep), param_shapes(policy))
    state = jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      state,
      state_shardings(mesh, policy, keep),
    )
    on_policy = jax.ShapeDtypeStruct((), bool, sharding=replicated(mesh))
    learner = Learner(policy, CONFIG, Sampling(), keep)
    compiled = update.lower(learner, state, shapes, on_policy).compile()
    report[f"memory_{name}"] = compiled.memory_analysis().temp_size_in_bytes
  report["reader"] = exchanges_of_a_reader()
  report["gradient"] = max(float(np.abs(g).max()) for g in jax.tree.leaves(one[0].opt_state.trace))
  return report


def exchanges_of_a_reader() -> list[str]:
  """Those of the program that reads episodes, a prompt on each device."""
  policy = own_policy(POLICY.config, VOCAB)
  start = jax.device_get(nn.unbox(policy.init_params(jax.random.key(0))))
  made = Reader.new(policy, start, None, ("roles", "expected"), S + T, 0)
  one = Request("1/0/0", "ab", ("ab", "c"), True, False), Ids([1, 2], [1, 2, 3], [(0, 2), (2, 3)])
  texts = jax.device_put(stacked([[one] * G] * P, P, G), batch_sharding(policy.mesh))
  program = _said.lower(policy, made.params, texts, True).compile().as_text()
  assert f"num_partitions={jax.device_count()}" in program
  return re.findall(r"all-\w+|collective-\w+|reduce-scatter", program)


@pytest.fixture(scope="module")
def report():
  environment = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    # Programs for eight devices take long to compile, and are run once.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "PYTHONPATH": os.pathsep.join(
      [str(pathlib.Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    ),
  }
  done = subprocess.run(
    [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("when", ["before", "after"])
def test_parameters_and_moments_are_sharded_as_named(report, when):
  assert report["devices"] == 8
  assert {row[0] for row in report[when]} == {"params", "mu", "nu"}
  assert len(report[when]) == 3 * len(SHARDS)
  for array, parameter, shape in report[when]:
    assert tuple(shape) == SHARDS[parameter], (array, parameter)


@pytest.mark.parametrize("mesh", ["data_8", "fsdp_4_tensor_2", "parts"])
def test_an_update_does_not_depend_on_the_mesh(report, mesh):
  assert report["gradient"] > 0.01
  assert report[mesh] < 1e-5


def test_a_kernel_does_not_depend_on_the_mesh(report):
  assert report["flash"] < 1e-5


def test_a_reader_exchanges_nothing_so_it_may_read_while_others_train(report):
  assert report["reader"] == []


def test_each_device_computes_its_own_rows_alone(report):
  assert report["memory_fsdp"] < 1.5 * report["memory_data"]


@pytest.mark.parametrize(
  "config",
  [MeshConfig(data=3), MeshConfig(data=-1, fsdp=2), MeshConfig(data=2, fsdp=2, tensor=2)],
  ids=str,
)
def test_a_mesh_that_does_not_fit_is_an_error_that_names_the_keys(config):
  sizes = f"{config.data} x {config.fsdp} x {config.tensor}"
  message = rf"mesh\.data x mesh\.fsdp x mesh\.tensor = {sizes} does not fit 1 device"
  with pytest.raises(UserError, match=message):
    make_mesh(config)


def test_problems_that_do_not_divide_are_an_error_that_names_the_keys():
  devices = AbstractMesh((2, 4, 3), ("data", "fsdp", "tensor"))
  check_rows(devices, 24)
  with pytest.raises(UserError, match=r"rollout\.problems = 12 .*\b8 devices") as error:
    check_rows(devices, 12)
  assert "mesh.data x mesh.fsdp" in str(error.value)
  with pytest.raises(UserError, match=r"rollout\.carry = 12 .*\b8 devices"):
    check_rows(devices, 32, 12)


@pytest.mark.parametrize(
  ("fsdp", "tensor", "named"), [(1, 4, ("tensor", "4", "2")), (3, 1, ("fsdp", "3", "16"))]
)
def test_a_policy_that_does_not_divide_is_an_error_that_names_the_key(fsdp, tensor, named):
  devices = AbstractMesh((1, fsdp, tensor), ("data", "fsdp", "tensor"))
  with pytest.raises(UserError, match=r"mesh\.{} = {} does not divide {}, ".format(*named)):
    state_shardings(devices, POLICY, make_optimizer(CONFIG, 10))


@pytest.mark.parametrize(
  ("config", "key"),
  [
    (MeshConfig(fsdp=0), "fsdp"),
    (MeshConfig(tensor=-2), "tensor"),
    (MeshConfig(data=-1, fsdp=-1), "data"),
  ],
  ids=str,
)
def test_impossible_sizes_are_named(config, key):
  assert list(config.check()) == [key]


if __name__ == "__main__":
  print(json.dumps(on_eight_devices()))


class Device:
  """As much of a device as its place in a mesh depends on."""

  platform = device_kind = "cpu"

  def __init__(self, number: int, slice_index: int):
    self.id, self.slice_index, self.process_index = number, slice_index, slice_index


@pytest.mark.parametrize(
  ("shape", "across"), [((2, 4, 1), 0), ((4, 2, 1), 0), ((1, 8, 1), 1), ((1, 4, 2), 1)], ids=str
)
def test_only_one_axis_goes_across_slices(shape, across):
  devices = [Device(i, i // 4) for i in range(8)]
  order = device_order(shape, devices)
  assert order.shape == shape
  assert {device.id for device in order.flat} == set(range(8))
  slices = np.vectorize(lambda device: device.slice_index)(order)
  for axis in range(3):
    assert (axis == across) == bool((np.diff(slices, axis=axis) != 0).any())


def test_devices_of_a_process_follow_each_other():
  processes = 0, 0, 1, 1, 1, 0, 2, 0, 2, 2, 1, 2
  snake = np.array([Device(i, process) for i, process in enumerate(processes)]).reshape(1, 6, 2)
  order = by_process(snake)
  assert order.shape == snake.shape
  assert [device.id for device in order.flat] == [0, 1, 5, 7, 2, 3, 4, 10, 6, 8, 9, 11]


def test_axes_that_no_number_of_slices_divides_are_an_error():
  with pytest.raises(
    UserError, match=r"neither mesh\.data = 3 nor mesh\.fsdp = 1 is a multiple of the 2 slices"
  ):
    device_order((3, 1, 2), [Device(i, i % 2) for i in range(6)])


@pytest.mark.parametrize("sampler", [(2,), (0, 1, 1), (-1, -1, 1), (2, 1, -2)])
def test_a_sampler_mesh_that_cannot_be_is_refused(sampler):
  assert "sampler" in MeshConfig(sampler=sampler).check()
