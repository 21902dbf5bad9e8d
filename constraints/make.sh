#!/usr/bin/env bash
# Writes constraints/tpu.txt: what the tests were run with, and the newest versions of what is not installed here, such as
# libtpu.
# Usage: [PYTHON=python] constraints/make.sh      Needs uv; PYTHON is the one that runs the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
tested=$(mktemp)
trap 'rm -f "$tested"' EXIT
"${PYTHON:-python}" -m pip list --format=freeze --exclude-editable | grep -E '^[A-Za-z0-9_.-]+==[0-9][^+]*$' >"$tested"

# Of Python 3.12 on Linux, as in TPU VMs and the container.
uv pip compile setup.py --extra tpu --extra gcs --quiet --constraint "$tested" --python-version 3.12 \
  --python-platform x86_64-manylinux_2_31 --no-annotate --custom-compile-command constraints/make.sh \
  --output-file constraints/tpu.txt
