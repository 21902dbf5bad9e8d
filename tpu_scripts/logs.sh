#!/usr/bin/env bash
# Follows the log of a worker, from its last 50 lines.
# Usage: logs.sh [--worker=N|all] [--dry-run]      Worker 0 unless told. Ctrl-C ends it; the run goes on.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"
begin "--worker=" "$@"
need PROJECT ZONE NAME
worker=$(value --worker)
worker=${worker:-0}
[[ $worker =~ ^([0-9]+|all)$ ]] || die "--worker=$worker: must be a number or all"
follow='tail -n 50 -F ~/dca-jax-run/log'
# shellcheck disable=SC2016 # The worker is to expand it.
[[ $worker != all ]] || follow+=' | sed -u "s/^/$(hostname): /"'
on_workers "$worker" "$follow"
