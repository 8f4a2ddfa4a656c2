#!/usr/bin/env bash
# Build a database on Dataflow (needs an account). The driver submits one Dataflow job a step of a stage and waits for it,
# which takes hours, and resumes when it is run again. It runs as a Cloud Run job, or as a Flex template's job.
#
#   PROJECT=p REGION=europe-west4 BUCKET=b deploy/dataflow/submit.sh gs://b/corpus/*.jsonl.gz --out gs://b/my-db
#   LAUNCH=flex ... deploy/dataflow/submit.sh ...    the driver is a Dataflow job, launched from a Flex template
#   DRY_RUN=1 ... deploy/dataflow/submit.sh ...      only print the commands
set -euo pipefail

: "${PROJECT:?set PROJECT to the project that is billed}"
: "${REGION:?set REGION, as europe-west4}"
: "${BUCKET:?set BUCKET to the bucket for files of Dataflow itself}"
LAUNCH="${LAUNCH:-run}"
[[ "$LAUNCH" = run || "$LAUNCH" = flex ]] || { echo "LAUNCH is run (Cloud Run) or flex (Flex template)" >&2; exit 2; }
inputs=()
while [ $# -gt 0 ] && [[ "$1" != -* ]]; do inputs+=("$1"); shift; done
if [ ${#inputs[@]} -eq 0 ] || [ "${1:-}" != --out ] || [ $# -lt 2 ]; then
  echo "give what retrodb build takes: INPUT... --out gs://... [FLAG...]" >&2
  exit 2
fi
out="$2"
shift 2

VERSION="${VERSION:-latest}"
IMAGE="$REGION-docker.pkg.dev/$PROJECT/retrodb/worker:$VERSION"
ACCOUNT="${ACCOUNT:-retrodb-driver@$PROJECT.iam.gserviceaccount.com}"
WORKER="${WORKER:-retrodb-worker@$PROJECT.iam.gserviceaccount.com}"
TEMPORARY="gs://$BUCKET/dataflow"
TEMPLATE="$TEMPORARY/templates/retrodb-$VERSION.json"
cd "$(dirname "$0")/../.."

run() {
  if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}

# A delimiter other than the comma: globs and options may hold commas.
join() { local IFS='|'; echo "^|^$*"; }

run docker build --file deploy/dataflow/Dockerfile --tag "$IMAGE" .
run docker push "$IMAGE"

if [ "$LAUNCH" = flex ]; then
  flags=("$@" --runner-option "service_account_email=$WORKER" --runner-option use_public_ips=false)
  run gcloud dataflow flex-template build "$TEMPLATE" --project "$PROJECT" --image "$IMAGE" --sdk-language PYTHON \
    --metadata-file deploy/dataflow/metadata.json
  run gcloud dataflow flex-template run "retrodb-build-$(date +%Y%m%d-%H%M%S)" --project "$PROJECT" --region "$REGION" \
    --template-file-gcs-location "$TEMPLATE" --staging-location "$TEMPORARY/staging" --temp-location "$TEMPORARY" \
    --service-account-email "$ACCOUNT" --disable-public-ips --parameters \
    "$(join "inputs=$(printf '%q ' "${inputs[@]}")" "out=$out" "sdk_container_image=$IMAGE" "flags=$(printf '%q ' "${flags[@]}")")"
  exit
fi

options=(
  "project=$PROJECT" "region=$REGION" "temp_location=$TEMPORARY"
  "sdk_container_image=$IMAGE" "service_account_email=$WORKER" "use_public_ips=false"
)
arguments=(build "${inputs[@]}" --out "$out" "$@" --runner dataflow)
for option in "${options[@]}"; do arguments+=(--runner-option "$option"); done
run gcloud run jobs deploy retrodb-build --project "$PROJECT" --region "$REGION" --image "$IMAGE" \
  --service-account "$ACCOUNT" --command retrodb --args "$(join "${arguments[@]}")" --task-timeout 24h --max-retries 3 \
  --cpu 2 --memory 4Gi
run gcloud run jobs execute retrodb-build --project "$PROJECT" --region "$REGION"
