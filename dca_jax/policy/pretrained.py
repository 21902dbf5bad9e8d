"""Pretrained weights in and out: an ordinary Hugging Face folder of safetensors becomes parameters, and these a folder.

A tensor is read shard by shard, straight to the device that keeps it, and a layer at a time, so the host never holds more
than that; it is transposed where it arrives.
"""

import functools
import json
import math
import operator
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dca_jax.errors import UserError
from dca_jax.policy.families import from_json, read_json, tensor_name, to_json
from dca_jax.policy.transformer import Policy, PolicyConfig

_SHARD_BYTES = 2**31
_DOWNLOADED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def resolve(config: PolicyConfig, vocab_size: int) -> PolicyConfig:
  """`config` itself, or the architecture of the model that `config.pretrained` names.

  Args:
    vocab_size: how many tokens the tokenizer has.

  Raises:
    UserError: the model cannot be had or is not supported, or the embedding has fewer rows than there are tokens.
  """
  if config.pretrained:
    path = folder(config.pretrained) / "config.json"
    config = from_json(read_json(path), str(path), config.dtype)
  if 0 < config.vocab_size < vocab_size:
    raise UserError(f"the embedding has {config.vocab_size} rows, but the tokenizer {vocab_size} tokens; one must change")
  return config


def folder(pretrained: str) -> pathlib.Path:
  """The local folder that `policy.pretrained` names, downloaded if it is a hub id."""
  path = pathlib.Path(pretrained).expanduser()
  if path.is_dir():
    return path
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(pretrained, allow_patterns=_DOWNLOADED))
  except Exception as error:  # The hub's client reports a bad name, no network and no such model in a dozen ways.
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    raise UserError(
      f"policy.pretrained = {pretrained!r} is no folder here, and the Hugging Face hub does not give it ({reason})"
    ) from error


# In.


class Tensor(NamedTuple):
  """Where a tensor lies, and what its file says of it."""

  file: pathlib.Path
  shape: tuple[int, ...]
  dtype: str

  def read(self, name: str, index=...) -> np.ndarray:
    with safe_open(self.file, framework="np") as file:
      return file.get_slice(name)[index]


def load(policy: Policy, source: pathlib.Path, shardings) -> Any:
  """The parameters in float32, from the safetensors files in `source`, which are all checked before the first is read.

  Args:
    shardings: of every parameter, as `mesh.state_shardings` makes them.

  Raises:
    UserError: a file is missing, cut short or damaged; a tensor is missing, unknown, or of another shape or type.
  """
  shapes = _shapes(policy)
  tensors = _check(policy.config, source, shapes)

  def one(path, leaf, sharding):
    keys, shape = _keys(path), leaf.shape[1:] if path[0].key == "blocks" else leaf.shape
    name, spec = tensor_name(policy.config, keys), (*sharding.spec, *[None] * leaf.ndim)[leaf.ndim - len(shape) : leaf.ndim]
    # Of the axes that a file has as one, only the first is ever sharded.
    spec = (spec[_inputs(keys)], spec[0]) if keys[-1] == "kernel" else spec[: len(_file_shape(keys, shape))]

    def put(name: str) -> jax.Array:
      there = NamedSharding(sharding.mesh, P(*spec))
      return jax.make_array_from_callback(tensors[name].shape, there, functools.partial(tensors[name].read, name))

    if len(shape) == leaf.ndim:
      return _placed(put(name), keys[-1] == "kernel", shape, sharding)
    stack = jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=sharding)()
    for i in range(policy.config.depth):
      stack = _with_layer(stack, put(name.format(i)), np.int32(i), keys[-1] == "kernel", sharding)
    return stack

  return jax.tree.map_with_path(one, shapes, shardings)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _placed(tensor, turned: bool, shape, sharding):
  ours = (tensor.T if turned else tensor).reshape(shape).astype(jnp.float32)
  return jax.lax.with_sharding_constraint(ours, sharding)


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _with_layer(stack, tensor, i, turned: bool, sharding):
  layer = (tensor.T if turned else tensor).reshape(stack.shape[1:]).astype(jnp.float32)
  return jax.lax.with_sharding_constraint(jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0), sharding)


def _check(config: PolicyConfig, source: pathlib.Path, shapes) -> dict[str, Tensor]:
  """All tensors in `source`, which are those that `shapes` needs, of the right shapes."""
  index = source / "model.safetensors.index.json"
  files = sorted(set(read_json(index).get("weight_map", {}).values())) if index.exists() else ["model.safetensors"]
  tensors = {}
  for path in map(source.joinpath, files):
    try:
      with safe_open(path, framework="np") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dict)
          part = file.get_slice(name)
          tensors[name] = Tensor(path, tuple(part.get_shape()), part.get_dtype())
    except FileNotFoundError:
      raise UserError(f"{path} is missing; download the model again") from None
    except (OSError, SafetensorError) as error:
      raise UserError(f"{path} is cut short or damaged ({error}); download the model again") from error
  wanted = {name: shape for name, _, _, shape in _named(config, shapes)}
  for name, shape in wanted.items():
    if name not in tensors:
      raise UserError(f"{source} has no tensor {name}, which its config.json calls for; download the model again")
    if tensors[name].shape != shape:
      raise UserError(
        f"{tensors[name].file}: {name} has the shape {tensors[name].shape}, but by config.json it is {shape};"
        " weights and config.json must be of one model"
      )
    if tensors[name].dtype not in ("F32", "BF16", "F16"):
      raise UserError(
        f"{tensors[name].file}: {name} is of type {tensors[name].dtype}; weights must be float32, bfloat16 or float16"
      )
  for name in sorted(tensors.keys() - wanted.keys()):
    # A tied model may have its head written out, and old Llamas their rotary frequencies.
    if not (config.tied and name == "lm_head.weight") and not name.endswith("rotary_emb.inv_freq"):
      raise UserError(f"{tensors[name].file}: {name} is a tensor that a model with this config.json does not have")
  return tensors


