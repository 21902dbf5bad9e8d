#!/usr/bin/env bash
# Runs on a worker; the other scripts call it. Keeps a command running until it has finished.
# Usage: loop.sh start COMMAND ARGUMENT...   in the background, unless it is running already
#        loop.sh stop                        SIGTERM: the last finished step is saved
#        loop.sh state                       running, finished, stopped, failed, dead (cut off) or none
# A command that ends with 0 has finished. After any other end it is started again, because it resumes; but not after
# the third mistake of the user in a row (exit 1 and "dca-jax: error:"), nor after 20 failures in a row that each came
# within ten minutes.
set -euo pipefail
self=$(realpath "$0")
mkdir -p "$HOME/dca-jax-run"
cd "$HOME/dca-jax-run"

say() { echo "loop: $(date '+%F %T') $*" >>log; }
end() { echo "$1" >state && say "$1" && exit "${2:-0}"; }

loop() {
  local child='' stopping=false mistakes=0 failures=0 begun before code
  trap 'stopping=true; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM
  echo $$ >pid
  export PATH=$HOME/dca-jax-env/bin:$PATH
  export JAX_PLATFORMS=tpu,cpu # Where the TPU cannot be had, this is an error, and not training on the CPU.
  while ! $stopping; do
    begun=$SECONDS
    before=$(wc -c <log)
    say "starts: $*"
    (cd "$HOME/dca-jax" && exec "$@") >>log 2>&1 </dev/null &
    child=$!
    ! $stopping || kill -TERM "$child"
    while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # A signal cuts `wait` short.
    code=0
    wait "$child" || code=$?
    child=''
    ((code)) || end finished
    say "ended with $code after $((SECONDS - begun)) s"
    if ((code != 143 && SECONDS - begun < 600)); then failures=$((failures + 1)); else failures=0; fi
    if ((code == 1)) && tail -c "+$((before + 1))" log | grep -q '^dca-jax: error:'; then
      mistakes=$((mistakes + 1))
    else
      mistakes=0
    fi
    ((mistakes < 3 && failures < 20)) || end failed 1
    if ! $stopping; then sleep "${WAIT_SECONDS:-20}" 9>&- & wait $! || true; fi
  done
  # When the machine shuts down, SIGTERM comes too; then this run is not stopped, but cut off.
  if [[ -e stop ]]; then end stopped; fi
}

# The lock is held by the loop and by what it runs: while anything of them lives, the TPU is taken.
is_free() { flock --nonblock lock true; }

case ${1:-} in
  start)
    shift
    exec 9>lock
    if flock --nonblock 9; then
      rm -f stop
      echo running >state
      printf '%q ' "$@" >command.txt
      setsid bash "$self" loop "$@" >>log 2>&1 </dev/null &
      echo "$(hostname): started; its log is ~/dca-jax-run/log"
    elif [[ $(cat command.txt) == "$(printf '%q ' "$@")" ]]; then
      echo "$(hostname): already running; nothing was started"
    else
      echo "$(hostname): error: something else is running: $(cat command.txt); stop.sh ends it" >&2 && exit 1
    fi ;;
  loop) shift && loop "$@" ;;
  stop)
    if is_free; then echo "$(hostname): nothing is running" && exit; fi
    touch stop
    kill -TERM "$(cat pid)" 2>/dev/null || true
    flock --timeout 600 lock true || { echo "$(hostname): error: still running after 600 s" >&2 && exit 1; }
    echo "$(hostname): $(cat state)" ;;
  state)
    said=$(cat state 2>/dev/null || echo none)
    if [[ $said == running ]] && is_free; then said=dead; fi
    echo "run: $said" ;;
  *) echo "loop.sh: error: start, stop or state" >&2 && exit 1 ;;
esac
