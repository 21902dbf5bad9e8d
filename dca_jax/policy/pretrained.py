"""Pretrained weights in and out: a Hugging Face folder of safetensors becomes parameters, and
parameters a folder.

Each device gets its part of a tensor as the file has it, one layer at a time, so that the host
never holds more; there it is transposed into its place.
"""

import collections
import dataclasses
import functools
import json
import math
import operator
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

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

from dca_jax.errors import UserError, reason
from dca_jax.policy.config import FREE, STACKS, PolicyConfig
from dca_jax.policy.families import counts_for_nothing, family_of, read_json, text_part, text_tensor
from dca_jax.policy.lora import join, split
from dca_jax.policy.transformer import Policy
from dca_jax.progress import progress

_SHARD_BYTES = 2**31  # A file of an export ends with the tensor that fills it.
_ALL_EXPERTS = ("experts_gate_up", "experts_down")
_TURNED = ("kernel", "lora_a", "lora_b")  # Parameters that a file has transposed.


def resolve(config: PolicyConfig, vocab_size: int) -> PolicyConfig:
  """`config` itself, or the architecture of the model that `config.pretrained` names.

  Args:
    vocab_size: how many ids the tokenizer has. A published embedding may have fewer rows (Gemma 3
      has one fewer): none of the others is sampled, and `encode_prompts` refuses them.

  Raises:
    UserError: the model cannot be had or is not supported, or policy.vocab_size is too small.
  """
  if config.pretrained:
    path = folder(config.pretrained) / "config.json"
    free = {key: getattr(config, key) for key in FREE}
    config = dataclasses.replace(
      family_of(config).read(read_json(path), str(path), config.dtype), **free
    )
    for key in ("attention", "lora_targets"):
      if why := config.check().get(key):
        raise UserError(f"policy.{key} {why}: {path}")
  elif 0 < config.vocab_size < vocab_size:
    raise UserError(f"policy.vocab_size: must be 0 or at least {vocab_size}, one for each id")
  return config


def folder(pretrained: str, weights: bool = False) -> pathlib.Path:
  """The folder that `policy.pretrained` names; a hub id is downloaded, its weights if asked for."""
  path = pathlib.Path(pretrained).expanduser()
  if path.is_dir():
    return path
  try:
    patterns = ["*.json", "*.safetensors"] if weights else ["*.json"]
    return pathlib.Path(huggingface_hub.snapshot_download(pretrained, allow_patterns=patterns))
  except (
    Exception
  ) as error:  # The hub's client reports a bad name, no network and no such model in a dozen ways.
    said = f"{pretrained!r} is no folder, and the hub does not give it: {reason(error)}"
    raise UserError(f"policy.pretrained: {said}") from error


def load(policy: Policy, source: pathlib.Path, shardings) -> Any:
  """The parameters, from the safetensors files in `source`,
  which are all checked before the first is read.

  Adapters begin as ones that change nothing.

  Args:
    shardings: of every parameter, as `mesh.state_shardings` makes them.

  Raises:
    UserError: a file is missing, cut short or damaged; a tensor is missing, unknown, or
      of another shape.
  """
  shapes = nn.unbox(jax.eval_shape(policy.init_params, jax.random.key(0)))
  if policy.config.lora_rank:
    (shapes, _), (shardings, adapters) = split(shapes), split(shardings)
    make = jax.jit(lambda key: split(nn.unbox(policy.init_params(key)))[1], out_shardings=adapters)
  files = _check(policy.config, source, shapes)
  named = collections.defaultdict(list)
  for name, keys, index, _ in _named(policy.config, shapes):
    named[keys].append((name, index))
  bar = progress(total=len(files), desc="weights", unit="tensor")

  def one(path, leaf, sharding):
    keys, stacked = _keys(path), _stacked(_keys(path))
    shape, spec = (
      _file_shape(keys, leaf.shape[stacked:]),
      (*sharding.spec, *[None] * leaf.ndim)[stacked:],
    )
    # Of the axes that a file has as one, only the first is ever sharded.
    if keys[-2:][0] in _ALL_EXPERTS:
      spec = spec[0], spec[2], spec[1]
    elif keys[-1] == "kernel":
      spec = spec[_inputs(keys)], spec[0]
    spec = spec[: len(shape)]
    ours = jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=sharding)()
    for name, index in named[keys]:
      read = functools.partial(_read, *files[name])
      theirs = jax.make_array_from_callback(shape, NamedSharding(sharding.mesh, P(*spec)), read)
      # Waited for, or what was read would pile up on the host.
      ours = jax.block_until_ready(_fill(ours, theirs, index, keys[-1] == "kernel", sharding))
      bar.update()
    return ours

  with bar:
    loaded = jax.tree.map_with_path(one, shapes, shardings)
  return join(loaded, make(jax.random.key(0))) if policy.config.lora_rank else loaded


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _fill(ours, theirs, index, turned: bool, sharding):
  """`ours` with a file's tensor at `index`: the layer and the expert, where there are such."""
  new = theirs.swapaxes(-1, -2) if turned else theirs
  new = new.reshape(ours.shape[len(index) :]).astype(ours.dtype)
  new = jax.lax.dynamic_update_slice(ours, new[(None,) * len(index)], (*index, *[0] * new.ndim))
  return jax.lax.with_sharding_constraint(new, sharding)


