#!/usr/bin/env bash
# Copies the results of the run to a local folder: metrics, trajectories, report; what is there already is not copied.
# Usage: fetch.sh --to=FOLDER [--checkpoints] [--dry-run]
#   --checkpoints  the parameters too; they are large
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"
begin "--to= --checkpoints" "$@"
need PROJECT WORKDIR
to=$(value --to)
[[ -n $to ]] || die "--to=FOLDER is missing"
run mkdir -p "$to"
if [[ $WORKDIR == gs://* ]]; then
  skip=()
  has --checkpoints || skip=(--exclude='^(checkpoints|start)/.*')
  run gcloud storage rsync "$WORKDIR" "$to" --recursive --project="$PROJECT" ${skip[@]+"${skip[@]}"}
elif [[ $PROVISIONING == compute-engine* ]]; then
  run gcloud compute scp --recurse "$(vms 0):$WORKDIR" "$to" "${place[@]}"
else
  run gcloud compute tpus tpu-vm scp --recurse "$NAME:$WORKDIR" "$to" "${place[@]}" --worker=0
fi
note "the results are in $to"
