#!/usr/bin/env bash
# Prepares a new project: switches the services on, makes the bucket, and lets the workers read and write it, ask Vertex,
# and delete the TPU they run on (limit.sh).
# Usage: PROJECT=... BUCKET=gs://... ZONE=... project.sh [--dry-run]      Doing it again changes nothing.
# With CLUSTER, it lets the pods of gke.sh do so too, by Workload Identity, and installs JobSet there.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"
begin "" "$@"
need PROJECT BUCKET

run gcloud services enable tpu.googleapis.com compute.googleapis.com storage.googleapis.com --project="$PROJECT" --quiet
if $dry_run || ! gcloud storage buckets describe "$BUCKET" --project="$PROJECT" >/dev/null 2>&1; then
  run gcloud storage buckets create "$BUCKET" --project="$PROJECT" --location="$REGION" \
    --uniform-bucket-level-access --public-access-prevention
fi
number=PROJECT_NUMBER
$dry_run || number=$(gcloud projects describe "$PROJECT" --format='value(projectNumber)')

# allow MEMBER [ROLE...]: the bucket, and roles in the project.
allow() {
  local role
  for role in storage.objectUser storage.legacyBucketReader; do
    run gcloud storage buckets add-iam-policy-binding "$BUCKET" --project="$PROJECT" --role="roles/$role" --member="$1"
  done
  for role in "${@:2}"; do
    run gcloud projects add-iam-policy-binding "$PROJECT" --role="roles/$role" --member="$1" --condition=None --quiet
  done
}

# Workers act as the project's default service account unless told, which may not be allowed anything.
allow "serviceAccount:${SERVICE_ACCOUNT:-$number-compute@developer.gserviceaccount.com}" aiplatform.user tpu.admin
if [[ -n $CLUSTER ]]; then
  run gcloud container clusters get-credentials "$CLUSTER" --project="$PROJECT" --location="$ZONE" --quiet
  run kubectl apply --server-side -f \
    https://github.com/kubernetes-sigs/jobset/releases/download/v0.10.1/manifests.yaml
  run kubectl create serviceaccount dca-jax || true # There already, the second time.
  pool=projects/$number/locations/global/workloadIdentityPools/$PROJECT.svc.id.goog
  allow "principal://iam.googleapis.com/$pool/subject/ns/default/sa/dca-jax" aiplatform.user
fi
note "project $PROJECT is ready; next: create.sh"