def _read(path: pathlib.Path, name: str, index=...) -> np.ndarray:
  with safe_open(path, framework="np") as file:
    return file.get_slice(name)[index]


Places = dict[str, tuple[pathlib.Path, str]]
"""The file of every tensor, and what it is called there."""


def _check(config: PolicyConfig, source: pathlib.Path, params) -> Places:
  """Where the tensors in `source` are, which must be those of `params`, in the right shapes."""
  index = source / "model.safetensors.index.json"
  names = (
    sorted(set(read_json(index).get("weight_map", {}).values()))
    if index.exists()
    else ["model.safetensors"]
  )
  wanted = {name: shape for name, _, _, shape in _named(config, params)}
  files: Places = {}
  shapes: dict[str, tuple[int, ...]] = {}
  for path in map(source.joinpath, names):
    try:
      with safe_open(path, framework="np") as file:
        for theirs in file.keys():  # noqa: SIM118
          if name := theirs if theirs in wanted else text_tensor(theirs):
            shapes[name] = tuple(file.get_slice(theirs).get_shape())
            files[name] = path, theirs
    except FileNotFoundError:
      raise UserError(f"{path} is missing; download the model again") from None
    except (OSError, SafetensorError) as error:
      raise UserError(
        f"{path} is cut short or damaged ({error}); download the model again"
      ) from error
  for name, shape in wanted.items():
    if name not in shapes:
      raise UserError(
        f"{source} has no tensor {name}, which its config.json calls for; download the model again"
      )
    if shapes[name] != shape:
      raise UserError(
        f"{files[name][0]}: {name} has the shape {shapes[name]}, but by its config.json it is"
        f" {shape}"
      )
  for name in sorted(shapes.keys() - wanted.keys()):
    if not counts_for_nothing(config, name):
      raise UserError(
        f"{files[name][0]}: {name} is a tensor that a model with this config.json does not have"
      )
  return files


def _keys(path) -> tuple[str, ...]:
  return tuple(key.key for key in path)


def _stacked(keys: tuple[str, ...]) -> int:
  """How many leading axes a parameter has that files have not: layers, and experts."""
  layers = (keys[0] in STACKS) + (keys[1:2] == ("windowed",))
  return layers + keys[-2:][0].startswith("expert_")


def _inputs(keys: tuple[str, ...]) -> int:
  return 2 if keys[-2:][0] == "o" and keys[-1] != "lora_b" else 1


