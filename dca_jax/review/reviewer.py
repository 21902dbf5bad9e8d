"""The `reviewer` section, and the reviewer that it describes."""

import dataclasses
import datetime
import functools
import hashlib
import math
import pathlib
from collections.abc import Callable

from dca_jax.checks import at_least, between, one_of, positive
from dca_jax.errors import UserError
from dca_jax.review.builtin import REVIEWERS, Builtin, Dice, Truth
from dca_jax.review.cache import Cache
from dca_jax.review.client import Client, Wallet
from dca_jax.review.client_config import ClientConfig
from dca_jax.review.gemini import Gemini
from dca_jax.review.limits import Budget
from dca_jax.review.openai import OpenAI
from dca_jax.review.panel import Escalating, Panel
from dca_jax.review.prices import Price, price
from dca_jax.review.prompt import RUBRIC
from dca_jax.review.transports import Transport
from dca_jax.review.types import Reviewer, Share

_ALONE = Share()
_FORGOTTEN = "forgotten"  # In the ledger, for whoever spent it.

TRANSPORTS: dict[str, Callable[[ClientConfig], Transport]] = {"gemini": Gemini, "openai": OpenAI}
"""The language models, by the name of what reaches them."""


@dataclasses.dataclass(frozen=True)
class ReviewerConfig:
  """The `reviewer` section."""

  name: str = "none"
  """`none`; `gemini` or `openai` (any server that speaks OpenAI's chat completions), called as `client` says; `oracle`,
  the task's own labels and prefix values; `noisy`, the oracle with labels flipped; `panel`, several at once. And
  controls: `applauds_repeats`, the oracle except that a step which repeats an earlier one is necessary, with weight 3;
  `random`; `lexical` applauds whatever looks like a check; `thief` gives all to one step; `suffix` changes
  its mind about a step with what follows it; `stale` answers with the review of the completion before; `nan` gives the
  oracle's review with a number missing; `silent` never answers in time."""
  flip: float = 0.3
  """`noisy`: chance that a step's label is turned into its opposite; at 0.5 it no longer tells right from wrong. As
  likely a value becomes one minus itself."""
  step: int = -1
  """`thief`: the step that gets everything; negative numbers count from the end."""
  seed: int = 0
  """`noisy`, `random`, `suffix` and `nan`: their dice; the same sample always gets the same review."""
  panel: tuple[str, ...] = ()
  """`panel`: its members, each NAME or NAME:MODEL."""
  combine: str = "vote"
  """`panel`: `vote`, `mean` or `median`."""
  escalate: str = ""
  """NAME or NAME:MODEL of a second reviewer, asked where the first one says that it is not sure."""
  deadline: float = 60.0
  """Seconds after which a step stops waiting; what is missing then gets uniform credit."""
  sample_frac: float = 1.0
  """Share of the completions that are reviewed, of those that a review can matter to."""
  overlap: int = 0
  """0: a batch is trained on before the next is sampled. 1: the next is sampled while the reviewer reads, so training
  runs one batch behind the policy that samples (learner.loss must be `ppo`, whose ratio accounts for it)."""
  required: bool = True
  """Language models: whether the run ends at its start where one of them gives no usable review to a first question,
  or only says so and begins."""
  canary_every: int = 0
  """Steps between reviews of demonstrations whose labels are known; 0 never asks."""
  client: ClientConfig = ClientConfig()

  @property
  def members(self) -> tuple[str, ...]:
    """Every reviewer that is asked, as NAME or NAME:MODEL."""
    first = self.panel if self.name == "panel" else (self.name,)
    return (*first, self.escalate) if self.escalate else first

  @property
  def models(self) -> tuple[str, ...]:
    """The members that are language models."""
    return tuple(member for member in self.members if member.partition(":")[0] in TRANSPORTS)

  def check(self) -> dict[str, str]:
    names = (*REVIEWERS, *TRANSPORTS)
    bad = one_of(self, "name", *names, "panel") | one_of(self, "combine", "vote", "mean", "median")
    bad |= between(0, 1, self, "flip") | positive(self, "sample_frac", most=1) | positive(self, "deadline")
    bad |= at_least(0, self, "canary_every") | one_of(self, "overlap", 0, 1)
    if self.name == "panel" and not self.panel:
      bad["panel"] = "must name at least one reviewer"
    for key, members in (("panel", self.panel), ("escalate", (self.escalate,) if self.escalate else ())):
      if unknown := [m for m in members if m.partition(":")[0] not in names]:
        bad[key] = f"knows no reviewer {unknown[0]!r}; there are {', '.join(names)}"
    if any(m.partition(":")[0] == "openai" for m in self.members) and not self.client.base_url:
      bad["client.base_url"] = "must be the server's address, such as http://localhost:8000/v1"
    return bad

  def unused(self) -> dict[str, str]:
    names = [member.partition(":")[0] for member in self.members]
    readers = {"flip": {"noisy"}, "step": {"thief"}, "seed": {"noisy", "random", "suffix", "nan"}}
    unused = [key for key, known in readers.items() if not known & set(names)]
    if self.name != "panel":
      unused += ["panel", "combine"]
    if self.name == "none":
      unused += ["escalate", "sample_frac", "overlap", "canary_every"]
    everything = {field.name for field in dataclasses.fields(ClientConfig)}
    unread = [set(getattr(TRANSPORTS[name], "unread", ())) for name in names if name in TRANSPORTS]
    unused += [f"client.{key}" for key in sorted(everything.intersection(*unread))]
    if not self.models:
      unused.append("required")
    return dict.fromkeys(unused, f"reviewer.name is '{self.name}'")


