#!/usr/bin/env bash
# Starts the training of settings.sh on all workers; it goes on when this ends, and resumes by itself after a crash.
# Usage: launch.sh [--dry-run]      Where it runs already, nothing is started twice.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"
begin "" "$@"
need PROJECT ZONE NAME CONFIG WORKDIR
more=()
eval "more=($ARGS)" # In shell syntax, so that an argument may hold spaces.
command=(bash dca-jax/tpu_scripts/loop.sh start dca-jax train --config="$CONFIG" --workdir="$WORKDIR" --distributed)
command+=(${more[@]+"${more[@]}"})
on_workers all "$(printf '%q ' "${command[@]}")"
note "next: logs.sh, and watch.sh to survive preemption"
