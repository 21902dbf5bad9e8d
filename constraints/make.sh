#!/usr/bin/env bash
# Writes constraints/*.txt: for each place that docs/tpu.md installs in, what the tests were run with, and the newest
# versions of what is not installed here, such as libtpu.
# Usage: [PYTHON=python] constraints/make.sh      Needs uv; PYTHON is the one that runs the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
tested=$(mktemp)
trap 'rm -f "$tested"' EXIT
"${PYTHON:-python}" -m pip list --format=freeze --exclude-editable | grep -E '^[A-Za-z0-9_.-]+==[0-9][^+]*$' >"$tested"

# pin NAME OPTIONS: of Python 3.12 on Linux, as in TPU VMs and the container.
pin() {
  uv pip compile setup.py "${@:2}" --quiet --constraint "$tested" --python-version 3.12 \
    --python-platform x86_64-manylinux_2_31 --no-annotate --custom-compile-command constraints/make.sh \
    --output-file "constraints/$1.txt"
}
pin tpu --extra tpu --extra gcs
pin cuda --extra cuda --extra gcs
