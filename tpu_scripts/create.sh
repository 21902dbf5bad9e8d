#!/usr/bin/env bash
# Makes the TPU that settings.sh describes, and waits until it is ready.
# Usage: create.sh [--replace] [--dry-run]
#   --replace  when what is left of a preempted or failed one is in the way, delete it first
# When there is a TPU of that name already, it says so and changes nothing.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"
begin "--replace" "$@"
need PROJECT ZONE NAME ACCELERATOR

create() {
  local spot=() image=$RUNTIME options=() net=()
  [[ -z $NETWORK ]] || net+=(--network="$NETWORK")
  local subnet=--subnetwork
  [[ $PROVISIONING != compute-engine* ]] || subnet=--subnet
  [[ -z $SUBNETWORK ]] || net+=("$subnet=$SUBNETWORK")
  [[ -z $SERVICE_ACCOUNT ]] || net+=(--service-account="$SERVICE_ACCOUNT")
  if [[ -z $image ]]; then
    case $PROVISIONING:$ACCELERATOR in
      compute-engine*:tpu7x-*) image=ubuntu-accel-2404-amd64-tpu-tpu7x ;;
      compute-engine*:ct*) image=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e ;;
      *:v6e-*) image=v2-alpha-tpuv6e ;;
      *:v5p-*) image=v2-alpha-tpuv5 ;;
      *:v5litepod-*) image=v2-alpha-tpuv5-lite ;;
      *:v[234]-*) image=tpu-ubuntu2204-base ;;
      *) die "ACCELERATOR=$ACCELERATOR: no image is known for it with PROVISIONING=$PROVISIONING; set RUNTIME" ;;
    esac
  fi
  if [[ $PROVISIONING != compute-engine* ]]; then
    # limit.sh runs there and deletes it. What a run has made may be on the machine alone: then its end deletes nothing.
    local delete="gcloud compute tpus tpu-vm delete $NAME" idle=$IDLE_MINUTES
    [[ $PROVISIONING != queued* ]] || delete="gcloud compute tpus queued-resources delete $NAME --force"
    [[ $WORKDIR == gs://* ]] || idle=0
    options=(--metadata-from-file=startup-script="$here/limit.sh"
      --metadata="dca-max-hours=$MAX_HOURS,dca-idle-minutes=$idle,dca-delete=$delete ${place[*]}")
    [[ -z $INTERNAL_IPS ]] || options+=(--internal-ips)
    [[ -z $RESERVATION ]] || options+=(--reserved)
  fi
  case $PROVISIONING in
    compute-engine*)
      # Stopped, a machine costs its disk alone; deleted, the group would be in no state that watch.sh knows.
      spot=(--instance-termination-action=STOP --max-run-duration="${MAX_HOURS}h")
      [[ $PROVISIONING != *-spot ]] || spot+=(--provisioning-model=SPOT)
      [[ -z $RESERVATION ]] || spot+=(--reservation-affinity=specific --reservation="$RESERVATION")
      [[ -z $INTERNAL_IPS ]] || spot+=(--no-address)
      # An attempt that failed half way may have left the template or the policy.
      exists instance-templates "$NAME" ||
        run gcloud compute instance-templates create "$NAME" --project="$PROJECT" --quiet \
          --machine-type="$ACCELERATOR" --boot-disk-size=100GB \
          --image-project=ubuntu-os-accelerator-images --image-family="$image" \
          --maintenance-policy=TERMINATE --scopes=cloud-platform "${spot[@]}" ${net[@]+"${net[@]}"}
      local slice=()
      if ((hosts > 1)); then
        exists resource-policies "$NAME" --region="$REGION" ||
          run gcloud compute resource-policies create workload-policy "$NAME" --project="$PROJECT" \
            --region="$REGION" --quiet --type=HIGH_THROUGHPUT --accelerator-topology="$TOPOLOGY"
        # All hosts or none: the parts of a slice are of no use alone.
        slice=(--target-size-policy-mode=bulk
          --workload-policy="projects/$PROJECT/regions/$REGION/resourcePolicies/$NAME")
      fi
      # watch.sh replaces the whole slice; a single new host would not belong to it.
      run gcloud compute instance-groups managed create "$NAME" "${place[@]}" --size="$hosts" --template="$NAME" \
        --default-action-on-vm-failure=do-nothing ${slice[@]+"${slice[@]}"} ;;
    queued*)
      [[ $PROVISIONING != *-spot ]] || spot=(--spot)
      local node=(--node-id="$NAME")
      ((SLICES == 1)) || node=(--node-count="$SLICES" --node-prefix="$NAME")
      # The limit here is that of the wait in the queue; limit.sh is that of what comes out of it.
      run gcloud compute tpus queued-resources create "$NAME" "${node[@]}" "${place[@]}" \
        --accelerator-type="$ACCELERATOR" --runtime-version="$image" --valid-until-duration="${MAX_HOURS}h" \
        "${options[@]}" ${net[@]+"${net[@]}"} ${spot[@]+"${spot[@]}"} ;;
    *)
      [[ $PROVISIONING != spot ]] || spot=(--spot)
      run gcloud compute tpus tpu-vm create "$NAME" "${place[@]}" \
        --accelerator-type="$ACCELERATOR" --version="$image" \
        "${options[@]}" ${net[@]+"${net[@]}"} ${spot[@]+"${spot[@]}"} ;;
  esac
}

bill
if $dry_run; then create && echo "(then it waits until $NAME is ready)" && exit; fi
now=$(state)
[[ $now != READY ]] || { echo "$NAME is there and ready; next: setup.sh" && exit; }
if is_gone "$now"; then
  has --replace || die "$NAME is $now: what is left of it is in the way; delete.sh removes it, or create.sh --replace"
  "$here/delete.sh" --yes
  now=MISSING
fi
[[ $now != UNKNOWN ]] || die "Google Cloud did not say whether there is a $NAME; the message is above"
if [[ $now == MISSING ]]; then
  echo "making $NAME; what an error means is in docs/tpu.md, under When it fails"
  create
fi
until now=$(state) && [[ $now == READY ]]; do
  ! is_gone "$now" || die "$NAME is $now; docs/tpu.md says why that happens, and delete.sh removes what is left"
  echo "$(date +%T) $NAME is $now"
  sleep "$POLL"
done
echo "$NAME is ready; next: setup.sh"
