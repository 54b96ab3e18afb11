#!/usr/bin/env bash
# Ask for a DAG run over a Redis Stream, with bash alone: no redis-cli, no other program.
#
#   ./stream.sh '{"dag_id": "daily_sales", "conf": {"day": "2026-11-20"}, "key": "2026-11-20"}'
#
# Prints the entry's id. Ends with 0, 65 (Redis refused it) or 75 (no answer: send it again with the same `key`).
# Settings: REDIS_HOST, REDIS_PORT, REDIS_USER, REDIS_PASSWORD, REDIS_DB, STREAM.
set -u
LC_ALL=C # lengths in bytes, as Redis counts them

json=${1:?usage: stream.sh JSON}
host=${REDIS_HOST:-127.0.0.1} port=${REDIS_PORT:-6379} stream=${STREAM:-dag-triggers}

say() { # one command, each argument with its length: whatever bytes it holds, it stays one argument
  local argument text="*$#"$'\r\n'
  for argument in "$@"; do text+="\$${#argument}"$'\r\n'"$argument"$'\r\n'; done
  printf '%s' "$text" >&3
}

hear() { # one answer into $answer; ends the script on an error
  local line
  IFS= read -r -t 5 line <&3 || { echo "no answer from $host:$port" >&2; exit 75; }
  line=${line%$'\r'}
  case $line in
    -*) echo "refused: ${line#-}" >&2; exit 65 ;;
    \$*) IFS= read -r -t 5 answer <&3 || exit 75; answer=${answer%$'\r'} ;;
    *) answer=${line#?} ;;
  esac
}

{ exec 3<>"/dev/tcp/$host/$port"; } 2>/dev/null || { echo "cannot connect to $host:$port" >&2; exit 75; }
if [ -n "${REDIS_PASSWORD:-}" ]; then
  if [ -n "${REDIS_USER:-}" ]; then say AUTH "$REDIS_USER" "$REDIS_PASSWORD"; else say AUTH "$REDIS_PASSWORD"; fi
  hear
fi
if [ -n "${REDIS_DB:-}" ]; then say SELECT "$REDIS_DB"; hear; fi
say XADD "$stream" '*' data "$json"
hear
printf '%s\n' "$answer"
