"""Dollars per million tokens, with the day from which they hold; output includes thought.

Standard tier, as read from the provider's page on 2026-10-07
(ai.google.dev/gemini-api/docs/pricing).
"""

import datetime
from typing import Any, NamedTuple

from dca_jax.review.transports import Reply
from dca_jax.review.types import Usage


class Price(NamedTuple):
  prompt: float
  cached: float
  output: float


_BEGINNING = datetime.date(2000, 1, 1)
PRICES: dict[str, list[tuple[datetime.date, Price]]] = {
  "gemini-3.8-flash": [
    (_BEGINNING, Price(0.75, 0.075, 3.75)),
    (datetime.date(2027, 1, 1), Price(1.50, 0.15, 7.50)),
  ],
  "gemini-3.5-flash": [(_BEGINNING, Price(1.50, 0.15, 9.00))],
  "gemini-3.5-flash-lite": [(_BEGINNING, Price(0.30, 0.03, 2.50))],
  "gemini-3.1-flash-lite": [(_BEGINNING, Price(0.25, 0.025, 1.50))],
  "gemini-2.5-flash-lite": [(_BEGINNING, Price(0.10, 0.01, 0.40))],
  "gemini-3.1-pro-preview": [(_BEGINNING, Price(2.00, 0.20, 12.00))],
}


THOUGHT = {"minimal": 30, "low": 700, "medium": 1500, "high": 2000}
"""Tokens that a review takes at a level of thought: suppositions, of which the provider says
nothing."""


def thinks_at(model: str) -> str:
  """The level at which a model thinks when nothing is said; empty where that is not known."""
  if model not in PRICES:
    return ""
  return "minimal" if "lite" in model else "high" if "pro" in model else "medium"


def price(model: str, day: datetime.date) -> Price | None:
  """The price of a model on a day; None where it is not known."""
  rows = [row for since, row in PRICES.get(model, []) if since <= day]
  return rows[-1] if rows else None


def dollars(price: Price, prompt_tokens: int, cached_tokens: int, output_tokens: int) -> float:
  """What a call costs; cached tokens are among the prompt's, thought tokens among the output's."""
  fresh = prompt_tokens - cached_tokens
  return (fresh * price.prompt + cached_tokens * price.cached + output_tokens * price.output) / 1e6


def usage(price: Price | None, stated: Reply | None, most: tuple[int, int], billed: bool) -> Usage:
  """What a call took: as the server states it where that can be true, else the most that it can be.

  Args:
    stated: the reply, or what was stated of a failed one; None where nothing was.
    most: tokens of the prompt and of the output that the call cannot exceed.
    billed: whether a call of which nothing is stated may cost money all the same.
  """
  unknown = dollars(price, most[0], 0, most[1]) if price else 0.0
  if stated is None:
    return Usage(calls=1, dollars=unknown if billed else 0.0)
  prompt, output = _tokens(stated.prompt_tokens), _tokens(stated.output_tokens)
  if output is None and stated.text is None:
    output = 0  # Of a prompt that was filtered; counts of zero are left out.
  if not prompt or output is None or (stated.text and not output):
    return Usage(calls=1, dollars=unknown)
  prompt, output = min(prompt, most[0]), min(output, most[1])
  cached, thought = _tokens(stated.cached_tokens) or 0, _tokens(stated.thought_tokens) or 0
  cached, thought = cached * (cached <= prompt), thought * (thought <= output)
  cost = dollars(price, prompt, cached, output) if price else 0.0
  return Usage(1, prompt, cached, output, thought, cost)


def _tokens(stated: Any) -> int | None:
  """A count that a server states; None where it is none."""
  number = isinstance(stated, (int, float)) and not isinstance(stated, bool)
  return int(stated) if number and stated >= 0 and stated % 1 == 0 else None
