"""Qwen3 0.6B on GSM8K, all parameters, for a TPU v5e-8; 1.7B with
--config.policy.pretrained=Qwen/Qwen3-1.7B.

Parameters, gradients and moments are float32 and spread over the eight chips;
products are bfloat16.

**Not yet run on that hardware**, so no accuracy can be quoted. The plan below says at most 7.7 GiB
(1.7B: 12.3) on each chip, of its 16 GB; compiled for a v5e, before chunks of logits were larger,
the update took 6.1 (11.8), and sampling 4.7 (8.6). Arithmetic and memory alone take 3.1 s (6.5) a
step, so expect 200 steps to take 10 to 30 minutes (20 to 60), or longer where the reviewer is
slower than that:

    python evidence/benchmarks/tpu.py --config=configs/gsm8k_qwen3.py --topology=v5e:2x4

If half of the 256 completions of a step get a review (`weighted` credit needs none where a group
fares alike), of 1,200 prompt and 400 output tokens, 200 steps cost about $35 at the table price of
the reviewer; `reviewer.client.max_dollars` caps it.

    dca-jax plan --config=configs/gsm8k_qwen3.py --devices=8
    dca-jax train --config=configs/gsm8k_qwen3.py --workdir=gs://BUCKET/gsm8k_qwen3

It needs the model from the hub, GSM8K (which TensorFlow Datasets downloads), and GEMINI_API_KEY.
"""

from ml_collections import ConfigDict


def get_config():
  c = ConfigDict()
  c.steps = 200
  c.policy = dict(pretrained="Qwen/Qwen3-0.6B", dtype="bfloat16")
  c.task = dict(
    name="tfds",
    dataset="gsm8k",
    template_kwargs='{"enable_thinking": false}',
    prompt=(
      "{question} Think step by step, one step a line, and end with a line `#### ` and the answer."
    ),
  )
  c.rollout = dict(problems=32, group=8, max_prompt_tokens=256, max_tokens=768)
  c.reviewer = dict(name="gemini", deadline=90.0, client=dict(max_dollars=50.0))
  c.credit = dict(scheme="weighted")
  c.learner = dict(lr=1e-6, micro_batches=4, max_grad_norm=1.0)
  c.evaluate = dict(problems=256, samples=4, k=4, every=50)
  c.checkpoint = dict(every=10, best="eval/sampled")
  c.mesh = dict(data=1, fsdp=8, sampler=(8, 1, 1))
  return c
