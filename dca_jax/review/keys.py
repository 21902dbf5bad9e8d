"""Keys: read from the environment, and struck out of every text that is shown."""

import base64
import functools
import json
import os
import re
import string
import urllib.parse
from collections.abc import Iterable

from dca_jax.errors import UserError

_NAMES_A_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
_SHORTEST = 6
"""What is shorter is a switch, such as `1` or `false`, and no secret."""
_WINDOW = 10
"""So many characters of a secret in a row give it away."""
_MOST_CHARACTERS = 4000
_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


def key_from_environment(*names: str) -> str | None:
  """The first of these variables that is set, without the quotes and white space around it.

  Raises:
    UserError: it holds what no key holds and no header can carry.
  """
  for name in names:
    key = _trimmed(os.environ.get(name, ""))
    if key and not re.fullmatch("[!-~]+", key):
      raise UserError(
        f"{name} in the environment: there is white space or a character inside that no key has;"
        " set it again, the key alone on one line"
      )
    if key:
      return key
  return None


def struck_out(text: str, sent: Iterable[str] = ()) -> str:
  """A server's text, fit to be shown: without secrets and without control characters.

  Secrets are what was `sent` and whatever the environment holds under a telling name, as they are,
  percent-encoded, as JSON and in base64; a part of one counts as well.
  """
  text = re.sub(r"(?<=//)[^/\s@]{1,200}@", "***@", text[:_MOST_CHARACTERS])
  values = {_trimmed(v) for name, v in os.environ.items() if _NAMES_A_SECRET.search(name)}
  values |= {_trimmed(v) for v in sent}
  lower, secret = text.translate(_LOWER), [False] * len(text)
  for width, windows in _windows(frozenset(values)).items():
    for i in range(len(lower) - width + 1):
      if lower[i : i + width] in windows:
        secret[i : i + width] = [True] * width
  shown = []
  for i, character in enumerate(text):
    if not secret[i]:
      shown.append(character if character.isprintable() else " ")
    elif not i or not secret[i - 1]:
      shown.append("***")
  return "".join(shown)


def _trimmed(value: str) -> str:
  return value.strip(string.whitespace + "\"'\ufeff")


@functools.lru_cache(maxsize=4)
def _windows(secrets: frozenset[str]) -> dict[int, set[str]]:
  """What gives one of these secrets away, by its length."""
  windows: dict[int, set[str]] = {}
  for secret in secrets:
    if len(secret) < _SHORTEST:
      continue
    encoded = secret.encode("utf-8", "surrogateescape")
    forms = [secret, json.dumps(secret)[1:-1], urllib.parse.quote(encoded, safe="")]
    for before in range(3):  # Where it stands in what was encoded shifts the letters.
      for encode in (base64.b64encode, base64.urlsafe_b64encode):
        forms.append(encode(b"\0" * before + encoded).decode().rstrip("=")[before + (before > 0) :])
    for form in forms:
      form = form.translate(_LOWER)
      width = min(_WINDOW, len(form))
      found = windows.setdefault(width, set())
      found.update(form[i : i + width] for i in range(len(form) - width + 1))
  return windows