def _file_shape(keys: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape that one layer's parameter has in a file: [outputs, inputs],
  with no axis for heads; of all experts, if a file has them as one."""
  if keys[-2:][0] in _ALL_EXPERTS:
    return shape[0], shape[2], shape[1]
  if keys[-1] in _TURNED:
    return math.prod(shape[_inputs(keys) :]), math.prod(shape[: _inputs(keys)])
  return (math.prod(shape),) if keys[-1] in ("bias", "scale") else tuple(shape)


def _named(
  config: PolicyConfig, params
) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...], tuple[int, ...]]]:
  """For each tensor of a model its name, the keys of its parameter, where it is in that
  (the layer, the expert), and its shape."""
  shapes = {_keys(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}
  family = family_of(config)
  for keys, shape in shapes.items():
    if not _stacked(keys):
      yield family.tensor_name(config, keys), keys, (), _file_shape(keys, shape)
  for layer in range(config.depth):
    place, within = config.place(layer)
    for keys, shape in shapes.items():
      stacked, name = _stacked(keys), family.tensor_name(config, keys)
      if stacked and keys[: len(place)] == place:
        for expert in np.ndindex(shape[len(within) : stacked]):
          index = (*within, *expert)
          yield name.format(layer, *expert), keys, index, _file_shape(keys, shape[stacked:])


# Out.


def save(
  params, config: PolicyConfig, original: str, tokenizer: epath.Path, output: pathlib.Path
) -> None:
  """Writes a Hugging Face folder in float32, and reads it again before it gets its name.

  Args:
    params: of the whole model or, where `config` has a LoRA rank, of its adapters alone;
      on the host or on devices.
    original: the `policy.pretrained` that training began from.
    tokenizer: a folder of tokenizer files.

  Raises:
    UserError: `output` is there, cannot be written, or reads otherwise,
      or the model is not what `original` says.
  """
  if output.exists():
    raise UserError(f"{output} is already there; choose another --output")
  described = split(
    nn.unbox(jax.eval_shape(Policy(config, config.vocab_size).init_params, jax.random.key(0)))
  )[1]
  if jax.tree.map(jnp.shape, described) != jax.tree.map(jnp.shape, params):
    raise UserError(
      f"{original}: its config.json does not describe what was trained any more; bring the old one"
      " back"
    )
  partial = output.with_name(f".{output.name}.partial")
  try:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in tokenizer.iterdir():
      (partial / file.name).write_bytes(file.read_bytes())
    files = (_write_adapters if config.lora_rank else _write_model)(
      params, config, original, partial
    )
    named = progress([*_named(config, params)], "reading it again", unit="tensor")
    for name, keys, index, shape in named:
      if _read(*files[name]).tobytes() != _theirs(params, keys, index, shape).tobytes():
        raise UserError(
          f"{files[name][0]}: {name} was not written as it is; the disk may be failing"
        )
    partial.rename(output)
  except (OSError, SafetensorError) as error:
    raise UserError(
      f"could not write {output} ({error}); make room or choose another --output"
    ) from error


def _write_model(params, config: PolicyConfig, original: str, partial: pathlib.Path) -> Places:
  """Writes all of a model, with the config.json and generation_config.json it had, of a multimodal
  one those of its text part; returns where every tensor is."""
  source = folder(original)
  described = text_part(read_json(source / "config.json"))
  described |= {"torch_dtype" if "torch_dtype" in described else "dtype": "float32"}
  _write_json(partial / "config.json", described)
  if (source / "generation_config.json").exists():
    shutil.copy(source / "generation_config.json", partial)
  total, shards = 0, collections.defaultdict(list)
  places: dict[str, str] = {}
  for named in _named(config, params):
    shards[total // _SHARD_BYTES].append(named)
    total += 4 * math.prod(named[-1])
  for i, shard in enumerate(shards.values(), 1):
    file = f"model-{i:05}-of-{len(shards):05}.safetensors"
    places |= {name: file for name, *_ in shard}
    tensors = {name: _theirs(params, keys, index, shape) for name, keys, index, shape in shard}
    save_file(tensors, partial / file, metadata={"format": "pt"})
  _write_json(
    partial / "model.safetensors.index.json",
    {"metadata": {"total_size": total}, "weight_map": places},
  )
  return _check(config, partial, params)


def _write_adapters(params, config: PolicyConfig, original: str, partial: pathlib.Path) -> Places:
  """The same for adapters, as peft reads them."""
  published = read_json(folder(original) / "config.json")
  if text_part(published) is not published:
    raise UserError(
      f"{original} reads pictures too, and peft would look for the adapters of its text part"
      " elsewhere; leave --adapters out, which writes the text part as a model of its own"
    )
  tensors = {
    name: _theirs(params, keys, index, shape) for name, keys, index, shape in _named(config, params)
  }
  described = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": original,
    "r": config.lora_rank,
    "lora_alpha": config.lora_alpha,
    "target_modules": sorted({name.split(".")[-3] for name in tensors}),
    "bias": "none",
    "inference_mode": True,
  }
  _write_json(partial / "adapter_config.json", described)
  save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
  return {name: (partial / "adapter_model.safetensors", name) for name in tensors}


def _write_json(path: pathlib.Path, given: dict[str, Any]) -> None:
  path.write_text(json.dumps(given, indent=2) + "\n", encoding="utf-8")


def _theirs(
  params, keys: tuple[str, ...], index: tuple[int, ...], shape: tuple[int, ...]
) -> np.ndarray:
  """A tensor as a file has it."""
  ours = np.asarray(functools.reduce(operator.getitem, keys, params)[index], np.float32)
  if keys[-1] not in _TURNED:
    return np.ascontiguousarray(ours.reshape(shape))
  *first, outputs, inputs = shape
  return np.ascontiguousarray(ours.reshape(*first, inputs, outputs).swapaxes(-1, -2))
