"""Tokenizers and data sets for free-text tasks, made with the real libraries and no network."""

import functools
import json
import pathlib

import flax.linen as nn
import jax
from etils import epath
from tokenizers import (
  AddedToken,
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)
from transformers import PreTrainedTokenizerFast

from dca_jax.policy import Policy, pretrained
from dca_jax.policy.families import from_json

PROBLEMS = [
  {
    "question": f"Tom has {a} apples and buys {b}. How many has he?",
    "answer": f"{a} + {b} = {a + b}.\n#### {a + b}",
  }
  for a in range(1, 7)
  for b in range(1, 5)
]
CORPUS = [
  *(" ".join(p.values()) for p in PROBLEMS),
  "Let us think.\n\n1. First, 3 + 4 = 7.\n2. Then 7 * 6 = 42.\n\n"
  "The answer is 42. naïve café 東京。 Привет 🙂🙃",
] * 3
TEMPLATE = (
  "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|start|>assistant\n"
  "{% if not enable_thinking | default(true) %}<think></think>"
  "{% endif %}{% endif %}"
)

SIZES = {
  "vocab_size": 448,
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 8,
  "intermediate_size": 48,
  "rms_norm_eps": 1e-6,
}  # Of a model small enough for here, as a config.json has them.
FAMILIES = {
  "gemma3": {
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "sliding_window": 16,
    "sliding_window_pattern": 2,
  },
  "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, "rope_theta": 1e6},
  "llama31": {
    "model_type": "llama",
    "rope_theta": 5e5,
    "rope_scaling": {
      "rope_type": "llama3",
      "factor": 8.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 16,
    },
  },
}
SMALL_RUN = {
  "rollout.problems": 4,
  "rollout.group": 4,
  "rollout.max_prompt_tokens": 128,
  "rollout.max_tokens": 12,
  "evaluate.problems": 4,
  "evaluate.every": 1,
  "checkpoint.every": 1,
  "policy.dtype": "float32",  # On a CPU, bfloat16 takes minutes to compile.
  "learner.micro_batches": 2,
}  # What makes a recipe's run of such a model small.


@functools.cache
def byte_level() -> str:
  """Like GPT-2's, Llama 3's and Qwen's, as the JSON of a tokenizer.json."""
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=400,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=["<|start|>", "<|end|>", "<|endoftext|>"],
    show_progress=False,
  )
  tokenizer.train_from_iterator(CORPUS, trainer)
  tokenizer.add_tokens(
    [AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)]
  )
  return tokenizer.to_str()


@functools.cache
def sentencepiece_like() -> str:
  """Like Gemma's: `▁` for a space, and bytes for characters that the vocabulary lacks."""
  trained = Tokenizer(models.BPE())
  trained.normalizer = normalizers.Replace(" ", "▁")
  trainer = trainers.BpeTrainer(vocab_size=220, limit_alphabet=60, show_progress=False)
  trained.train_from_iterator(CORPUS, trainer)
  model = json.loads(trained.to_str())["model"]
  known = [
    "<unk>",
    "<bos>",
    "<eos>",
    "<|end|>",
    *(f"<0x{b:02X}>" for b in range(256)),
    *model["vocab"],
  ]
  tokenizer = Tokenizer(
    models.BPE(
      {token: i for i, token in enumerate(known)},
      [tuple(merge) for merge in model["merges"]],
      byte_fallback=True,
      fuse_unk=True,
      unk_token="<unk>",
    )
  )
  tokenizer.normalizer = normalizers.Replace(" ", "▁")
  tokenizer.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  )
  tokenizer.add_special_tokens(["<unk>", "<bos>", "<eos>", "<|end|>"])
  tokenizer.add_tokens([AddedToken("▁▁", normalized=False)])
  return tokenizer.to_str()


def save_tokenizer(
  folder, kind=byte_level, eos: str | None = "<|end|>", template=TEMPLATE, ends=None, starts=False
):
  """Saves a tokenizer as a model's folder has it; returns the folder's name.

  Args:
    ends: end tokens of its generation_config.json.
    starts: whether it puts its `<bos>` before a text.
  """
  names = {"eos_token": eos} if eos else {}
  if kind is sentencepiece_like:
    names |= {"bos_token": "<bos>", "unk_token": "<unk>"}
  made = Tokenizer.from_str(kind())
  if starts:
    made.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
  tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **names)
  tokenizer.chat_template = template
  tokenizer.save_pretrained(folder)
  if ends is not None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
  return str(folder)


def write_jsonl(path: pathlib.Path, rows=PROBLEMS) -> str:
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def build_gsm8k(folder: pathlib.Path) -> str:
  """A data set with the name, version and fields of GSM8K, prepared as TFDS prepares it."""
  import tensorflow_datasets as tfds

  with tfds.core.registered.skip_registration():

    class Gsm8k(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version("1.0.0")

      def _info(self):
        text = tfds.features.Text()
        features = dict.fromkeys(("question", "answer", "annotation", "short_answer"), text)
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

      def _split_generators(self, dl_manager):
        return {
          "train": self._generate_examples(PROBLEMS[:16]),
          "test": self._generate_examples(PROBLEMS[16:]),
        }

      def _generate_examples(self, rows):
        for i, row in enumerate(rows):
          yield i, {**row, "annotation": "", "short_answer": row["answer"].split("#### ")[1]}

  Gsm8k(data_dir=str(folder), file_format="array_record").download_and_prepare()
  return str(folder)


def write_model(folder: pathlib.Path, config: dict) -> pathlib.Path:
  """A random model of the family that a config.json names, with the byte-level tokenizer."""
  tokenizer = folder / "tokenizer"
  save_tokenizer(tokenizer, ends=[2, 1])
  (tokenizer / "config.json").write_text(json.dumps(config))
  described = from_json(config, "config.json", "float32")
  policy = Policy(described, described.vocab_size)
  params = jax.jit(lambda key: nn.unbox(policy.init_params(key)))(jax.random.key(3))
  pretrained.save(params, described, str(tokenizer), epath.Path(tokenizer), folder / "model")
  return folder / "model"
