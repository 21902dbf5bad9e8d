#!/usr/bin/env bash
# Submits the training of settings.sh to a GKE cluster, as a JobSet. Kubernetes restarts it, and ends it after MAX_HOURS.
# Usage: PROVISIONING=gke[-spot] CLUSTER=... IMAGE=... gke.sh [--xpk | --delete] [--dry-run]
#   --xpk      through `xpk workload create`, on a cluster that xpk has made
#   --delete   deletes the JobSet; the cluster takes nodes away that nobody uses, if it may scale to 0 (docs/tpu.md)
#   --dry-run  prints what would be submitted
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"
begin "--xpk --delete" "$@"
need PROJECT ZONE NAME CLUSTER ACCELERATOR TOPOLOGY IMAGE CONFIG WORKDIR
[[ $PROVISIONING == gke* ]] || die "PROVISIONING=$PROVISIONING: must be gke or gke-spot here"
case $ACCELERATOR in
  ct5lp-*) label=tpu-v5-lite-podslice type=v5litepod ;;
  ct5p-*) label=tpu-v5p-slice type=v5p ;;
  ct6e-*) label=tpu-v6e-slice type=v6e ;;
  tpu7x-*) label=tpu7x type=tpu7x ;;
  *) die "ACCELERATOR=$ACCELERATOR: GKE wants a machine type: ct5lp-hightpu-4t, ct5p-hightpu-4t, ct6e-standard-4t, tpu7x-standard-4t" ;;
esac
more=()
eval "more=($ARGS)" # In shell syntax, so that an argument may hold spaces.
arguments=(--config="$CONFIG" --workdir="$WORKDIR" ${more[@]+"${more[@]}"})
deadline=$(($(date +%s) + MAX_HOURS * 3600))

# In YAML double quotes; a $( would be expanded by Kubernetes.
quoted() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  printf '"%s"' "${text//\$(/\$\$(}"
}

manifest() {
  local selector=() argument
  [[ $PROVISIONING != gke-spot ]] || selector+=('cloud.google.com/gke-spot: "true"')
  [[ -z $RESERVATION ]] || selector+=("cloud.google.com/reservation-name: $RESERVATION")
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool # One slice, one node pool.
spec:
  ttlSecondsAfterFinished: 86400
  network: {enableDNSHostnames: true, publishNotReadyAddresses: true}
  failurePolicy:
    maxRestarts: 50
    rules:
    - name: finally
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy, DeadlineExceeded]
  replicatedJobs:
  - name: slice
    replicas: $SLICES
    template:
      spec:
        completionMode: Indexed
        completions: $hosts
        parallelism: $hosts
        backoffLimit: 0 # A lost host ends the Job, and the JobSet starts all hosts again.
        activeDeadlineSeconds: $((MAX_HOURS * 3600 + 600))
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {containerName: train, operator: In, values: [1, 124]} # As entry.sh says.
        template:
          spec:
            restartPolicy: Never
            serviceAccountName: dca-jax # project.sh lets it use the bucket and Vertex.
            terminationGracePeriodSeconds: 300
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $label
              cloud.google.com/gke-tpu-topology: $TOPOLOGY
$( ((${#selector[@]} == 0)) || printf '              %s\n' "${selector[@]}")
            containers:
            - name: train
              image: $IMAGE
              args:
$(for argument in "${arguments[@]}"; do echo "              - $(quoted "$argument")"; done)
              env:
              - {name: DEADLINE, value: "$deadline"}
              envFrom:
              - secretRef: {name: dca-jax, optional: true} # HF_TOKEN, GEMINI_API_KEY
              ports:
              - {containerPort: 8471, protocol: TCP} # TPU runtime
              - {containerPort: 8482, protocol: TCP} # JAX's coordinator
              resources: {limits: {google.com/tpu: $per_host}}
END
}

if has --delete; then
  run kubectl delete jobset "$NAME" --ignore-not-found
elif has --xpk; then
  capacity=(--on-demand)
  [[ $PROVISIONING != gke-spot ]] || capacity=(--spot)
  [[ -z $RESERVATION ]] || capacity=(--reservation="$RESERVATION")
  bill
  # Errors and the deadline are no reasons to start again, and neither 1 nor 124 is in the list.
  run xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$NAME" \
    --tpu-type="$type-$TOPOLOGY" --num-slices="$SLICES" --docker-image="$IMAGE" "${capacity[@]}" \
    --max-restarts=50 --restart-on-exit-codes=75,134,137,143 --termination-grace-period-seconds=300 \
    --ttl-seconds-after-finished=86400 --env="DEADLINE=$deadline" \
    --command="bash tpu_scripts/entry.sh $(printf '%q ' "${arguments[@]}")"
elif $dry_run; then
  manifest && bill
  echo "+ kubectl apply -f -   # what stands above, in cluster $CLUSTER"
else
  bill
  run gcloud container clusters get-credentials "$CLUSTER" --project="$PROJECT" --location="$ZONE" --quiet
  manifest | kubectl apply -f -
fi
note "next: kubectl get jobset $NAME; kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=$NAME --prefix"
