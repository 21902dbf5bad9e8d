"""Rewriters: they propose a better answer, of which the policy then says whether it is one
(`rollout/rewrites.py`)."""

import dataclasses
import math
import pathlib
from typing import ClassVar

from dca_jax.checks import at_least, positive
from dca_jax.doors import door
from dca_jax.errors import UserError
from dca_jax.review.builtin import Instant, dice
from dca_jax.review.cache import Cache
from dca_jax.review.client_config import ClientConfig
from dca_jax.review.function import Calls
from dca_jax.review.language import LanguageModel, text_at
from dca_jax.review.limits import Budget
from dca_jax.review.prompt import REWRITE, REWRITE_RUBRIC, Form
from dca_jax.review.reviewer import Uses, find_reviewer, split_member
from dca_jax.review.types import Request, Review, Reviewer, Share, Truth


@dataclasses.dataclass(frozen=True)
class Rewriter:
  """The `rewrite` section: who proposes better answers. Here nobody does; a rewriter of your own
  extends `Proposing`."""

  source: str = "none"
  """`none`; `oracle`, the task's own corrections of wrong steps; `omission`, a right answer without
  one of its steps; `model`, a language model; or your own, MODULE:CLASS."""

  needs: ClassVar[tuple[str, ...]] = ()
  """What the task must offer."""

  @property
  def most(self) -> int:
    """How many rows a group has for rewrites beside those of its episodes."""
    return 0

  def improves(self, correct: bool) -> bool:
    """Whether it is asked about episodes that are right, or wrong."""
    return False

  def open(self, truth: Truth, cache: pathlib.Path | None, share: Share) -> Reviewer:
    """A reviewer whose reviews hold rewrites; `cache` is where replies are kept.

    Raises:
      UserError: something that it needs is missing.
    """
    return Instant(lambda requests: [Review("none")] * len(requests))


@dataclasses.dataclass(frozen=True)
class Proposing(Rewriter):
  """A rewriter that has `propose`, which is called in threads, or else `open`."""

  rows: int = 1
  """Rewrites of a group that are learnt at most, and asked for at most; the batch's share of them
  is never above rows / (rollout.group + rows)."""
  forced_weight: float = 1.0
  """Of the negative log-likelihood of what was forced: of a correction the step, of a shortcut the
  token. 1 counts as much as an advantage of 1."""
  weight: float = 1.0
  """Of the negative log-likelihood of what the policy wrote behind what was forced; 0 learns
  nothing of that."""
  answers: int = 1
  """How often the policy goes on from a rewrite, and, where an answer was right, from that."""
  deadline: float = 60.0
  """Seconds after which nobody waits for proposals any more."""

  kinds: ClassVar[tuple[str, ...]] = ("failures", "wins")
  """Of which episodes it can make better ones."""
  threads: ClassVar[int] = 8

  @property
  def most(self) -> int:
    return self.rows

  def improves(self, correct: bool) -> bool:
    return ("wins" if correct else "failures") in self.kinds

  def check(self) -> dict[str, str]:
    bad = at_least(1, self, "rows", "answers") | positive(self, "forced_weight", "deadline")
    bad |= at_least(0, self, "weight")
    if type(self).propose is Proposing.propose and type(self).open is Proposing.open:
      bad["source"] = "must have a method propose(self, request, truth)"
    return bad

  def propose(self, request: Request, truth: Truth) -> tuple[int, str] | None:
    """How many steps of an answer are kept, and what stands behind them; None where nothing better
    is known. What it raises is a failed proposal, which is counted."""
    raise NotImplementedError

  def reviewed(self, request: Request, truth: Truth) -> Review:
    said = self.propose(request, truth)
    return Review("ok", rewrite=said) if said else Review("none")

  def open(self, truth: Truth, cache: pathlib.Path | None, share: Share) -> Reviewer:
    return Calls(lambda request: self.reviewed(request, truth), self.source, self.threads)


@dataclasses.dataclass(frozen=True)
class _BuiltIn(Proposing):
  """A rewriter that answers at once."""

  def open(self, truth: Truth, cache: pathlib.Path | None, share: Share) -> Reviewer:
    return Instant(lambda requests: [self.reviewed(request, truth) for request in requests])


@dataclasses.dataclass(frozen=True)
class FromOracle(_BuiltIn):
  """The task's own correction of the first step that is an error."""

  source: str = "oracle"

  needs: ClassVar[tuple[str, ...]] = ("labels", "corrections")
  kinds: ClassVar[tuple[str, ...]] = ("failures",)

  def propose(self, request: Request, truth: Truth) -> tuple[int, str] | None:
    roles = truth.labels(request)
    k = next((k for k, role in enumerate(roles) if role == "error"), len(roles))
    said = truth.correction(request, k) if k < len(roles) else ""
    return (k, said) if said else None


@dataclasses.dataclass(frozen=True)
class Omission(_BuiltIn):
  """A right answer without one of its steps, drawn, but not the last one. It knows nothing: the
  policy has to find out which steps are needed."""

  source: str = "omission"
  seed: int = 0
  """Its dice; the same episode always loses the same step."""

  kinds: ClassVar[tuple[str, ...]] = ("wins",)

  def propose(self, request: Request, truth: Truth) -> tuple[int, str] | None:
    if len(request.steps) < 2:
      return None
    k = dice(self.seed, request.id).randrange(len(request.steps) - 1)
    return k, "".join(request.steps[k + 1 :])


@dataclasses.dataclass(frozen=True)
class FromModel(Proposing):
  """A language model, asked for the shortest continuation that would still be right."""

  source: str = "model"
  by: str = door("gemini")
  """NAME or NAME:MODEL of a reviewer that is a language model."""
  client: ClientConfig = ClientConfig()
  """How the model of `by` is called; it has its own `max_dollars`."""

  _UNREAD: ClassVar[tuple[str, ...]] = ("level", "examples", "samples", "whole_group")

  @property
  def model(self) -> LanguageModel:
    """Raises UserError where `by` names none."""
    name, model = split_member(self.by)
    kind = find_reviewer(name, "rewrite.by")
    if not issubclass(kind, LanguageModel):
      raise UserError(f"rewrite.by: {name} is no language model")
    client = dataclasses.replace(self.client, model=model or self.client.model)
    return kind(name=name, client=client)

  def check(self) -> dict[str, str]:
    try:
      wrong = self.model.check()
    except UserError as error:
      return {"by": str(error).removeprefix("rewrite.by: ")}
    return super().check() | {k if k.startswith("client.") else "by": v for k, v in wrong.items()}

  def unused(self) -> dict[str, str]:
    return {f"client.{key}": "it is asked for rewrites" for key in (*self._UNREAD, "repeat_frac")}

  def open(self, truth: Truth, cache: pathlib.Path | None, share: Share) -> Reviewer:
    client = self.client
    try:
      form = Form(text_at(client, "rubric") or REWRITE_RUBRIC, REWRITE, client.reference)
      budget = Budget(client.max_dollars or math.inf, share)
      uses = Uses(truth, cache, share, Cache(cache), budget)
      return self.model.opened(uses, form, f"rewrite-{self.by.partition(':')[0]}")
    except UserError as error:
      raise UserError(str(error).replace("reviewer.client", "rewrite.client")) from None


REWRITERS: dict[str, type[Rewriter]] = {
  kind.source: kind for kind in (Rewriter, FromOracle, Omission, FromModel)
}
