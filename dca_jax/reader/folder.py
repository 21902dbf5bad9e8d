"""A reader on disk: WORKDIR/reader.json, its parameters and its tokenizer.

Of a published model the adapters and heads alone are kept; the model is read from where it was.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from dca_jax.devices import memory, mesh
from dca_jax.errors import UserError, reason
from dca_jax.policy import Policy, PolicyConfig, join, pretrained, split
from dca_jax.policy.sharding import replicated
from dca_jax.reader.network import Reader, devices, init_heads
from dca_jax.review.trained import FILE, VERSION, describe
from dca_jax.store.workdir import write_whole


def own_policy(config: PolicyConfig, ids: int) -> Policy:
  """The policy on this process's devices, each of which has all parameters and some of the rows.

  So its programs exchange nothing between devices, and may run beside those of training.
  """
  own = mesh.make_mesh(mesh.MeshConfig(), jax.local_devices())
  return Policy(config, ids, own)


def save(folder: pathlib.Path, reader: Reader, measured: dict[str, Any]) -> None:
  """Writes a reader; reader.json comes last, so that a folder with one is whole.

  Raises:
    UserError: it cannot be written.
  """
  kept = reader.params | {"body": split(reader.params["body"])[1]}
  said = {
    "version": VERSION,
    "policy": dataclasses.asdict(reader.policy.config),
    "ids": reader.policy.vocab_size,
    "gives": reader.gives,
    "limit": reader.limit,
    "measured": measured,
  }
  try:
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
      checkpointer.save(folder / "reader", args=ocp.args.StandardSave(kept), force=True)
    reader.tokenizer.save_pretrained(folder / "tokenizer")
    write_whole(folder / FILE, json.dumps(said, indent=2) + "\n")
  except Exception as error:  # Orbax and TensorStore report a full disk with types of their own.
    raise UserError(
      f"could not save {folder} ({reason(error)}); make room, then run again"
    ) from error


def load(folder: str) -> Reader:
  """The reader of a folder, on this process's devices.

  Raises:
    UserError: there is none, or it cannot be read.
  """
  import transformers  # Slow.

  said, path = describe(folder), pathlib.Path(folder).expanduser().absolute()
  policy = own_policy(_config(said), said["ids"])
  everywhere = replicated(devices(policy))
  wanted = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere),
    {"body": split(mesh.param_shapes(policy))[1], "heads": _heads(policy)},
  )
  try:
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
      kept = checkpointer.restore(path / "reader", args=ocp.args.StandardRestore(wanted))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path / "tokenizer")
  except Exception as error:  # Damage shows as any of a dozen types.
    raise UserError(f"{folder}: cannot be read ({reason(error)}); fit it again") from error
  if policy.config.lora_rank:
    kept["body"] = join(split(base(policy))[0], kept["body"])
  return Reader(policy, kept, tokenizer, tuple(said["gives"]), said["limit"])


def base(policy: Policy) -> Any:
  """The published model's parameters, with adapters that change nothing."""
  shardings = jax.tree.map(lambda _: replicated(devices(policy)), mesh.param_shapes(policy))
  return pretrained.load(policy, pretrained.folder(policy.config.pretrained, True), shardings)


def bytes_of(folder: str) -> int:
  """Bytes that a reader's parameters take on each device."""
  said = describe(folder)
  policy = Policy(_config(said), said["ids"])
  whole = jax.tree.leaves([mesh.param_shapes(policy), _heads(policy)])
  return sum(memory.size_of(a.shape, a.dtype) for a in whole)


def _heads(policy: Policy) -> Any:
  return jax.eval_shape(lambda: init_heads(policy.config.width, 0))


def _config(said: dict[str, Any]) -> PolicyConfig:
  lists = {k: tuple(v) for k, v in said["policy"].items() if isinstance(v, list)}
  return PolicyConfig(**(said["policy"] | lists))
