#!/usr/bin/env bash
# Copies the repository to all workers, makes a Python 3.12 environment there, and checks that the devices are seen.
# Usage: setup.sh [--dry-run]      Doing it again brings the copy up to date.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"
begin "" "$@"
need PROJECT ZONE NAME REPOSITORY
[[ -f $REPOSITORY/setup.py ]] || die "REPOSITORY=$REPOSITORY holds no setup.py"

# The system's Python is 3.10, which is too old; uv brings one of its own.
install=$(cat <<'END'
set -e
if [ -e ~/dca-jax-run/lock ] && ! flock --nonblock ~/dca-jax-run/lock true; then
  echo "$(hostname): error: a run is going on here; stop.sh ends it" >&2 && exit 1
fi
rm -rf ~/dca-jax && mkdir ~/dca-jax && tar -xzf ~/dca-jax.tgz -C ~/dca-jax
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
[ -x ~/dca-jax-env/bin/python ] || uv venv --quiet --python 3.12 ~/dca-jax-env
uv pip install --quiet --python ~/dca-jax-env/bin/python --constraint ~/dca-jax/constraints/tpu.txt \
  -e "$HOME/dca-jax[tpu,gcs]"
END
)
# One process on every host, as in training; alone, a host would wait for the others.
check=$(cat <<'END'
import jax
jax.distributed.initialize()
print(f"process {jax.process_index()} of {jax.process_count()}: {jax.device_count()} x {jax.devices()[0].device_kind}")
assert jax.default_backend() == "tpu", "no TPU was found"
END
)

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
run tar -C "$REPOSITORY" --exclude=./.git --exclude='./.venv*' --exclude=./runs -czf "$folder/dca-jax.tgz" .
copy_to_workers "$folder/dca-jax.tgz"
on_workers all "$install"
on_workers all "$(printf 'dca-jax-env/bin/python -c %q' "$check")"
note "all workers are set up; next: launch.sh"
