"""Prompts as arrays of fixed shape."""

from collections.abc import Sequence

import numpy as np

from dca_jax.errors import UserError
from dca_jax.tasks import Problem
from dca_jax.tasks.tokenizer import unspelt


def encode_prompts(
  tokenizer, problems: Sequence[Problem], limit: int, rows: int
) -> tuple[np.ndarray, np.ndarray]:
  """Token ids [P, limit], filled up with zeros on the right, and lengths [P].

  Args:
    rows: of the policy's embedding, which can be fewer than the tokenizer has ids.

  Raises:
    UserError: a prompt is empty, longer than `limit`, or holds a token that the embedding lacks or
      a character that the tokenizer lacks; the message names the problem.
  """
  texts = [p.rendered or p.prompt for p in problems]
  ids_P = tokenizer(texts, add_special_tokens=False)["input_ids"]
  prompts_PxS = np.zeros((len(problems), limit), np.int32)
  for row, ids, text, problem in zip(prompts_PxS, ids_P, texts, problems, strict=True):
    if not 1 <= len(ids) <= limit:
      raise UserError(
        f"the prompt of problem {problem.id} has {len(ids)} tokens; rollout.max_prompt_tokens"
        f" allows 1 to {limit}: raise it, or leave such problems out ({problem.prompt[:60]!r})"
      )
    if max(ids) >= rows:
      raise UserError(
        f"the prompt of problem {problem.id} holds the token {tokenizer.decode(max(ids))!r}, number"
        f" {max(ids)}, and the policy's embedding has {rows} rows: take the model's own tokenizer,"
        f" or leave such problems out ({problem.prompt[:60]!r})"
      )
    if why := unspelt(tokenizer, text, ids):
      raise UserError(
        f"task.tokenizer: problem {problem.id}: {why}; add it, or leave such problems out"
        f" ({problem.prompt[:60]!r})"
      )
    row[: len(ids)] = ids
  return prompts_PxS, np.array([len(ids) for ids in ids_P], np.int32)
