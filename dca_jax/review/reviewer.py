"""The `reviewer` section, which every reviewer extends, and how the one it describes is opened."""

import dataclasses
import math
import pathlib
from typing import Any, ClassVar, NamedTuple

from dca_jax.checks import at_least, between, one_of, positive
from dca_jax.doors import choose, door
from dca_jax.errors import UserError
from dca_jax.review.cache import Cache
from dca_jax.review.client_config import ClientConfig
from dca_jax.review.function import Calls
from dca_jax.review.limits import Budget
from dca_jax.review.panel import Escalating
from dca_jax.review.types import Request, Review, Reviewer, Share, Truth

_ALONE = Share()
_FORGOTTEN = "forgotten"  # In the ledger, for whoever spent it.


class Uses(NamedTuple):
  """What a reviewer may use."""

  truth: Truth
  """What the task knows, as far as the reviewer `reads_truth`."""
  cache: pathlib.Path | None
  """The file of replies that were paid for, in the run's workdir; None where nothing is kept."""
  share: Share
  replies: Cache | None
  """That file, opened, where there are language models among the reviewers."""
  budget: Budget
  """Of dollars, for all of them together."""
  trajectories: Any = None
  """The folder of a run's episodes; None outside of training."""


@dataclasses.dataclass(frozen=True)
class ReviewerConfig:
  """The `reviewer` section. A reviewer extends it with settings of its own, and has `review`, which
  is called in threads, or else `open`."""

  name: str = ""
  """`none`; `gemini` or `openai` (any server that speaks OpenAI's chat completions), called as
  `client` says; `oracle`, the task's own labels and prefix values; `noisy`, the oracle with labels
  flipped; `panel`, several at once; `trained`, one that `dca-jax fit-reviewer` made; or your own,
  MODULE:CLASS. And controls: `fooled`, the oracle except that a step which repeats an earlier one
  is necessary, with weight 3; `random`; `lexical` applauds whatever looks like a check; `thief`
  gives all to one step; `suffix` changes its mind about a step with what follows it; `stale`
  answers with the review of the completion before; `nan` gives the oracle's review with a number
  missing; `silent` never answers in time."""
  escalate: str = door("")
  """NAME or NAME:MODEL of a second reviewer, asked where the first one says that it is not sure."""
  deadline: float = 60.0
  """Seconds after the last question of a step at which it stops waiting; what is missing then gets
  uniform credit."""
  sample_frac: float = 1.0
  """Share of the completions that are reviewed, of those that a review can matter to."""
  overlap: int = 0
  """0: a batch is trained on before the next is sampled. 1: the next is sampled while the reviewer
  reads, so training runs one batch behind the policy that samples (learner.loss must be `ppo`,
  whose ratio accounts for it)."""
  required: bool = True
  """Language models: whether the run ends at its start where one of them gives no usable review to
  a first question, or only says so and begins."""
  audit_every: int = 0
  """Steps between audits in training: faults are planted in right answers of the batch, and the
  reviewer is asked about these and their untouched twins; 0 never asks."""
  audit_floor: float = 0.0
  """Where such an audit finds a smaller share of the planted faults, the run ends; 0 never ends
  it."""
  client: ClientConfig = ClientConfig()
  """How the language models among the reviewers are called."""

  reads_truth: ClassVar[tuple[str, ...]] = ()
  """What it wants of the task: `labels`, which it cannot do without, and `values`."""
  gives: ClassVar[tuple[str, ...]] = ("roles",)
  """What its reviews hold: `roles` with weights, or `values`, or both."""
  is_model: ClassVar[bool] = False
  """Whether it is a language model: it costs money, is asked a first question
  and reads `client`."""
  unread: ClassVar[tuple[str, ...]] = ()
  """Language models: keys of `client` that it has no use for."""
  threads: ClassVar[int] = 8
  """How many calls of `review` may run at once."""

  def review(self, request: Request) -> Review:
    """The review of one episode; what it raises makes a failed review, which is counted."""
    raise NotImplementedError

  def open(self, uses: Uses) -> Reviewer:
    """Raises UserError where something that it needs is missing."""
    return Calls(self.review, self.name, self.threads)

  @property
  def reads_checks(self) -> bool:
    """Whether it learns from the run's own spot checks."""
    return False

  @property
  def device_bytes(self) -> int:
    """What it keeps on each device of the run."""
    return 0

  @property
  def is_truth(self) -> bool:
    """Whether what it says is the task's own truth, so that nobody can please it."""
    return False

  @property
  def first(self) -> tuple["ReviewerConfig", ...]:
    """Everyone who is asked about every episode."""
    return (self,)

  @property
  def second(self) -> tuple["ReviewerConfig", ...]:
    """Who is asked where the first are unsure."""
    return self._found((self.escalate,) if self.escalate else ())

  @property
  def members(self) -> tuple["ReviewerConfig", ...]:
    """Every reviewer that is asked."""
    return (*self.first, *self.second)

  @property
  def models(self) -> tuple["ReviewerConfig", ...]:
    """The members that are language models."""
    return tuple(member for member in self.members if member.is_model)

  def gives_of(self, offers: tuple[str, ...]) -> set[str]:
    """What its reviews hold of a task that `offers` some truth."""
    needs = {"roles": "labels", "values": "values"}
    return {what for what in self.gives if needs[what] not in {*self.reads_truth} - {*offers}}

  def member(self, spec: str, key: str) -> "ReviewerConfig":
    """The reviewer NAME or NAME:MODEL, with those of this section's settings that it has too.

    Raises:
      UserError: there is none of that name; `key` is where it is named.
    """
    name, model = split_member(spec)
    kind = find_reviewer(name, key)
    ours = {field.name for field in dataclasses.fields(self)} - {"name", "escalate", "panel"}
    shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(kind) if f.name in ours}
    client = dataclasses.replace(self.client, model=model or self.client.model)
    return kind(**(shared | {"name": name, "client": client}))

  def _found(self, specs: tuple[str, ...]) -> tuple["ReviewerConfig", ...]:
    """The members of these names; `check` complains of those that there are not."""
    found = []
    for spec in specs:
      try:
        found.append(self.member(spec, ""))
      except UserError:
        continue
    return tuple(found)

  def _check_members(self, key: str, specs: tuple[str, ...]) -> dict[str, str]:
    bad: dict[str, str] = {}
    for spec in specs:
      try:
        wrong = self.member(spec, f"reviewer.{key}").check()
      except UserError as error:
        return {key: str(error).removeprefix(f"reviewer.{key}: ")}
      shared = {k: why for k, why in wrong.items() if hasattr(self, k.partition(".")[0])}
      bad |= shared
      for own in wrong.keys() - shared:
        bad[key] = f"{spec}: {own} {wrong[own]}"
    return bad

  def check(self) -> dict[str, str]:
    bad = positive(self, "sample_frac", most=1) | positive(self, "deadline")
    bad |= at_least(0, self, "audit_every") | one_of(self, "overlap", 0, 1)
    bad |= between(0, 1, self, "audit_floor")
    kind = type(self)
    if kind.open is ReviewerConfig.open and kind.review is ReviewerConfig.review:
      bad["name"] = "must have a method review(self, request)"
    return bad | self._check_members("escalate", (self.escalate,) if self.escalate else ())

  def unused(self) -> dict[str, str]:
    everything = {field.name for field in dataclasses.fields(ClientConfig)}
    unread = everything.intersection(*(member.unread for member in self.models))
    unused = [f"client.{key}" for key in sorted(unread)] + ([] if self.models else ["required"])
    never = {} if self.audit_every else {"audit_floor": "reviewer.audit_every is 0"}
    return dict.fromkeys(unused, f"reviewer.name is '{self.name}'") | never


