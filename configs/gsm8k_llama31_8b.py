"""Llama 3.1 8B on GSM8K, all parameters, for a pod of 16 chips of TPU v6e or v5p (v6e-16, v5p-32).

Parameters, gradients and moments are float32 and spread over all chips; products are bfloat16.

**Not yet run on that hardware**, so no accuracy can be quoted. The plan below says at most 16.0 GiB
on each chip, of the 32 GB of a v6e; compiled for a v6e-16, before chunks of logits were larger, the
update took 13.5, and sampling 10.1 beside 5.6 that stay. Arithmetic and memory alone take 4.8 s a
step, so expect 200 steps to take 15 to 60 minutes, or longer where the reviewer is slower than
that:

    python evidence/benchmarks/tpu.py --config=configs/gsm8k_llama31_8b.py --topology=v6e:4x4

If half of the 512 completions of a step get a review (`weighted` credit needs none where a group
fares alike), of 1,200 prompt and 400 output tokens, 200 steps cost about $70 at the table price of
the reviewer; `reviewer.client.max_dollars` caps it.

    dca-jax plan --config=configs/gsm8k_llama31_8b.py --devices=16
    dca-jax train --config=configs/gsm8k_llama31_8b.py --workdir=gs://BUCKET/gsm8k_llama31_8b --distributed

It needs the model from the hub (whose terms you must accept), GSM8K (which TensorFlow Datasets
downloads), and GEMINI_API_KEY.
"""

from ml_collections import ConfigDict


def get_config():
  c = ConfigDict()
  c.steps = 200
  c.policy = dict(pretrained="meta-llama/Llama-3.1-8B-Instruct", dtype="bfloat16", remat="layers")
  c.task = dict(
    name="tfds",
    dataset="gsm8k",
    prompt=(
      "{question} Think step by step, one step a line, and end with a line `#### ` and the answer."
    ),
  )
  c.rollout = dict(problems=64, group=8, max_prompt_tokens=256, max_tokens=768)
  c.reviewer = dict(name="gemini", deadline=90.0, client=dict(max_dollars=100.0))
  c.credit = dict(scheme="weighted")
  c.learner = dict(lr=5e-7, micro_batches=4, max_grad_norm=1.0)
  c.evaluate = dict(problems=256, samples=4, k=4, every=50)
  c.checkpoint = dict(every=10, best="eval/sampled")
  c.mesh = dict(
    data=1, fsdp=16, sampler=(4, 1, 4)
  )  # Four chips of a host share the weights while sampling.
  return c
