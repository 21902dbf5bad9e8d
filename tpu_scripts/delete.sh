#!/usr/bin/env bash
# Deletes the TPU and everything that create.sh made for it; the bucket stays.
# Usage: delete.sh [--yes] [--dry-run]
#   --yes  do not ask
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"
begin "--yes" "$@"
need PROJECT ZONE NAME

if ! $dry_run && ! has --yes; then
  read -rp "Delete $NAME in $ZONE, project $PROJECT? What is not in the workdir is lost. [y/N] " answer || true
  [[ $answer == [yY]* ]] || die "nothing was deleted"
fi
now=READY
$dry_run || now=$(state)
[[ $now != UNKNOWN ]] || die "Google Cloud did not say whether there is a $NAME; the message is above"
if [[ $now == MISSING ]]; then
  echo "there is no $NAME in $ZONE"
else
  case $PROVISIONING in
    compute-engine*) run gcloud compute instance-groups managed delete "$NAME" "${place[@]}" ;;
    queued*) run gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force ;;
    *) run gcloud compute tpus tpu-vm delete "$NAME" "${place[@]}" ;;
  esac
fi
if [[ $PROVISIONING == compute-engine* ]]; then
  if $dry_run || exists instance-templates "$NAME"; then
    run gcloud compute instance-templates delete "$NAME" --project="$PROJECT" --quiet
  fi
  if $dry_run || exists resource-policies "$NAME" --region="$REGION"; then
    run gcloud compute resource-policies delete "$NAME" --region="$REGION" --project="$PROJECT" --quiet
  fi
fi
note "$NAME costs nothing more."
[[ -z $BUCKET ]] || note "$BUCKET still costs. This deletes it, with all runs: gcloud storage rm --recursive $BUCKET"
