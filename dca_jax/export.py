"""From a run's checkpoint to an ordinary Hugging Face folder."""

import json
import logging
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dca_jax import config as config_lib
from dca_jax.errors import UserError, reason
from dca_jax.policy import PolicyConfig, join, merge, pretrained, split
from dca_jax.workdir import locate


def export(workdir: str, output: str, step: int | None = None, adapters: bool = False) -> str:
  """Writes the policy of the newest checkpoint, or of that of `step`, to the folder `output`; returns what was done.

  With `adapters` it is LoRA's adapters alone, in the format of peft; otherwise they are merged.

  Raises:
    UserError: there is no such run or checkpoint, it began from nothing or has no adapters, what it left is damaged, or
      the folder cannot be written.
  """
  folder = locate(workdir)
  section = config_lib.saved_config(workdir).policy
  if not section.pretrained:
    raise UserError(f"--workdir={workdir} began from nothing, not from policy.pretrained, whose format export writes")
  if adapters and not section.lora_rank:
    raise UserError(f"--workdir={workdir} has no adapters, as its policy.lora_rank is 0; leave --adapters out")
  place = pathlib.Path(output).expanduser().absolute()
  try:
    json.loads((folder / "tokenizer" / "tokenizer.json").read_bytes())
  except (OSError, ValueError) as error:
    raise UserError(f"{folder / 'tokenizer'} is gone or damaged ({reason(error)}); {_MAKES}") from None
  step, params = read_params(folder, step)
  if section.lora_rank and not adapters:
    try:
      with ocp.StandardCheckpointer() as checkpointer:
        start = checkpointer.restore(folder / "start")
    except Exception as error:  # Damage shows as any of a dozen types.
      raise UserError(f"{folder / 'start'} is gone or damaged ({reason(error)}); {_MAKES}") from error
    params = merge(join(split(start)[0], params), section.lora_scale)
    section = PolicyConfig(pretrained=section.pretrained, dtype=section.dtype)
  pretrained.save(params, pretrained.resolve(section, 0), section.pretrained, folder / "tokenizer", place)
  return f"step {step}: {sum(x.size for x in jax.tree.leaves(params)):,} parameters, written and read again: {place}"


_MAKES = "the command that began the run makes it anew"


def read_params(workdir: epath.Path, step: int | None):
  """The number of a checkpoint, the newest where `step` is None, and its parameters alone, on the host."""
  logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax warns of the parts that are not wanted here.
  with ocp.CheckpointManager(
    workdir / "checkpoints", item_handlers={"state": ocp.PyTreeCheckpointHandler()}
  ) as manager:
    steps = sorted(manager.all_steps())
    if not steps or step not in (None, *steps):
      raise UserError(f"{workdir} has no checkpoint" + (f" of step {step}; there are {steps}" if steps else " yet"))
    step = steps[-1] if step is None else step
    try:
      item = {"params": manager.item_metadata(step)["state"].tree["params"]}
      on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
      wanted = ocp.args.PyTreeRestore(item=item, restore_args=on_host, partial_restore=True)
      restored = manager.restore(step, args=ocp.args.Composite(state=wanted))
    except Exception as error:  # Damage shows as any of a dozen types.
      raise UserError(f"checkpoint {step} of {workdir} is unreadable ({error}); choose another --step") from error
  return step, restored.state["params"]
