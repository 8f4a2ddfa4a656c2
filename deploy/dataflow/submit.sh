#!/usr/bin/env bash
# Build a database on Dataflow (needs an account). The driver runs as a Cloud Run job, from the image of the workers:
# it submits one Dataflow job a stage and waits for it, which takes hours, and resumes when it is run again.
#
#   PROJECT=p REGION=europe-west4 BUCKET=b deploy/dataflow/submit.sh gs://b/corpus/*.jsonl.gz --out gs://b/my-db
#   DRY_RUN=1 ... deploy/dataflow/submit.sh ...      only print the commands
set -euo pipefail

: "${PROJECT:?set PROJECT to the project that is billed}"
: "${REGION:?set REGION, as europe-west4}"
: "${BUCKET:?set BUCKET to the bucket for files of Dataflow itself}"
[ $# -gt 0 ] || { echo "give what retrodb build takes: INPUT... --out gs://..." >&2; exit 2; }
VERSION="${VERSION:-latest}"
IMAGE="$REGION-docker.pkg.dev/$PROJECT/retrodb/worker:$VERSION"
ACCOUNT="${ACCOUNT:-retrodb-driver@$PROJECT.iam.gserviceaccount.com}"
WORKER="${WORKER:-retrodb-worker@$PROJECT.iam.gserviceaccount.com}"
cd "$(dirname "$0")/../.."

run() {
  if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}

options=(
  "project=$PROJECT" "region=$REGION" "temp_location=gs://$BUCKET/dataflow"
  "sdk_container_image=$IMAGE" "service_account_email=$WORKER" "use_public_ips=false"
)
arguments=(build "$@" --runner dataflow)
for option in "${options[@]}"; do arguments+=(--runner-option "$option"); done

run docker build --file deploy/dataflow/Dockerfile --tag "$IMAGE" .
run docker push "$IMAGE"
# A delimiter other than the comma: globs and options may hold commas.
joined="$(IFS='|'; echo "${arguments[*]}")"
run gcloud run jobs deploy retrodb-build --project "$PROJECT" --region "$REGION" --image "$IMAGE" \
  --service-account "$ACCOUNT" --command retrodb --args "^|^$joined" --task-timeout 24h --max-retries 3 \
  --cpu 2 --memory 4Gi
run gcloud run jobs execute retrodb-build --project "$PROJECT" --region "$REGION"
