#!/usr/bin/env bash
# The two service accounts of a build on Dataflow, with no right that they do not need (needs an account; once a project).
#
#   PROJECT=p REGION=europe-west4 BUCKET=b deploy/dataflow/accounts.sh
#   DRY_RUN=1 ... deploy/dataflow/accounts.sh        only print the commands
set -euo pipefail

: "${PROJECT:?set PROJECT to the project that is billed}"
: "${REGION:?set REGION, as europe-west4}"
: "${BUCKET:?set BUCKET to the bucket of the inputs, the database and the files of Dataflow itself}"
DRIVER="retrodb-driver@$PROJECT.iam.gserviceaccount.com"
WORKER="retrodb-worker@$PROJECT.iam.gserviceaccount.com"

run() {
  if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}

for name in retrodb-driver retrodb-worker; do run gcloud iam service-accounts create "$name" --project "$PROJECT"; done

# The driver submits jobs, follows and cancels them, and runs them as the workers' account. As the job of a Flex template
# it is a worker itself.
for role in roles/dataflow.developer roles/dataflow.worker; do
  run gcloud projects add-iam-policy-binding "$PROJECT" --member "serviceAccount:$DRIVER" --role "$role" --condition None
done
run gcloud iam service-accounts add-iam-policy-binding "$WORKER" --project "$PROJECT" \
  --member "serviceAccount:$DRIVER" --role roles/iam.serviceAccountUser

# Workers lease work, and tell how it goes.
run gcloud projects add-iam-policy-binding "$PROJECT" --member "serviceAccount:$WORKER" --role roles/dataflow.worker \
  --condition None

# Both read and write the one bucket (objectUser: no bucket is changed, no right is given away), and read the one image.
for account in "$DRIVER" "$WORKER"; do
  run gcloud storage buckets add-iam-policy-binding "gs://$BUCKET" --member "serviceAccount:$account" \
    --role roles/storage.objectUser
  run gcloud artifacts repositories add-iam-policy-binding retrodb --project "$PROJECT" --location "$REGION" \
    --member "serviceAccount:$account" --role roles/artifactregistry.reader
done
