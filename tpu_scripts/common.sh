# shellcheck shell=bash
# What every script here shares: settings, --help and --dry-run, the state of the TPU, and how its workers are reached.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR
. "$here/settings.sh"
dry_run=false
rest=() # Arguments that are the script's own.

die() { echo "${0##*/}: error: $*" >&2; exit 1; }

# Prints the command with --dry-run, else runs it.
run() {
  if $dry_run; then printf '+' && printf ' %q' "$@" && echo; else "$@"; fi
}

# note TEXT: says what has been done, so not with --dry-run.
note() { $dry_run || echo "$*"; }

# need VARIABLE...: settings that this script cannot do without.
need() {
  local name
  for name; do
    [[ -n ${!name} ]] || die "$name is not set; set it in tpu_scripts/settings.sh or in the environment"
  done
}

# begin "OPTIONS" "$@": reads the arguments. OPTIONS are the script's own; a trailing = means that a value follows.
begin() {
  local own=" $1 " argument
  shift
  for argument; do
    case $argument in
      --help) sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$0" && exit ;;
      --dry-run) dry_run=true ;;
      *) [[ $own == *" ${argument%%=*} "* || $own == *" ${argument%%=*}= "* ]] || die "no option $argument; see --help"
        rest+=("$argument") ;;
    esac
  done
  case $PROVISIONING in
    on-demand | spot | queued | queued-spot | compute-engine | compute-engine-spot) ;;
    gke | gke-spot)
      [[ ${0##*/} =~ ^(gke|project|fetch)\.sh$ ]] || die "PROVISIONING=$PROVISIONING: gke.sh does all of it" ;;
    *) die "PROVISIONING=$PROVISIONING: must be on-demand, spot, queued[-spot], compute-engine[-spot] or gke[-spot]" ;;
  esac
  [[ $MAX_HOURS =~ ^[1-9][0-9]*$ ]] || die "MAX_HOURS=$MAX_HOURS: must be a number of hours"
  [[ $IDLE_MINUTES =~ ^[0-9]+$ ]] || die "IDLE_MINUTES=$IDLE_MINUTES: must be a number of minutes"
  [[ $SLICES == 1 || ($SLICES =~ ^[1-9][0-9]*$ && $PROVISIONING =~ ^(queued|gke)) ]] ||
    die "SLICES=$SLICES: several slices are made with PROVISIONING=queued or gke"
  [[ -z $BUCKET || $BUCKET =~ ^gs://[^/]+$ ]] || die "BUCKET=$BUCKET: must be gs:// and a name"
  $dry_run || command -v gcloud >/dev/null || die "there is no gcloud here; cloud.google.com/sdk/docs/install has it"
  place=(--project="$PROJECT" --zone="$ZONE" --quiet)
  hosts=1 chips=0 nodes=("$NAME") tunnel=()
  if [[ $PROVISIONING =~ ^(compute-engine|gke) ]]; then
    [[ -z $TOPOLOGY || ($TOPOLOGY =~ ^[0-9]+(x[0-9]+)+$ && $ACCELERATOR =~ -[0-9]+t$) ]] ||
      die "TOPOLOGY=$TOPOLOGY, ACCELERATOR=$ACCELERATOR: $PROVISIONING wants such as 4x4 and ct6e-standard-4t"
    per_host=${ACCELERATOR##*-} per_host=${per_host%t} chips=$per_host
    if [[ -n $TOPOLOGY ]]; then chips=$((${TOPOLOGY//x/*})) hosts=$((chips / per_host)); fi
  elif [[ $ACCELERATOR =~ ^(v[0-9]+[a-z]*)-([0-9]+)$ ]]; then
    chips=${BASH_REMATCH[2]}
    [[ ! ${BASH_REMATCH[1]} =~ ^v([234]|5p)$ ]] || chips=$((chips / 2)) # These count cores.
  fi
  if ((SLICES > 1)); then
    local slice
    nodes=()
    for ((slice = 0; slice < SLICES; slice++)); do nodes+=("$NAME-$slice"); done
  fi
  [[ -z $INTERNAL_IPS ]] || tunnel=(--tunnel-through-iap)
}

# Says what may be paid at most, before anything is made.
bill() {
  local kind price=$PRICE
  case $ACCELERATOR in
    v5lite* | ct5lp-*) kind=v5e ;;
    ct5p-*) kind=v5p ;;
    ct6e-*) kind=v6e ;;
    *) kind=${ACCELERATOR%%-*} ;;
  esac
  [[ -n $price ]] || price=$(awk -v kind="$kind" '$1 == kind { print $2 }' "$here/prices.txt")
  if [[ -z $price ]]; then
    echo "at most $MAX_HOURS hours; prices.txt has no price of $ACCELERATOR, so the bill is unknown; PRICE sets it"
  else
    awk -v n="$((chips * SLICES))" -v h="$MAX_HOURS" -v p="$price" 'BEGIN {
      printf "at most $%.0f: %d chips x %d hours x $%.2f (prices.txt), and the bucket\n", n * h * p, n, h, p }'
  fi
}

has() { [[ " ${rest[*]-} " == *" $1 "* ]]; }
value() { local a; for a in ${rest[@]+"${rest[@]}"}; do [[ $a != "$1="* ]] || echo "${a#*=}"; done; }

# One word: READY; MISSING; UNKNOWN where nobody answered; else what Google Cloud calls it.
state() {
  local kind=$PROVISIONING words group=(compute instance-groups managed list-instances)
  case $kind in
    compute-engine*) words=$(ask "${group[@]}" "$NAME" "${place[@]}" --format='value(instanceStatus)') ;;
    queued*) words=$(ask compute tpus queued-resources describe "$NAME" "${place[@]}" --format='value(state.state)') ;;
    *) words=$(ask compute tpus tpu-vm describe "$NAME" "${place[@]}" --format='value(state)') ;;
  esac
  if [[ $words == ACTIVE ]]; then # A queued resource may be called active when its TPU has gone.
    local node
    for node in "${nodes[@]}"; do
      words=$(ask compute tpus tpu-vm describe "$node" "${place[@]}" --format='value(state)')
      [[ $words == READY ]] || break
    done
  fi
  if [[ $kind == compute-engine* && $words != MISSING && $words != UNKNOWN ]]; then
    local running
    running=$(grep -cx RUNNING <<<"$words" || true)
    if ((running == hosts)); then words=READY; else words=$(grep -vx -m1 RUNNING <<<"$words" || true); fi
  fi
  echo "${words:-WAITING}"
}

