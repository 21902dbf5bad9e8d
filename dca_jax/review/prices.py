"""Dollars per million tokens, with the day from which they hold; output includes thought.

Standard tier, as read from the provider's page on 2026-10-07 (ai.google.dev/gemini-api/docs/pricing).
"""

import datetime
from typing import NamedTuple


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


def price(model: str, day: datetime.date) -> Price | None:
  """The price of a model on a day; None where it is not known."""
  rows = [row for since, row in PRICES.get(model, []) if since <= day]
  return rows[-1] if rows else None


def dollars(price: Price, prompt_tokens: int, cached_tokens: int, output_tokens: int) -> float:
  """What a call costs; cached tokens are among the prompt's, thought tokens among the output's."""
  fresh = prompt_tokens - cached_tokens
  return (fresh * price.prompt + cached_tokens * price.cached + output_tokens * price.output) / 1e6
