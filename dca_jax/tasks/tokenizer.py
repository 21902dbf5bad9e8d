"""Tokenizers of language models: loaded as their files say, their end tokens,
and the exact bytes of every token."""

import functools
import json
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from dca_jax.errors import UserError, reason

_PROBE = "Is 12,345.67 = 3/4?\n\n  x² + 10%\tit's   naïve: 东京 🙂\n1. end"
_EXACT = {
  "ByteLevel",
  "ByteFallback",
  "Metaspace",
}  # Decoders for which each token has bytes of its own.


def load_tokenizer(name: str):
  """The `transformers` fast tokenizer in a folder or under a hub id; UserError
  where it cannot be trusted."""
  from tokenizers import Tokenizer
  from transformers import PreTrainedTokenizerFast
  from transformers.utils import cached_file

  try:
    file = Tokenizer.from_file(str(cached_file(name, "tokenizer.json")))
    # Not AutoTokenizer: some of its classes replace what the file says of pre-tokenization.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(name)
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
  except Exception as error:  # `tokenizers` raises plain Exceptions.
    raise UserError(f"task.tokenizer: cannot load {name!r} ({reason(error)})") from None
  changed = ids != file.encode(_PROBE, add_special_tokens=False).ids
  for wrong, why in (
    (
      changed,
      "does not read text as its tokenizer.json says; use the version of transformers that saved"
      " it",
    ),
    (not end_ids(tokenizer), "has no end token; give it an eos_token in its tokenizer_config.json"),
    (
      not _decoders(tokenizer) & _EXACT,
      "is neither byte-level nor like SentencePiece; take one that is",
    ),
  ):
    if wrong:
      raise UserError(f"task.tokenizer: {name!r} {why}")
  return tokenizer


def character_tokenizer(alphabet: str, end: str):
  """A `transformers` fast tokenizer of one token a character; `end` ends a completion."""
  from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  ids = {c: i for i, c in enumerate(end + alphabet)}
  tokenizer = Tokenizer(models.WordLevel(ids, unk_token=end))
  tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
  tokenizer.decoder = decoders.Fuse()
  return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)


@functools.lru_cache
def id_count(tokenizer) -> int:
  """One more than the highest id of a token; ids between can be no token."""
  return 1 + max(tokenizer.get_vocab().values())


@functools.lru_cache
def end_ids(tokenizer) -> tuple[int, ...]:
  """The tokens that end a completion: the tokenizer's own, and its generation_config.json's.

  Raises:
    UserError: that file cannot be read, or names what is no token.
  """
  from transformers.utils import cached_file

  ids = [tokenizer.eos_token_id]
  name, optional = tokenizer.name_or_path, {"_raise_exceptions_for_missing_entries": False}
  if name and (path := cached_file(name, "generation_config.json", **optional)):
    try:
      listed = dict(json.loads(pathlib.Path(path).read_text("utf-8"))).get("eos_token_id")
    except (OSError, TypeError, ValueError) as error:
      raise UserError(f"{path} is unreadable ({error}); download it again") from None
    ids += listed if isinstance(listed, list) else [listed]
    count = id_count(tokenizer)
    if strange := [i for i in ids if i is not None and (type(i) is not int or not 0 <= i < count)]:
      raise UserError(
        f"{path}: the end token {strange[0]!r} is none of the tokenizer's {count} ids, so it could"
        " never end a completion; correct eos_token_id"
      )
  return tuple(sorted({i for i in ids if i is not None}))


def unspelt(tokenizer, text: str, ids: Sequence[int]) -> str:
  """Why `ids` do not spell their text: a character that the tokenizer lacks has become a token that
  ends or pads a text. Empty where none has."""
  unknown = _mistakable(tokenizer)
  if unknown is None or unknown not in ids:
    return ""
  told = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
  token = tokenizer.convert_ids_to_tokens(unknown)
  for i, (start, end) in zip(told["input_ids"], told["offset_mapping"], strict=True):
    if i == unknown and (lacking := text[start:end]).strip() != token.strip():
      kind = "ends" if unknown in end_ids(tokenizer) else "pads"
      return (
        f"{lacking!r} is not in the alphabet, and would be read as {token!r}, which {kind} a text"
      )
  return ""


@functools.lru_cache
def _mistakable(tokenizer) -> int | None:
  """The token for what the tokenizer does not know, where it ends or pads a text too."""
  # The model's own: a tokenizer of characters says nothing of it elsewhere.
  name = getattr(tokenizer.backend_tokenizer.model, "unk_token", None) or tokenizer.unk_token
  unknown = tokenizer.convert_tokens_to_ids(name) if name else None
  return unknown if unknown in {*end_ids(tokenizer), tokenizer.pad_token_id} else None


def token_bytes(tokenizer, tokens: Sequence[int] | np.ndarray) -> list[bytes]:
  """The bytes of each token: a part of a character in some, none in special tokens
  and in ids without a token."""
  return [_table(tokenizer).get(i, b"") for i in np.asarray(tokens).tolist()]


def text_of(tokenizer, tokens: Sequence[int] | np.ndarray) -> str:
  """The text that the tokens make together."""
  return b"".join(token_bytes(tokenizer, tokens)).decode(errors="replace")


def plain_ids(tokenizer, text: str) -> list[int]:
  """The tokens of a text in which nothing is special, whatever it spells. What a tokenizer cannot
  spell otherwise, as one of single characters its end token, is left out."""
  text = text.encode(errors="replace").decode()  # Half a character is none.
  ids = _plain(tokenizer).encode(text, add_special_tokens=False).ids
  return [i for i in ids if i not in {*tokenizer.all_special_ids, *end_ids(tokenizer)}]


@functools.lru_cache
def _plain(tokenizer):
  """The tokenizer without the tokens that were added to it, special ones among them."""
  from tokenizers import Tokenizer

  file = json.loads(tokenizer.backend_tokenizer.to_str())
  return Tokenizer.from_str(json.dumps(file | {"added_tokens": [], "post_processor": None}))


def _decoders(tokenizer) -> set[str]:
  decoder = tokenizer.backend_tokenizer.decoder
  return set(re.findall(r'"type":"(\w+)"', decoder.__getstate__().decode())) if decoder else set()


@functools.lru_cache
def _table(tokenizer) -> dict[int, bytes]:
  decoders, added = _decoders(tokenizer), tokenizer.added_tokens_decoder
  if not decoders & _EXACT:  # A task's own alphabet, whose end token is read as a letter.
    return {i: tokenizer.decode([i]).encode() for i in tokenizer.get_vocab().values()}
  # GPT-2's alphabet: a byte that is a printable Latin-1 letter is that letter, the others are
  # counted from 256 on.
  shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
  letters = {chr(b): b for b in shown} | {
    chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*shown}))
  }
  silent = {
    *end_ids(tokenizer),
    *tokenizer.all_special_ids,
    *(i for i, token in added.items() if token.special),
  }
  table = {}
  for token, i in tokenizer.get_vocab().items():
    if "ByteLevel" in decoders:
      plain = i in added or not letters.keys() >= set(token)
      table[i] = token.encode() if plain else bytes(letters[c] for c in token)
    elif "ByteFallback" in decoders and (byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)):
      table[i] = bytes.fromhex(byte[1])
    else:
      table[i] = token.replace("▁", " ").encode()
  return table | dict.fromkeys(silent, b"")
