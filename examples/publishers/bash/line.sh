#!/usr/bin/env bash
# Ask for a DAG run over the TCP door, with bash alone: one line of JSON out, one line in.
#
#   ./line.sh '{"dag_id": "daily_sales", "key": "2026-11-20"}'
#
# Prints the task id. Ends with 0, 65 (the request is wrong), 77 (not allowed in) or 75 (not taken: send it
# again with the same `key`). Settings: DAGRELAY_HOST, DAGRELAY_PORT, and DAGRELAY_TOKEN where the door has keys.
set -u

json=${1:?usage: line.sh JSON}
host=${DAGRELAY_HOST:-127.0.0.1} port=${DAGRELAY_PORT:-7700}

again() { echo "not taken: $1" >&2; exit 75; }

{ exec 3<>"/dev/tcp/$host/$port"; } 2>/dev/null || again "cannot connect to $host:$port"
if [ -n "${DAGRELAY_TOKEN:-}" ]; then
  printf 'AUTH %s\n' "$DAGRELAY_TOKEN" >&3
  IFS= read -r -t 15 answer <&3 || again "no answer"
  [ "${answer%% *}" = OK ] || { printf '%s\n' "$answer" >&2; exit 77; }
fi
printf '%s\n' "${json//$'\n'/ }" >&3 # a line break in JSON stands between its parts, never within a string
IFS= read -r -t 15 answer <&3 || again "no answer"
case $answer in
  OK\ *) printf '%s\n' "${answer#OK }" ;;
  RETRY\ *) again "$answer" ;;
  ERR\ not\ authenticated*) printf '%s\n' "$answer" >&2; exit 77 ;;
  *) printf '%s\n' "$answer" >&2; exit 65 ;;
esac
