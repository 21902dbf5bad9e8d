"""Tokenizers of language models: what they are refused for, and the exact bytes of their tokens."""

import itertools
import json
import pathlib
import re

import pytest
import words
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dca_jax.errors import UserError
from dca_jax.rollout import cut, step_texts
from dca_jax.rollout.steps import StopFinder
from dca_jax.tasks.tokenizer import end_ids, id_count, load_tokenizer, text_of, token_bytes, unspelt

KINDS = [words.byte_level, words.sentencepiece_like]
STEP_ENDS = ["\n", r"\n\n", r"[.!?]\s+", "🙂", "東|é", r"(?=a)", r"\s*", "[。！？]+"]
# Random text, with much of what is hard: bytes of several tokens, spaces, line ends, steps.
HARD = [*"ab1.\n ", "  ", "\n\n", "東京", "é", "🙂", "👩\u200d🚀", "。", "Tom has "]
TEXTS = st.lists(st.sampled_from(HARD) | st.text(max_size=4)).map("".join)
STOPS = st.lists(
  st.sampled_from(["\n\n", "東", "🙂", "京é", " ", "Tom", "s "]), min_size=1, max_size=2
)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def tokenizer(request, tmp_path_factory):
  return load_tokenizer(words.save_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param))


def encode(tokenizer, text: str) -> list[int]:
  return tokenizer(text, add_special_tokens=False)["input_ids"]


# Characters that there are not.


def silent_words(**special):
  """A tokenizer of words that takes what it does not know for `<u>`."""
  model = Tokenizer(models.WordLevel({"<u>": 0, "<e>": 1, "known": 2}, unk_token="<u>"))
  model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return PreTrainedTokenizerFast(tokenizer_object=model, **special)


@pytest.mark.parametrize(
  ("special", "said"),
  [
    (
      {"eos_token": "<u>"},
      "'strange' is not in the alphabet, and would be read as '<u>', which ends",
    ),
    ({"eos_token": "<e>", "pad_token": "<u>"}, "'strange' is not in the alphabet.*which pads"),
    ({"eos_token": "<e>", "unk_token": "<u>"}, "^$"),
  ],
)
def test_what_would_be_read_as_an_end_is_named(special, said):
  tokenizer = silent_words(**special)
  text = "known strange known"
  assert re.search(said, unspelt(tokenizer, text, encode(tokenizer, text)))
  for spelt in ("known known", "known <u> known"):  # The last one means it.
    assert not unspelt(tokenizer, spelt, encode(tokenizer, spelt))


@given(text=TEXTS)
@settings(max_examples=50, deadline=None)
def test_a_tokenizer_of_bytes_spells_everything(tokenizer, text):
  for whole in (text, f"{text} {tokenizer.eos_token}", f"{text} {tokenizer.unk_token or ''}"):
    assert not unspelt(tokenizer, whole, encode(tokenizer, whole))


# Bytes.


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_text_comes_back_exactly(tokenizer, text):
  text = "".join(c for c in text if not 0xD800 <= ord(c) < 0xE000).replace("▁", "")
  assert text_of(tokenizer, encode(tokenizer, text)) == text


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_tokens_have_the_text_that_the_tokenizer_decodes(tokenizer, data):
  """A policy also writes what no text is encoded as."""
  ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
  ours = text_of(tokenizer, ids)
  if "\ufffd" not in ours:  # How often that stands for bytes that are no text is for each to say.
    assert ours == tokenizer.decode(
      ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


@settings(max_examples=200, deadline=None)
@given(
  text=TEXTS,
  extra=st.lists(st.integers(0, 300), max_size=6),
  step_end=st.sampled_from(STEP_ENDS),
  data=st.data(),
)
def test_steps_partition_tokens_and_text(tokenizer, text, extra, step_end, data):
  text = "".join(c for c in text if not 0xD800 <= ord(c) < 0xE000)
  ids = encode(tokenizer, text)
  place = data.draw(st.integers(0, len(ids)))
  ids[place:place] = extra  # Bytes that may be no text.
  ids.append(tokenizer.eos_token_id)
  least, most = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 4))
  pieces = token_bytes(tokenizer, ids)
  spans = cut(pieces, step_end, least, most)
  assert [i for start, end in spans for i in range(start, end)] == list(range(len(ids)))
  assert all(start < end for start, end in spans)
  assert not most or len(spans) <= most
  texts = step_texts(pieces, spans)
  assert "".join(texts) == text_of(tokenizer, ids)
  assert len(spans) == 1 or all(b"".join(pieces[a:b]).strip() or not least for a, b in spans)


@settings(max_examples=150, deadline=None)
@given(
  text=TEXTS,
  stop=st.lists(
    st.sampled_from(["\n\n", "東", "🙂", "京é", " ", "Tom", "s "]), min_size=1, max_size=2
  ),
  data=st.data(),
)
def test_a_stop_string_ends_with_the_token_that_completes_it(tokenizer, text, stop, data):
  text = "".join(c for c in text if not 0xD800 <= ord(c) < 0xE000).replace("▁", "")
  pieces = token_bytes(tokenizer, encode(tokenizer, text))
  finder, length = StopFinder(stop), None
  cuts = sorted(data.draw(st.lists(st.integers(0, len(pieces)), max_size=4)))
  for start, end in itertools.pairwise([0, *cuts, len(pieces)]):
    length = length or finder.feed(pieces[start:end])
  if not any(string in text for string in stop):
    assert length is None
  else:
    assert any(s.encode() in b"".join(pieces[:length]) for s in stop)
    assert not any(s.encode() in b"".join(pieces[: length - 1]) for s in stop)


