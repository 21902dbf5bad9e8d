"""Language models as reviewers: what they share, and what they cost."""

import dataclasses
import datetime
import functools
import hashlib
import pathlib
from typing import ClassVar

from dca_jax.errors import UserError
from dca_jax.review.client import Client, Wallet
from dca_jax.review.client_config import TIERS, ClientConfig
from dca_jax.review.gemini import Gemini
from dca_jax.review.openai import OpenAI
from dca_jax.review.prices import Price, price
from dca_jax.review.prompt import LEVELS, Form, instructions
from dca_jax.review.reviewer import ReviewerConfig, Uses
from dca_jax.review.transports import Transport
from dca_jax.review.types import Reviewer


@dataclasses.dataclass(frozen=True)
class LanguageModel(ReviewerConfig):
  """A reviewer that is a language model. One of your own overrides `connect`."""

  is_model: ClassVar[bool] = True

  def connect(self, client: ClientConfig) -> Transport:
    """What carries a prompt to the model and its reply back; raises UserError without a key."""
    raise NotImplementedError

  def check(self) -> dict[str, str]:
    bad = super().check()
    if type(self).connect is LanguageModel.connect:
      bad["name"] = "must have a method connect(self, client)"
    return bad

  def unused(self) -> dict[str, str]:
    none = {"audit_every": "reviewer.client.level is 'values'"} if self._values else {}
    return super().unused() | none

  def gives_of(self, offers: tuple[str, ...]) -> set[str]:
    return {"values"} if self._values else {"roles"}

  @property
  def _values(self) -> bool:
    return LEVELS.get(self.client.level) == ()

  def open(self, uses: Uses) -> Reviewer:
    return self.opened(uses, form_of(self.client), self.name)

  def opened(self, uses: Uses, form: Form, name: str) -> Reviewer:
    """What asks for a `form` of reviews, and spends under a `name`."""
    assert uses.replies is not None
    c = self.client
    server = hashlib.sha256(f"{self.name} {c.base_url}".encode()).hexdigest()[:8]
    price_of(c)  # That there is none is said now, and not at the first call.
    wallet = Wallet(functools.partial(price_of, c), uses.budget)
    transport = functools.partial(self.connect, c)
    spender, processes = f"{name}-{server}", uses.share.processes
    return Client(c, transport, spender, form, wallet, uses.replies, processes)


@dataclasses.dataclass(frozen=True)
class GeminiModel(LanguageModel):
  """Gemini, with a key or through Google Cloud."""

  name: str = "gemini"

  def connect(self, client: ClientConfig) -> Transport:
    return Gemini(client)


@dataclasses.dataclass(frozen=True)
class OpenAIModel(LanguageModel):
  """Any server that speaks OpenAI's chat completions."""

  name: str = "openai"

  unread: ClassVar[tuple[str, ...]] = ("vertex", "tier", "keep_instructions")

  def check(self) -> dict[str, str]:
    bad = super().check()
    if not self.client.base_url:
      bad["client.base_url"] = "must be the server's address, such as http://localhost:8000/v1"
    return bad

  def connect(self, client: ClientConfig) -> Transport:
    return OpenAI(client)


def form_of(config: ClientConfig) -> Form:
  """How reviews are asked for; raises UserError where a file that it names cannot be read."""
  rubric, examples = (text_at(config, key) for key in ("rubric", "examples"))
  try:
    said = instructions(config.level, rubric, examples.splitlines())
  except ValueError as error:
    raise UserError(f"reviewer.client.examples: {config.examples}: {error}") from None
  return Form(said, config.level, config.reference)


def text_at(config: ClientConfig, key: str) -> str:
  """The text of the file that a key names; empty where it names none."""
  path = getattr(config, key)
  try:
    return pathlib.Path(path).read_text(encoding="utf-8") if path else ""
  except (OSError, ValueError) as error:
    raise UserError(f"reviewer.client.{key}: cannot read {path} ({error})") from None


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
      f"reviewer.client.model: no price is known for {config.model!r}; set"
      " reviewer.client.prompt_price and output_price (dollars per million tokens), or"
      " reviewer.client.max_dollars to 0 if it costs nothing"
    )
  return Price(*(TIERS[config.tier] * dollars for dollars in known))
