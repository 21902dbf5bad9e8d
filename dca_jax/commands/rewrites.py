"""The rewrites that a run's policy has borne out, as data for supervised fine-tuning."""

import json

from dca_jax.errors import UserError
from dca_jax.store.trajectories import read_trajectories, shards
from dca_jax.store.workdir import locate, write_whole


def rewrites(workdir: str, output: str) -> str:
  """Writes a line of JSON for each rewrite that was learnt from: prompt, completion, what it
  replaced and why it was kept; returns what was done.

  Raises:
    UserError: the run has none.
  """
  folder, lines = locate(workdir) / "trajectories", []
  for step in shards(folder):
    for episode in read_trajectories(folder, step):
      if (rewrite := episode.rewrite) is not None:
        line = {
          "prompt": episode.problem.prompt,
          "completion": rewrite.text,
          "replaced": episode.text,
          "why": "shorter" if episode.outcome.correct else "corrected",
          "before": rewrite.before,
          "after": rewrite.after,
          "id": episode.id,
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
  if not lines:
    raise UserError(f"--workdir={workdir}: no rewrites there; a run has some with rewrite.source")
  write_whole(locate(output), "".join(lines))
  return f"{len(lines):,} rewrites: {output}"
