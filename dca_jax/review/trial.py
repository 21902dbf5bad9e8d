"""One real question before anything costs device time: is the reviewer there, and does it work?"""

from dca_jax.review.types import Request

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
