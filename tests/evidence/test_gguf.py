"""The script that makes a Hugging Face folder of a GGUF file, on a tiny one."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from dca_jax.policy.families import from_json
from dca_jax.tasks.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf")
WIDTH, HEADS, KV_HEADS, MLP = 64, 4, 2, 96
TOKENS = ["<|end|>", "!", "1", "2", "a", "b", "Ġ", "ab", "Ġab"]
SHAPES = {
  "attn_q": (WIDTH, WIDTH),
  "attn_k": (WIDTH * KV_HEADS // HEADS, WIDTH),
  "attn_v": (WIDTH * KV_HEADS // HEADS, WIDTH),
  "attn_output": (WIDTH, WIDTH),
  "ffn_gate": (MLP, WIDTH),
  "ffn_up": (MLP, WIDTH),
  "ffn_down": (WIDTH, MLP),
  "attn_norm": (WIDTH,),
  "ffn_norm": (WIDTH,),
}


def rotating_pairs_together(matrix: np.ndarray, heads: int) -> np.ndarray:
  """A matrix of queries or keys as llama.cpp's converter stores it."""
  return matrix.reshape(heads, 2, -1, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
  """A GGUF file, and the tensors that it holds, by their names there."""
  path, rng = tmp_path_factory.mktemp("gguf") / "tiny.gguf", np.random.default_rng(0)
  shapes = {f"blk.0.{name}.weight": shape for name, shape in SHAPES.items()}
  shapes |= {"token_embd.weight": (len(TOKENS), WIDTH), "output_norm.weight": (WIDTH,)}
  tensors = {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
  file = gguf.GGUFWriter(path, "llama")
  file.add_embedding_length(WIDTH)
  file.add_feed_forward_length(MLP)
  file.add_block_count(1)
  file.add_context_length(128)
  file.add_head_count(HEADS)
  file.add_head_count_kv(KV_HEADS)
  file.add_layer_norm_rms_eps(1e-5)
  file.add_rope_freq_base(1e5)
  file.add_vocab_size(len(TOKENS))
  file.add_tokenizer_model("gpt2")
  file.add_tokenizer_pre("smollm")
  file.add_token_list(TOKENS)
  file.add_token_types([3] + [1] * (len(TOKENS) - 1))
  file.add_token_merges(["a b", "Ġ ab"])
  file.add_eos_token_id(0)
  file.add_chat_template("{{ messages[0]['content'] }}<|end|>")
  for name, values in tensors.items():
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
    stored = rotating_pairs_together(values, heads) if heads else values
    if name.endswith("ffn_up.weight"):
      eight = gguf.GGMLQuantizationType.Q8_0
      file.add_tensor(name, gguf.quants.quantize(stored, eight), raw_dtype=eight)
    else:
      file.add_tensor(name, stored)
  file.write_header_to_file()
  file.write_kv_data_to_file()
  file.write_tensors_to_file()
  file.close()
  return path, tensors


def test_weights_config_and_tokenizer_are_those_of_the_file(given, tmp_path):
  from evidence import gguf_to_folder

  path, tensors = given
  folder: pathlib.Path = tmp_path / "folder"
  gguf_to_folder.main(str(path), str(folder))
  found = load_file(folder / "model.safetensors")
  names = {
    f"blk.0.{a}.weight": f"model.layers.0.{b}.weight" for a, b in gguf_to_folder.NAMES.items()
  }
  names |= {name: gguf_to_folder.OUTSIDE[name] for name in tensors if name not in names}
  assert found.keys() == set(names.values())
  for theirs, name in names.items():
    rounded = 0.02 if "ffn_up" in theirs else 0  # Eight bits for 32 numbers of a common scale.
    np.testing.assert_allclose(found[name], tensors[theirs], atol=rounded, rtol=0, err_msg=name)
  config = from_json(json.loads((folder / "config.json").read_text()), "config.json", "float32")
  assert (config.width, config.mlp, config.heads, config.kv_heads) == (WIDTH, MLP, HEADS, KV_HEADS)
  assert (config.tied, config.norm_eps, config.rope_theta) == (True, 1e-5, 1e5)
  tokenizer = load_tokenizer(str(folder))
  assert tokenizer("ab ab12")["input_ids"] == [7, 8, 2, 3]
  assert tokenizer.eos_token == "<|end|>"
  said = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
  assert tokenizer(said)["input_ids"] == [7, 0]
