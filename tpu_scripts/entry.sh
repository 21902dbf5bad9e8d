#!/usr/bin/env bash
# The container's entry point (Dockerfile): trains until the run has finished or DEADLINE has come.
# Usage: entry.sh ARGUMENT...      of `dca-jax train`; DEADLINE: seconds since 1970, set by gke.sh
# Ends with 0 when the run has finished, 1 after the third error in a row, 124 at the deadline: for these Kubernetes
# starts nothing again (gke.sh). After anything else, a lost host above all, it starts all hosts again, and the run
# resumes.
set -euo pipefail
export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu} # Where the TPU cannot be had, this is an error, and no training on the CPU.
child='' stopped=false
trap 'stopped=true; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM INT
code=0
for _ in 1 2 3; do # All hosts end with 1 together, because one's error is the others'.
  left=$((${DEADLINE:?} - $(date +%s)))
  ((left > 0)) || { echo "entry.sh: the deadline has come" >&2 && exit 124; }
  timeout --kill-after=300 "$left" dca-jax train "$@" --distributed & child=$!
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # A signal cuts `wait` short.
  code=0
  wait "$child" || code=$?
  if ((code != 1)) || $stopped; then break; fi
done
exit "$code"
