#!/usr/bin/env bash
# Ask for a DAG run over HTTP, with curl.
#
#   ./http.sh daily_sales '{"conf": {"day": "2026-11-20"}}' sales-2026-11-20
#
# The third argument is the Idempotency-Key: the same again is the same run. Prints the answer. Ends with 0,
# 65 (refused: the answer says why) or 75 (no answer: send it again with the same key).
# Settings: DAGRELAY_URL, DAGRELAY_TOKEN.
set -u

dag_id=${1:?usage: http.sh DAG_ID JSON IDEMPOTENCY_KEY} json=${2:?JSON} key=${3:?an Idempotency-Key}
url=${DAGRELAY_URL:-http://127.0.0.1:8080}

# By a file descriptor: a token among the arguments could be read in the list of processes.
answer=$(printf '%s' "$json" | curl --silent --show-error --max-time 15 --retry 3 --retry-connrefused \
  --config <([ -z "${DAGRELAY_TOKEN:-}" ] || printf 'header = "Authorization: Bearer %s"\n' "$DAGRELAY_TOKEN") \
  --header 'Content-Type: application/json' --header "Idempotency-Key: \"$key\"" \
  --data-binary @- --write-out '\n%{http_code}' "$url/v1/dags/$dag_id/runs") || exit 75
code=${answer##*$'\n'}
printf '%s\n' "${answer%$'\n'*}"
case $code in
  2??) ;;
  429 | 5??) exit 75 ;;
  *) exit 65 ;;
esac