def open_reviewer(config: ReviewerConfig, truth: Truth, cache: pathlib.Path | None, share: Share = _ALONE) -> Reviewer:
  """The reviewer that `config` describes; `cache` is where replies that were paid for are kept.

  Raises:
    UserError: there is no key, no price for a cap in dollars, no rubric, or `cache` cannot be used.
  """
  kept = Cache(cache) if config.models else None  # One for all members: it may have to begin a new file.
  budget = Budget(config.client.max_dollars or math.inf, share)
  if kept is not None:  # A damaged or deleted file has forgotten what others still know.
    missing = max(0.0, share.spent - share.total(kept.total()))
    kept.add(_FORGOTTEN, missing / share.processes)
    budget.add_earlier(_FORGOTTEN, kept.spent(_FORGOTTEN))
  open_one = functools.partial(_open, config, truth, kept, budget, share.processes)
  if config.name == "panel":
    first: Reviewer = Panel([open_one(member) for member in config.panel], config.combine)
  else:
    first = open_one(config.name)
  return Escalating(first, open_one(config.escalate)) if config.escalate else first


def _open(
  config: ReviewerConfig,
  truth: Truth,
  cache: Cache | None,
  budget: Budget,
  processes: int,
  member: str,
) -> Reviewer:
  name, _, model = member.partition(":")
  if name in REVIEWERS:
    return Builtin(name, Dice(config.flip, config.step, config.seed), truth)
  assert cache is not None
  c = dataclasses.replace(config.client, model=model or config.client.model)
  server = hashlib.sha256(f"{name} {c.base_url}".encode()).hexdigest()[:8]
  open_transport = functools.partial(TRANSPORTS[name], c)
  price_of(c)  # That there is none is said now, and not at the first call.
  wallet = Wallet(functools.partial(price_of, c), budget)
  return Client(c, open_transport, f"{name}-{server}", read_rubric(c), wallet, cache, processes)


def read_rubric(config: ClientConfig) -> str:
  if not config.rubric:
    return RUBRIC
  try:
    return pathlib.Path(config.rubric).read_text(encoding="utf-8")
  except (OSError, ValueError) as error:
    raise UserError(f"reviewer.client.rubric: cannot read {config.rubric} ({error})") from None


def price_of(config: ClientConfig) -> Price | None:
  """What the model costs; None where the cap is 0, which says that it costs nothing.

  Raises:
    UserError: there is a cap and no price.
  """
  if not config.max_dollars:
    return None
  if config.prompt_price or config.output_price:
    return Price(config.prompt_price, config.prompt_price, config.output_price)
  if (known := price(config.model, datetime.date.today())) is None:
    raise UserError(
      f"reviewer.client.model: no price is known for {config.model!r}; set reviewer.client.prompt_price and"
      " output_price (dollars per million tokens), or reviewer.client.max_dollars to 0 if it costs nothing"
    )
  return known
