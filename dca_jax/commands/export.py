"""From a run's checkpoint to an ordinary Hugging Face folder."""

import json
import pathlib

import jax

from dca_jax import config as config_lib
from dca_jax.errors import UserError, reason
from dca_jax.policy import PolicyConfig, join, merge, pretrained, split
from dca_jax.store.checkpoints import REMAKES, read_params, read_start
from dca_jax.store.workdir import locate


def export(workdir: str, output: str, step: int | None = None, adapters: bool = False) -> str:
  """Writes the policy of the newest checkpoint, or of that of `step`, to the folder `output`;
  returns what was done.

  With `adapters` it is LoRA's adapters alone, in the format of peft; otherwise they are merged.

  Raises:
    UserError: there is no such run or checkpoint, it began from nothing or has no adapters, what it
      left is damaged, or the folder cannot be written.
  """
  folder = locate(workdir)
  section = config_lib.saved_config(workdir).policy
  if not section.pretrained:
    raise UserError(
      f"--workdir={workdir} began from nothing, not from policy.pretrained, whose format export"
      " writes"
    )
  if adapters and not section.lora_rank:
    raise UserError(
      f"--workdir={workdir} has no adapters, as its policy.lora_rank is 0; leave --adapters out"
    )
  place = pathlib.Path(output).expanduser().absolute()
  try:
    json.loads((folder / "tokenizer" / "tokenizer.json").read_bytes())
  except (OSError, ValueError) as error:
    raise UserError(
      f"{folder / 'tokenizer'} is gone or damaged ({reason(error)}); {REMAKES}"
    ) from None
  step, params = read_params(folder, step)
  if section.lora_rank and not adapters:
    params = merge(join(split(read_start(folder))[0], params), section.lora_scale)
    section = PolicyConfig(
      pretrained=section.pretrained, family=section.family, dtype=section.dtype
    )
  pretrained.save(
    params, pretrained.resolve(section, 0), section.pretrained, folder / "tokenizer", place
  )
  count = sum(x.size for x in jax.tree.leaves(params))
  return f"step {step}: {count:,} parameters, written and read again: {place}"
