#!/usr/bin/env bash
# Keeps the training of settings.sh going until it has finished: when the TPU is missing, preempted or broken, makes it
# anew, sets it up and launches. It can itself be ended and started at any time.
# Usage: watch.sh [--delete] [--dry-run]
#   --delete  delete the TPU when the run has finished
# What it gives up on it deletes, if the run lives in a bucket: a run that has failed, one that has taken MAX_HOURS since
# watch.sh was started, a TPU that fails TRIES times in a row.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"
begin "--delete" "$@"
need PROJECT ZONE NAME ACCELERATOR CONFIG WORKDIR

give_up() {
  echo "$*"
  if [[ $WORKDIR == gs://* ]]; then
    "$here/delete.sh" --yes || echo "delete.sh did not get through: $NAME may be there, and cost" >&2
  else
    echo "$NAME is still there, with the only copy of $WORKDIR, and costs; fetch.sh, then delete.sh" >&2
  fi
  exit 1
}

begin_again() { "$here/create.sh" --replace && "$here/setup.sh" && "$here/launch.sh"; }

# One round; fails when something in it failed.
look() {
  local now said
  now=$(state)
  if [[ $now == MISSING ]] || is_gone "$now"; then
    echo "$(date '+%F %T') $NAME is $now: it is made anew"
    begin_again
    return
  fi
  [[ $now != UNKNOWN ]] || return 1
  [[ $now == READY ]] || { echo "$(date '+%F %T') $NAME is $now" && return; }
  said=$(on_workers all "bash dca-jax/tpu_scripts/loop.sh state || echo run: none" | sed -n 's/.*run: //p' | sort -u)
  case " ${said//$'\n'/ } " in
    *" failed "*)
      on_workers 0 'tail -n 50 ~/dca-jax-run/log' || true
      give_up "the run has failed; what worker 0 said last stands above" ;;
    *" stopped "*) echo "the run was stopped by stop.sh; $NAME is still there, and costs" && exit ;;
    " finished ")
      echo "the run has finished"
      if has --delete; then "$here/delete.sh" --yes; else echo "$NAME still costs; delete.sh ends that"; fi
      exit ;;
    *" none "*) begin_again ;;
    *" dead "*) echo "$(date '+%F %T') a worker was restarted" && "$here/launch.sh" ;;
    "  ") return 1 ;;
  esac
}

if $dry_run; then
  for script in create setup launch; do "$here/$script.sh" --dry-run; done
  echo "(then it looks every $POLL s, and does this again where $NAME is gone)"
  exit
fi
failures=0
pause=$POLL
while :; do
  if look; then failures=0 pause=$POLL; else failures=$((failures + 1)) pause=$((pause * 2 < 900 ? pause * 2 : 900)); fi
  ((failures < TRIES)) || give_up "$failures failures in a row"
  ((SECONDS < MAX_HOURS * 3600)) || give_up "MAX_HOURS=$MAX_HOURS are over"
  sleep "$pause"
done
