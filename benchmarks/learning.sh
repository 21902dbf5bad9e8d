#!/usr/bin/env bash
# The comparison in README.md: each arm's learning rates on one seed, then the best of each on three fresh ones.
# About an hour on two cores. Run again, it continues where it was.
#
#   benchmarks/learning.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-runs/learning}
compare() { dca-jax compare --config=configs/quickstart.py --config.steps=150 "$@"; }

rates() { for rate in "${@:2}"; do printf '%s:learner.lr=%s,' "$1" "$rate"; done; }
compare --workdir="$folder/sweep" --seeds=10 \
  --arms="$(rates uniform 2.5e-4 5e-4 1e-3)$(rates weighted 5e-4 1e-3 2e-3)$(rates noisy 5e-4 1e-3 2e-3)"
compare --workdir="$folder/final" --seeds=0,1,2 --arms=uniform,weighted,noisy
