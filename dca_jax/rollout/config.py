"""The `rollout` section: what a batch is made of, and how it is sampled."""

import dataclasses

from dca_jax.checks import at_least, one_of, positive
from dca_jax.policy import Sampling


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """The `rollout` section."""

  problems: int = 16
  """Problems in a batch."""
  group: int = 8
  """Completions of each problem."""
  max_prompt_tokens: int = 64
  """Longest prompt, in tokens; a longer one is an error that names its problem."""
  max_tokens: int = 48
  """Longest completion, in tokens, its end token included, and with an environment also what that
  says; one that reaches it without an end is truncated."""
  temperature: float = 1.0
  """Logits are divided by it, in sampling and in the learner alike; 1 leaves them."""
  top_k: int = 0
  """Tokens are drawn from the `top_k` likeliest; 0 keeps all, 1 is greedy decoding."""
  top_p: float = 1.0
  """Tokens are drawn from the smallest set of the likeliest whose probability reaches this, of what
  `top_k` leaves (Holtzman et al. 2020); 1 keeps all."""
  stop: tuple[str, ...] = ()
  """Strings that end a completion too, with the token that completes one."""
  zero_variance: str = "keep"
  """Groups whose completions all have the same reward: `keep` trains on them too (they carry no
  outcome signal, but count in the normalizer and in the KL and entropy terms), `skip` leaves them
  out, `refill` replaces them by groups of problems from a second order of the data; the first order
  passes through all of them either way."""
  refill_rounds: int = 4
  """`refill`: at most this many batches are sampled for one step; groups still missing then are
  skipped."""
  carry: int = 0
  """Problems that are begun beyond those of a batch. A step ends as soon as all completions of
  `problems` of them have ended; the others go on in the next step, with the parameters of that, so
  no step waits for its longest completion. Each token keeps the log-probability under the policy
  that wrote it (learner.loss must be `ppo`, whose ratio accounts for it). 0: every step finishes
  what it begins."""

  @property
  def sampling(self) -> Sampling:
    return Sampling(self.temperature, self.top_k, self.top_p)

  def check(self) -> dict[str, str]:
    bad = at_least(1, self, "problems", "max_prompt_tokens", "refill_rounds") | at_least(
      2, self, "group", "max_tokens"
    )
    bad |= at_least(0, self, "top_k", "carry") | positive(self, "top_p", most=1)
    bad |= one_of(self, "zero_variance", "keep", "skip", "refill")
    if self.temperature <= 0:
      bad["temperature"] = "must be positive; for greedy decoding set rollout.top_k to 1"
    if self.carry and self.zero_variance == "refill":
      bad["carry"] = "must be 0 with rollout.zero_variance 'refill'"
    if not all(isinstance(string, str) and string for string in self.stop):
      bad["stop"] = "must be strings that are not empty"
    return bad

  def unused(self) -> dict[str, str]:
    if self.zero_variance == "refill":
      return {}
    return {"refill_rounds": f"rollout.zero_variance is '{self.zero_variance}'"}
