"""Training a reader on labelled episodes."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from dca_jax.policy import Policy, join, split
from dca_jax.policy.sharding import batch_sharding, replicated
from dca_jax.progress import progress
from dca_jax.reader.network import Reader, devices, loss
from dca_jax.reader.texts import Labelled, by_checks, encoded, fits, stacked, targets
from dca_jax.store.trajectories import read_trajectories, shards


@dataclasses.dataclass(frozen=True)
class FitConfig:
  """How a reader is trained."""

  epochs: int = 8
  batch: int = 64
  lr: float = 3e-3
  """Of Adam, after a warm-up of a tenth of the steps, falling to nothing along a cosine."""
  seed: int = 0


def refit(reader: Reader, trajectories: epath.Path, step: int) -> Reader:
  """A reader that has learnt from a run's spot checks up to `step`, from where `reader` stands: a
  function of what the run has written, so that a resumed one comes to the same."""
  steps = [own for own in shards(trajectories) if own <= step]
  episodes = (e for own in steps for e in read_trajectories(trajectories, own))
  labelled = by_checks(episodes)
  with jax.transfer_guard("allow"):
    return fit(FitConfig(), reader, labelled) if labelled else reader


def fit(config: FitConfig, reader: Reader, labelled: Sequence[Labelled]) -> Reader:
  """A reader that has learnt from labelled episodes, from where `reader` stands.

  Where its policy has adapters, these alone are trained, beside the heads. What is too long for it
  is left out.
  """
  tokenizer, by_row = reader.tokenizer, batch_sharding(devices(reader.policy))
  read = encoded(tokenizer, [one.request for one in labelled])
  rows = [i for i, ids in enumerate(read) if fits(ids, reader.limit)]
  labelled, read = [labelled[i] for i in rows], [read[i] for i in rows]
  # Stacked together once, so all batches have one shape.
  pairs = [[(one.request, ids)] for one, ids in zip(labelled, read, strict=True)]
  texts = stacked(pairs, len(rows), 1)
  examples = texts, targets(tokenizer, labelled, read, texts)
  frozen, adapted = split(reader.params["body"])
  trained = jax.tree.map(jnp.copy, reader.params | {"body": adapted})
  # Laid out as it comes back, or the step would be compiled a second time.
  opt_state = jax.device_put(_OPTIMIZER.init(trained), replicated(devices(reader.policy)))
  total = config.epochs * max(1, len(rows) // config.batch)
  rate = optax.warmup_cosine_decay_schedule(0.0, config.lr, total // 10, total)
  rates = np.asarray(rate(np.arange(total)), np.float32)
  with progress(total=total, desc="reviewer", unit="step") as bar:
    for i, chosen in enumerate(_order(config, len(rows), total)):
      batch = jax.device_put(jax.tree.map(lambda x, c=chosen: x[c], examples), by_row)
      trained, opt_state, value = _step(
        reader.policy, trained, opt_state, frozen, batch, jax.device_put(rates[i])
      )
      bar.update()
      if i % 50 == 0:
        bar.set_postfix(loss=float(value))
  return reader._replace(params=trained | {"body": join(frozen, trained["body"])})


_OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.99))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _step(
  policy: Policy, trained: Any, opt_state: Any, frozen: Any, batch: Any, rate: jax.Array
) -> tuple[Any, Any, jax.Array]:
  def of_trained(trained: Any) -> jax.Array:
    return loss(policy, trained | {"body": join(frozen, trained["body"])}, *batch)

  value, grads = jax.value_and_grad(of_trained)(trained)
  changes, opt_state = _OPTIMIZER.update(grads, opt_state)
  changes = jax.tree.map(lambda change: -rate * change, changes)
  return optax.apply_updates(trained, changes), opt_state, value


def _order(config: FitConfig, count: int, total: int) -> list[np.ndarray]:
  """The examples of every step; each epoch goes through all of them anew, in another order."""
  rng, need = np.random.default_rng(config.seed), total * config.batch
  epochs = [rng.permutation(count) for _ in range(-(-need // count))]
  return np.split(np.concatenate(epochs)[:need], total)