# exists COLLECTION NAME...: of Compute Engine.
exists() { ! $dry_run && gcloud compute "$1" describe "${@:2}" --project="$PROJECT" >/dev/null 2>&1; }

ask() {
  local errors
  errors=$(mktemp)
  if ! gcloud "$@" 2>"$errors"; then
    if grep -qiE 'not.?found' "$errors"; then echo MISSING; else echo UNKNOWN && cat "$errors" >&2; fi
  fi
  rm -f "$errors"
}

# Whether a TPU in this state is lost: it will not come back by itself.
is_gone() { [[ $1 =~ ^(PREEMPTED|TERMINATED|STOPPING|STOPPED|SUSPENDING|SUSPENDED|FAILED)$ ]]; }

# vms WHICH: names of virtual machines (compute-engine).
vms() {
  if $dry_run; then echo "EACH-VM-OF-$NAME" && return; fi
  local all
  all=$(gcloud compute instance-groups managed list-instances "$NAME" "${place[@]}" --format='value(name)') || return
  all=$(sort <<<"$all")
  if [[ $1 == all ]]; then echo "$all"; else sed -n "$(($1 + 1))p" <<<"$all"; fi
}

# on_workers WHICH COMMAND: WHICH is a number or "all"; at the same time on all of them, because one waits for another.
on_workers() {
  local names vm node pids=() pid failed=0
  if [[ $PROVISIONING == compute-engine* ]]; then
    names=$(vms "$1") && [[ -n $names ]] || return
    for vm in $names; do
      run gcloud compute ssh "$vm" "${place[@]}" ${tunnel[@]+"${tunnel[@]}"} --command="$2" </dev/null & pids+=($!)
    done
  elif ((SLICES == 1)); then # Not in the background, where Ctrl-C would not reach it.
    run gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" ${tunnel[@]+"${tunnel[@]}"} --worker="$1" --command="$2"
    return
  else
    for node in "${nodes[@]}"; do
      [[ $1 == all || $node == "${nodes[0]}" ]] || continue
      run gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" ${tunnel[@]+"${tunnel[@]}"} --worker="$1" \
        --command="$2" </dev/null & pids+=($!)
    done
  fi
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  return $failed
}

# copy_to_workers FILE: into the home directory of each.
copy_to_workers() {
  local names vm node
  if [[ $PROVISIONING != compute-engine* ]]; then
    for node in "${nodes[@]}"; do
      run gcloud compute tpus tpu-vm scp "$1" "$node:" "${place[@]}" ${tunnel[@]+"${tunnel[@]}"} --worker=all || return
    done
    return
  fi
  names=$(vms all) && [[ -n $names ]] || return
  for vm in $names; do run gcloud compute scp "$1" "$vm:" "${place[@]}" ${tunnel[@]+"${tunnel[@]}"} || return; done
}
