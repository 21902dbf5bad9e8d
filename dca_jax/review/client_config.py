"""The `reviewer.client` section: how a language model is called."""

import dataclasses
import urllib.parse

from dca_jax.checks import at_least, between, one_of, positive
from dca_jax.review.prompt import LEVELS

TIERS = {"": 1.0, "flex": 0.5, "batch": 0.5}
"""And what they cost, in parts of the price."""


@dataclasses.dataclass(frozen=True)
class ClientConfig:
  """The `reviewer.client` section: how a language model is called."""

  model: str = "gemini-3.5-flash-lite"
  """The model's name, as its server knows it."""
  thinking: str = ""
  """The model's level of thought (`minimal`, `low`, `medium`, `high`);
  empty leaves it to the model."""
  base_url: str = ""
  """The server's address: needed for `openai`, and for `gemini` that of a gateway."""
  vertex: bool = False
  """`gemini`: through Google Cloud, with ambient credentials and GOOGLE_CLOUD_PROJECT,
  instead of a key."""
  tier: str = ""
  """`gemini`, at half the price: `flex`, answers within minutes that may be refused when the server
  is busy, and `batch`, jobs that may take a day: for audits, with `attempt_seconds` and
  `concurrency` to match. A job that nobody waits for any more is paid for all the same."""
  keep_instructions: bool = False
  """`gemini`, without a `tier`: whether rubric and examples, where they are long enough, are kept
  on the server for ten minutes at a time, at a price, and calls pay a tenth for them."""
  rubric: str = ""
  """A text file with your own description of roles and weights, in the place of ours."""
  examples: str = ""
  """A JSONL file of reviewed answers that the model is shown first; each line has `problem`,
  `correct` and `steps`, and each of these `text`, `role` and `weight`."""
  level: str = "verdict"
  """`verdict`: roles and weights at once. `deliberate`: notes on what each step does and uses, and
  then the verdict; the notes are kept as reasons, and a role that they contradict is corrected.
  `critique_then_verdict`: the same in two calls. `values`: the chance of success before every step,
  one question for each, which holds nothing of what follows; implied by a scheme that reads
  values alone."""
  reference: bool = False
  """Whether the right answer is shown, where the task knows it."""
  samples: int = 1
  """How often an answer is reviewed; the roles are voted on."""
  whole_group: bool = False
  """One call for all completions of a problem: cheaper,
  but one answer can try to talk about another."""
  concurrency: int = 48
  """Calls at once; fewer while the server says that it is too much."""
  requests_per_minute: int = 0
  """Most calls of a reviewer in a minute, by all processes together; 0: no limit of our own."""
  tokens_per_minute: int = 0
  """Most prompt tokens of a reviewer in a minute, by all processes together, where three bytes
  count as a token; 0: no limit of our own."""
  attempts: int = 4
  """Most calls for one question, the first included; further ones follow failures that may
  pass."""
  attempt_seconds: float = 20.0
  """Seconds after which a call without an answer is given up; what it may have cost counts as
  spent."""
  max_dollars: float = 10.0
  """Dollars that the whole run may spend, all its reviewers and resumptions together; 0 for servers
  that cost nothing."""
  on_budget: str = "degrade"
  """When the money is gone: `degrade` to uniform credit, or `stop` the run."""
  prompt_price: float = 0.0
  """Dollars per million tokens of prompts, for models that the price table does not know. Where
  this or `output_price` is not 0, both are read in place of the table and of what a tier takes
  off."""
  output_price: float = 0.0
  """Dollars per million tokens of replies, thought included; read as `prompt_price` is."""
  max_output_tokens: int = 0
  """Of one reply, thought included; 0: 2,048 and 40 for each step."""
  min_ok_frac: float = 0.5
  """Below this share of usable reviews, over five steps, there is a warning, and
  with `strict` an end."""
  strict: bool = False
  """Whether the run ends where else there is a warning: too few usable reviews, or no call for five
  steps."""
  repeat_frac: float = 0.0
  """Share of reviews that are asked for a second time,
  to see how far the model agrees with itself."""

  @property
  def at_once(self) -> bool:
    """Whether a single question can be waited for."""
    return self.tier != "batch"

  @property
  def where(self) -> str:
    """The server's name and port, for people; an address may hold a password."""
    google = "aiplatform.googleapis.com" if self.vertex else "generativelanguage.googleapis.com"
    return urllib.parse.urlsplit(self.base_url).netloc.rpartition("@")[2] or google

  def check(self) -> dict[str, str]:
    amounts = (
      "requests_per_minute",
      "tokens_per_minute",
      "max_dollars",
      "prompt_price",
      "output_price",
    )
    bad = at_least(1, self, "concurrency", "attempts", "samples")
    bad |= at_least(0, self, *amounts, "max_output_tokens") | one_of(self, "level", *LEVELS)
    bad |= between(0, 1, self, "min_ok_frac", "repeat_frac") | one_of(self, "tier", *TIERS)
    bad |= positive(self, "attempt_seconds", most=600 if self.tier != "batch" else 90_000)
    if self.tier == "batch" and self.vertex:
      bad["tier"] = "must be '' or 'flex' with vertex, whose jobs take no questions inline"
    if self.base_url and not _is_address(self.base_url):
      bad["base_url"] = (
        "must begin with http:// or https:// and name a server, such as http://localhost:8000/v1"
      )
    bad |= one_of(self, "thinking", "minimal", "low", "medium", "high", "")
    return bad | one_of(self, "on_budget", "degrade", "stop")

  def unused(self) -> dict[str, str]:
    keys = ("on_budget", "prompt_price", "output_price") if not self.max_dollars else ()
    unused = dict.fromkeys(keys, "reviewer.client.max_dollars is 0")
    alone = ("whole_group", "examples") if self.level == "values" else ()
    unused |= {"keep_instructions": f"reviewer.client.tier is '{self.tier}'"} if self.tier else {}
    return unused | dict.fromkeys(alone, "reviewer.client.level is 'values'")


def _is_address(url: str) -> bool:
  try:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
  except ValueError:  # A port that is no number, a bracket that does not close.
    return False
