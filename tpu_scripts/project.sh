#!/usr/bin/env bash
# Prepares a new project: switches the services on, makes the bucket, and lets the workers read and write it.
# Usage: PROJECT=... BUCKET=gs://... ZONE=... project.sh [--dry-run]      Doing it again changes nothing.
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
# Workers act as the project's default service account, which may not be allowed anything.
number=PROJECT_NUMBER
$dry_run || number=$(gcloud projects describe "$PROJECT" --format='value(projectNumber)')
for role in storage.objectUser storage.legacyBucketReader; do
  run gcloud storage buckets add-iam-policy-binding "$BUCKET" --project="$PROJECT" --role="roles/$role" \
    --member="serviceAccount:$number-compute@developer.gserviceaccount.com"
done
note "project $PROJECT is ready; next: create.sh"