def split_member(spec: str) -> tuple[str, str]:
  """The name and the model of NAME, NAME:MODEL, MODULE:CLASS or MODULE:CLASS:MODEL."""
  name, _, model = spec.partition(":")
  if name in _built_in():
    return name, model
  attribute, _, model = model.partition(":")
  return f"{name}:{attribute}" if attribute else name, model


def find_reviewer(name: str, key: str) -> type[ReviewerConfig]:
  """A built-in reviewer or that of MODULE:CLASS; UserError where there is none."""
  return choose(name, key, ReviewerConfig, _built_in())


def _built_in() -> dict[str, type[ReviewerConfig]]:
  from dca_jax.review import REVIEWERS  # They extend what is defined here.

  return REVIEWERS


def open_reviewer(
  config: ReviewerConfig,
  truth: Truth,
  cache: pathlib.Path | None,
  share: Share = _ALONE,
  trajectories: Any = None,
) -> Reviewer:
  """The reviewer that `config` describes; `cache` is where replies that were paid for are kept,
  `trajectories` where a run keeps its episodes.

  Raises:
    UserError: there is no key, no price for a cap in dollars, no rubric, or `cache` cannot be used.
  """
  # One for all members: it may have to begin a new file.
  kept = Cache(cache) if config.models else None
  budget = Budget(config.client.max_dollars or math.inf, share)
  if kept is not None:  # A damaged or deleted file has forgotten what others still know.
    missing = max(0.0, share.spent - share.total(kept.total()))
    kept.add(_FORGOTTEN, missing / share.processes)
    budget.add_earlier(_FORGOTTEN, kept.spent(_FORGOTTEN))
  uses = Uses(truth, cache, share, kept, budget, trajectories)
  first = config.open(uses)
  return Escalating(first, config.second[0].open(uses)) if config.second else first
