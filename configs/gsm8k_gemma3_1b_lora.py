"""Gemma 3 1B on GSM8K with LoRA, for one TPU v5e chip or a Colab TPU.

Adapters of rank 16 are trained beside weights that stay in bfloat16.

**Not yet run on that hardware**, so no accuracy can be quoted. The plan below says at most 5.3 GiB,
of the chip's 16 GB; compiled for a v5e the update takes 5.4 and sampling 4.1. Arithmetic and memory
alone take 2.6 s a step, and the compiler expects 5.1, so expect 200 steps to take 15 to 30 minutes,
or longer where the reviewer is slower than that:

    python evidence/benchmarks/tpu.py --config=configs/gsm8k_gemma3_1b_lora.py --topology=v5e:2x2 --devices=1

If half of the 64 completions of a step get a review (`weighted` credit needs none where a group
fares alike), of 1,200 prompt and 400 output tokens, 200 steps cost about $9 at the table price of
the reviewer; `reviewer.client.max_dollars` caps it.

    dca-jax plan --config=configs/gsm8k_gemma3_1b_lora.py --devices=1
    dca-jax train --config=configs/gsm8k_gemma3_1b_lora.py --workdir=gs://BUCKET/gsm8k_gemma3_1b_lora

It needs the model from the hub (whose terms you must accept), GSM8K (which TensorFlow Datasets
downloads), and GEMINI_API_KEY.
"""

from ml_collections import ConfigDict


def get_config():
  c = ConfigDict()
  c.steps = 200
  c.policy = dict(
    pretrained="google/gemma-3-1b-it", dtype="bfloat16", lora_rank=16, lora_alpha=32.0
  )
  c.task = dict(
    name="tfds",
    dataset="gsm8k",
    prompt=(
      "{question} Think step by step, one step a line, and end with a line `#### ` and the answer."
    ),
  )
  c.rollout = dict(problems=16, group=4, max_prompt_tokens=256, max_tokens=512)
  c.reviewer = dict(name="gemini", deadline=90.0, client=dict(max_dollars=20.0))
  c.credit = dict(scheme="weighted")
  c.learner = dict(lr=5e-5, micro_batches=4, max_grad_norm=1.0)
  c.evaluate = dict(problems=256, samples=4, k=4, every=50)
  c.checkpoint = dict(every=10, best="eval/sampled")
  c.mesh = dict(data=1)
  return c
