# shellcheck shell=bash disable=SC2034 # The scripts beside this file use these.
# The settings of one run on TPUs. A variable of the same name in the environment wins over what stands here.

PROJECT=${PROJECT:-}              # Google Cloud project id
ZONE=${ZONE:-us-west4-a}          # that has such TPUs: docs.cloud.google.com/tpu/docs/regions-zones
REGION=${REGION:-${ZONE%-*}}
NAME=${NAME:-dca-jax}             # of the TPU, and of everything made for it
PROVISIONING=${PROVISIONING:-on-demand} # on-demand, spot, queued, compute-engine, gke; the last three with -spot too

# A TPU type (v5litepod-16, v6e-8, v5p-32); with compute-engine and gke a machine type (ct6e-standard-4t).
ACCELERATOR=${ACCELERATOR:-v5litepod-16}
RUNTIME=${RUNTIME:-}              # image (an image family with compute-engine); empty: the one for ACCELERATOR
TOPOLOGY=${TOPOLOGY:-}            # compute-engine and gke only: the slice, such as 4x4; as many hosts as that takes
SLICES=${SLICES:-1}               # several: with queued and gke

MAX_HOURS=${MAX_HOURS:-24}        # after which what was made is deleted or stopped, and watch.sh ends
IDLE_MINUTES=${IDLE_MINUTES:-30}  # after the end of a run that lives in a bucket, the TPU deletes itself; 0: it does not
PRICE=${PRICE:-}                  # dollars for one chip and hour; empty: as in prices.txt

NETWORK=${NETWORK:-}              # empty: the project's default network
SUBNETWORK=${SUBNETWORK:-}
INTERNAL_IPS=${INTERNAL_IPS:-}    # true: no external addresses; then the subnetwork needs Cloud NAT, and ssh goes through IAP
SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-} # that workers act as; empty: the default one of Compute Engine
RESERVATION=${RESERVATION:-}      # of compute-engine and gke by its name; with on-demand and queued true: any that fits

CLUSTER=${CLUSTER:-}              # gke only
IMAGE=${IMAGE:-}                  # gke only: what Dockerfile has made

BUCKET=${BUCKET:-}                # gs://NAME, in the region of ZONE
WORKDIR=${WORKDIR:-${BUCKET:+$BUCKET/$NAME}} # the run; shared by all workers, so in a bucket (or on NFS)
REPOSITORY=${REPOSITORY:-$here/..} # what is copied to the workers
CONFIG=${CONFIG:-configs/quickstart.py} # a recipe, as seen from REPOSITORY
ARGS=${ARGS:-}                    # more for `dca-jax train`, in shell syntax: "--config.steps=200 --config.seed=1"

POLL=${POLL:-60}                  # seconds between two looks at the state
TRIES=${TRIES:-50}                # failures in a row after which watch.sh gives up