def test_a_character_that_is_cut_belongs_to_the_step_with_its_last_byte():
  pieces = [b"a", b"\n\xe4", b"\xb8", b"\xad b", b"\xe4"]
  spans = cut(pieces, "\n")
  assert spans == [(0, 2), (2, 5)]
  assert step_texts(pieces, spans) == ("a\n", "中 b\ufffd")
  assert cut(pieces, "中") == [(0, 4), (4, 5)]


def test_the_first_of_several_stop_strings_counts():
  assert StopFinder(["c", "b", "zz"]).feed([b"a", b"xb", b"c", b"b"]) == 2


def test_a_stop_string_may_begin_in_what_was_written_before():
  assert StopFinder(["zz"], b"xz").feed([b"a", b"z"]) is None
  assert StopFinder(["zz"], b"xz").feed([b"z", b"a"]) == 1


def test_special_tokens_and_unknown_ids_are_silent(tokenizer):
  ids = encode(tokenizer, "7.")
  assert text_of(tokenizer, [*ids, tokenizer.eos_token_id, 10**6]) == "7."


def test_a_tag_that_is_no_special_token_is_read(tmp_path):
  tokenizer = load_tokenizer(words.save_tokenizer(tmp_path))
  ids = encode(tokenizer, "<think>7</think>8")
  assert len(ids) == 4
  assert text_of(tokenizer, ids) == "<think>7</think>8"


def test_an_added_token_is_read_as_it_is_written(tmp_path):
  tokenizer = load_tokenizer(words.save_tokenizer(tmp_path))
  tokenizer.add_tokens(["<né>"])
  ids = encode(tokenizer, "é<né>")
  assert text_of(tokenizer, ids) == "é<né>"
  assert token_bytes(tokenizer, ids)[-1] == "<né>".encode()


# Loading.


def test_every_end_token_ends_a_completion(tmp_path):
  tokenizer = load_tokenizer(words.save_tokenizer(tmp_path, ends=[2, 1]))
  assert end_ids(tokenizer) == (1, 2)
  assert tokenizer.convert_ids_to_tokens([1, 2]) == ["<|end|>", "<|endoftext|>"]
  assert text_of(tokenizer, [1, 2]) == ""


def test_one_end_token_of_the_generation_config_is_enough(tmp_path):
  assert end_ids(load_tokenizer(words.save_tokenizer(tmp_path, eos=None, ends=2))) == (2,)


def test_no_end_token_is_refused(tmp_path):
  with pytest.raises(UserError, match="no end token"):
    load_tokenizer(words.save_tokenizer(tmp_path, eos=None))


def test_no_tokenizer_is_refused(tmp_path):
  (tmp_path / "tokenizer.json").write_text("{")
  for folder in (tmp_path, tmp_path / "none"):
    with pytest.raises(UserError, match=r"task\.tokenizer: cannot load"):
      load_tokenizer(str(folder))


def test_a_tokenizer_that_transformers_changes_is_refused(tmp_path):
  """As it does where the tokenizer_config.json has a token that the tokenizer.json has not."""
  folder = pathlib.Path(words.save_tokenizer(tmp_path))
  path = folder / "tokenizer_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"extra_special_tokens": ["end"]}))
  with pytest.raises(UserError, match=r"does not read text as its tokenizer\.json"):
    load_tokenizer(str(folder))


def test_a_vocabulary_of_words_is_refused(tmp_path):
  from tokenizers import Tokenizer, decoders, models

  tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
  tokenizer.decoder = decoders.WordPiece()
  PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[UNK]").save_pretrained(tmp_path)
  with pytest.raises(UserError, match="neither byte-level nor like SentencePiece"):
    load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("ends", [10**6, [1, 500], -1, "2", [True], 1.5])
def test_an_end_that_is_no_token_is_refused(tmp_path, ends):
  with pytest.raises(
    UserError, match=r"generation_config\.json: the end token .* is none of the tokenizer's \d+ ids"
  ):
    load_tokenizer(words.save_tokenizer(tmp_path, ends=ends))


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_a_generation_config_that_is_none_is_refused(tmp_path, text):
  folder = words.save_tokenizer(tmp_path)
  (tmp_path / "generation_config.json").write_text(text)
  with pytest.raises(UserError, match=r"generation_config\.json is unreadable"):
    load_tokenizer(folder)


def test_ids_are_counted_to_the_highest(tmp_path):
  """There may be ids between that are no token,
  so an end token can lie beyond the number of tokens."""
  folder = pathlib.Path(words.save_tokenizer(tmp_path, ends=[1, 900]))
  path = folder / "tokenizer.json"
  made = json.loads(path.read_text())
  made["model"]["vocab"]["<far>"] = 900
  path.write_text(json.dumps(made))
  tokenizer = load_tokenizer(str(folder))
  assert id_count(tokenizer) == 901 > len(tokenizer)
  assert end_ids(tokenizer) == (1, 900)
