"""What an engine is: samples that are wanted in, samples out as they end.

`slots` is ours; another is a subclass of `EngineConfig` that opens anything with a `stream`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from dca_jax.policy import Policy
from dca_jax.rollout.config import RolloutConfig

GREEDY = -1
"""The number of a sample that takes the likeliest token each time."""


class Wanted(NamedTuple):
  """Samples that are wanted, G of each of P prompts; row p * G + g is sample g of prompt p."""

  prompts_PxS: np.ndarray
  """Token ids, filled up with anything on the right; an answer that is to go on ends its prompt."""
  prompt_lengths_P: np.ndarray
  """At least 1."""
  problems_P: np.ndarray
  """What tells the noise of one prompt from that of another, each below 2**32."""
  numbers_PxG: np.ndarray
  """What tells the noise of one sample from that of another; number `GREEDY` has none."""
  limits_P: np.ndarray
  """Tokens that a sample may have, at least 1 and at most `rollout.max_tokens`."""
  begun_P: np.ndarray
  """How many of a prompt's last tokens belong to the answer already: a stop string may begin there,
  and the noise of what follows is that of its place in the answer."""

  def and_then(self, more: "Wanted") -> "Wanted":
    """Both, the rows of `more` counted on."""
    return Wanted(*map(np.concatenate, zip(self, more, strict=True)))


class Sample(NamedTuple):
  """A completion that has ended."""

  row: int
  """Of what was wanted."""
  tokens: np.ndarray
  """The token that ended it included; at least one."""
  logprobs: np.ndarray
  """Of each token, in nats, under the distribution that it was drawn from."""
  truncated: bool
  """Whether it ran out of tokens before an end token or a stop string."""
  ended: bool = True
  """False where it is to go on another time; see `Begun`."""


class Begun(NamedTuple):
  """What earlier steps wrote of the samples that are wanted, and what is enough of them now."""

  tokens_PxGxT: np.ndarray
  logprobs_PxGxT: np.ndarray
  """Under the policies that wrote them. What is given out has these, and goes on after them."""
  lengths_PxG: np.ndarray
  ended_PxG: np.ndarray
  """True for samples that had ended; nothing is given of these."""
  enough: int
  """As soon as all samples of so many problems have ended, the others are given as they are."""


class Further(Protocol):
  """What is wanted later on: of what has ended, some goes on when its environment has answered."""

  def take(self, wait: bool) -> Wanted | None:
    """What is wanted by now, in prompts as wide as those before and in groups of the same size;
    None where nothing is. With `wait` it blocks until something is, and None says that no more
    comes."""

  def expected(self) -> int:
    """How many samples may still be wanted, of those that were given out."""


class Engine(Protocol):
  """Samples completions, on this process's own devices."""

  def stream(
    self,
    params: Any,
    wanted: Wanted,
    noise: Sequence[int],
    further: Further | None = None,
    begun: Begun | None = None,
  ) -> Iterator[Sample]:
    """Gives every sample that is wanted once, when it has ended, in any order.

    Args:
      params: the policy's, laid out for sampling.
      further: asked again and again for what else is wanted, until no more comes; None where
        nothing else is.
      begun: with `rollout.carry`, and never with `further`.
      noise: numbers below 2**32 that tell this call's noise from that of others. The noise of a
        token depends on these, its problem, the number of its sample and its place alone, so that a
        run that goes on repeats what was lost.
    """
    ...


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """The `engine` section: what samples."""

  name: str = "slots"
  """`slots`; or your own, MODULE:CLASS."""

  def cannot_carry(self, rollout: RolloutConfig) -> str:
    """Why it cannot go on with what an earlier step began (`Begun`); empty where it can."""
    return "does not take up again what an earlier step began"

  def at_once(self, rollout: RolloutConfig) -> int:
    """Rows that decode at once, of all processes together."""
    return (rollout.problems + rollout.carry) * rollout.group

  def open(self, policy: Policy, rollout: RolloutConfig, tokenizer: Any) -> Engine:
    """The engine; `policy.mesh` has this process's devices."""
    raise NotImplementedError
