#!/usr/bin/env bash
# Runs on each TPU VM from its first start (create.sh gives it as startup-script): deletes the TPU MAX_HOURS after that,
# or IDLE_MINUTES after its run has ended, whoever has forgotten it. The instance's metadata say how; nothing else is read.
# Usage: limit.sh
set -euo pipefail
metadata() { # Each value in METADATA, where that is set.
  if [[ -n ${METADATA:-} ]]; then cat "$METADATA/$1"; else
    curl -sf -H 'Metadata-Flavor: Google' "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
  fi
}

born=${STATE:-/var/lib}/dca-jax-born # Of the machine, not of this start of it.
[[ -s $born ]] || date +%s >"$born"
seconds=$(($(metadata dca-max-hours) * 3600)) idle=$(($(metadata dca-idle-minutes) * 60))
read -ra delete <<<"$(metadata dca-delete)"

# The newest state of loop.sh, where that is an end: its age in seconds; else nothing.
ended() {
  local file
  for file in "${HOMES:-/home}"/*/dca-jax-run/state; do
    if [[ -e $file ]] && grep -qxE 'finished|failed|stopped' "$file"; then
      echo $(($(date +%s) - $(stat -c %Y "$file")))
    fi
  done | sort -n | head -1
}

while :; do
  age=$(($(date +%s) - $(cat "$born"))) since=$(ended)
  if ((age >= seconds)) || [[ $idle -gt 0 && -n $since && ${since:-0} -ge $idle ]]; then
    # Where the service account may not delete it, the machine is at least shut down.
    "${delete[@]}" || shutdown -h now
    exit
  fi
  sleep "${POLL:-60}"
done
