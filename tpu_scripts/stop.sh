#!/usr/bin/env bash
# Stops the training on all workers: the step under way is finished and saved. The TPU stays, and goes on costing.
# Usage: stop.sh [--dry-run]      launch.sh continues it.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"
begin "" "$@"
need PROJECT ZONE NAME
on_workers all "bash dca-jax/tpu_scripts/loop.sh stop"
