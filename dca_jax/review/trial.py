"""One real question before anything costs device time: is the reviewer there, and does it work?"""

import operator

from dca_jax.review.types import Request, Review

PLANTED = Request(
  "trial",
  "A box holds 3 red balls. Add 4 blue ones, then double what is in the box. How many balls are"
  " there?",
  (
    "There are 3 + 4 = 7 balls before doubling.\n",
    "Doubled, that is 7 * 2 = 15.\n",
    "The answer is 15.\n",
  ),
  correct=False,
  truncated=False,
)
"""An answer whose roles nobody doubts."""
PLANTED_ROLES = ("necessary", "error", "inherits")

PASSING = ("rate_limited", "server_error", "timeout", "circuit_open", "unbooked")
"""Failures that may be over in a minute."""
CHANCE = ("connection", "malformed", "truncated", "blocked")
"""Failures that may not be there the next time: a dropped connection, a reply that is no review."""
TRIES = 5
"""After so many of them it is no chance."""


def found(review: Review) -> str:
  """What a review says of the planted answer, for people."""
  if review.values:
    chances = ", ".join(f"{value:.2f}" for value in review.values)
    return f"chances before its steps, of which the second is wrong: {chances}"
  known = sum(map(operator.eq, review.roles, PLANTED_ROLES))
  return f"{known} of {len(PLANTED_ROLES)} roles as expected"