def _shapes(policy: Policy):
  return nn.unbox(jax.eval_shape(policy.init_params, jax.random.key(0)))


def _keys(path) -> tuple[str, ...]:
  return tuple(key.key for key in path)


def _inputs(keys: tuple[str, ...]) -> int:
  return 2 if keys[1] == "o" else 1


def _file_shape(keys: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape that one layer's parameter has in a file: [outputs, inputs], with no axis for heads."""
  if keys[-1] == "kernel":
    return math.prod(shape[_inputs(keys) :]), math.prod(shape[: _inputs(keys)])
  return (math.prod(shape),) if keys[-1] == "bias" else tuple(shape)


def _named(config: PolicyConfig, params) -> Iterator[tuple[str, tuple[str, ...], int | None, tuple[int, ...]]]:
  """For each tensor of a model its name, the keys of the parameter that it is or is a layer of, the layer, its shape."""
  shapes = {_keys(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}
  for keys, shape in shapes.items():
    if keys[0] != "blocks":
      yield tensor_name(config, keys), keys, None, _file_shape(keys, shape)
  for i in range(config.depth):
    for keys, shape in shapes.items():
      if keys[0] == "blocks":
        yield tensor_name(config, keys).format(i), keys, i, _file_shape(keys, shape[1:])


# Out.


def save(
  params, config: PolicyConfig, original: pathlib.Path | None, tokenizer: epath.Path, output: pathlib.Path
) -> None:
  """Writes a Hugging Face folder in float32, and reads it again before it gets its name.

  Args:
    params: of the whole model, on the host or on devices.
    config: the architecture, its `vocab_size` set.
    original: the folder that training began from, whose config.json and generation_config.json are kept; or None.
    tokenizer: a folder of tokenizer files.
    output: where the folder goes; it must not be there yet.

  Raises:
    UserError: `output` is there, no family has this architecture, it cannot be written, or it reads otherwise.
  """
  if output.exists():
    raise UserError(f"{output} is already there; choose another --output")
  described = read_json(original / "config.json") if original else to_json(config)
  described |= {"torch_dtype" if "torch_dtype" in described else "dtype": "float32"}
  partial = output.with_name(f".{output.name}.partial")
  try:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in tokenizer.iterdir():
      (partial / file.name).write_bytes(file.read_bytes())
    if original and (original / "generation_config.json").exists():
      shutil.copy(original / "generation_config.json", partial)
    (partial / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    _write(params, config, partial)
    _compare(params, config, partial)
    partial.rename(output)
  except (OSError, SafetensorError) as error:
    raise UserError(f"could not write {output} ({error}); make room or choose another --output") from error


def _write(params, config: PolicyConfig, folder: pathlib.Path) -> None:
  shards: list[list[tuple]] = []
  total = filled = 0
  for named in _named(config, params):
    size = 4 * math.prod(named[-1])
    if not shards or filled + size > _SHARD_BYTES:
      shards.append([])
      filled = 0
    shards[-1].append(named)
    filled += size
    total += size
  names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
  if len(shards) == 1:
    names = ["model.safetensors"]
  else:
    places = {named[0]: file for file, shard in zip(names, shards, strict=True) for named in shard}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
  for file, shard in zip(names, shards, strict=True):
    tensors = {name: _theirs(params, keys, layer, shape) for name, keys, layer, shape in shard}
    save_file(tensors, folder / file, metadata={"format": "pt"})


def _compare(params, config: PolicyConfig, folder: pathlib.Path) -> None:
  tensors = _check(config, folder, params)
  for name, keys, layer, shape in _named(config, params):
    if tensors[name].read(name).tobytes() != _theirs(params, keys, layer, shape).tobytes():
      raise UserError(f"{tensors[name].file}: {name} was not written as it is; the disk may be failing")
  if from_json(read_json(folder / "config.json"), str(folder / "config.json"), config.dtype) != config:
    raise UserError(f"{folder / 'config.json'} no longer describes the model; the files it was copied from have changed")


def _theirs(params, keys: tuple[str, ...], layer: int | None, shape: tuple[int, ...]) -> np.ndarray:
  """A tensor as a file has it."""
  ours = functools.reduce(operator.getitem, keys, params)
  ours = np.asarray(ours if layer is None else ours[layer], np.float32)
  return np.ascontiguousarray(ours.reshape(shape[::-1]).T if keys[-1] == "kernel" else ours.reshape(shape))
