#!/bin/bash
# One training run on Cloud TPU VMs: a queued resource is created and set up; the run resumes after preemption.
#
#     launch/tpu_vm.sh [--dry-run] train --config configs/dr_da_1b.py --out /shared/runs --data.prepared /shared/prepared
#     launch/tpu_vm.sh [--dry-run] create | setup | status | stop | delete
#
# train does all of it until the run has ended: it creates the TPU if there is none, waits for it, sets it up, starts
# the training and, when the TPU is preempted, begins again; the run goes on from its newest checkpoint. Leave it
# running where nothing disconnects it (tmux on a small VM). It does not delete the TPU at the end: that is `delete`.
# stop asks a running training to save and end. --dry-run prints the commands, as if everything succeeded. Needs
# gcloud, with a project set.
#
# out and data.prepared must lie on a file system that all workers share: NFS (Filestore), which is mounted on /shared.
# Cloud Storage FUSE is none: other machines see a file only when it is closed.

set -euo pipefail

# Environment, with its defaults:
name=${TPU_NAME:-dreamer}
zone=${TPU_ZONE:-us-east5-a}
type=${TPU_TYPE:-v5p-64}
runtime=${TPU_RUNTIME:-v2-alpha-tpuv5}      # goes with the type
spot=${TPU_SPOT:-1}                         # 0 for on-demand capacity
nfs=${TPU_NFS:-}                            # host:/share, mounted on /shared; empty if that is not needed
repository=${TPU_REPOSITORY:-$(git -C "$(dirname "$0")" remote get-url origin 2>/dev/null || true)}
settings=${TPU_SETTINGS:-DREAMER_DATA=/shared/data JAX_COMPILATION_CACHE_DIR=/shared/compiled} # of the training
retries=${TPU_RETRIES:-3}                   # starts after failures other than preemption
seconds=${TPU_POLL_SECONDS:-30}             # between looks at the queue

dry=""
if [[ ${1:-} == --dry-run ]]; then
    dry=1
    shift
fi

call() {
    [[ $dry ]] && { printf '%q ' "$@" && echo; } && return
    "$@"
}
queue() { call gcloud compute tpus queued-resources "$1" "$name" --zone "$zone" "${@:2}"; }
on_all_workers() { call gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all --command "$1"; }

state() {
    [[ $dry ]] && echo "${dry_state:-NONE}" && return
    gcloud compute tpus queued-resources describe "$name" --zone "$zone" --format 'value(state.state)' 2>/dev/null ||
        echo NONE
}

create() {
    local options=(--node-id "$name" --accelerator-type "$type" --runtime-version "$runtime")
    [[ $spot == 1 ]] && options+=(--spot)
    queue create "${options[@]}"
    dry_state=ACTIVE
}

delete() { queue delete --force --quiet; }

setup() {
    [[ $repository ]] || { echo "set TPU_REPOSITORY to an address that git can clone" && exit 2; }
    local mount=":"
    [[ $nfs ]] && mount="sudo mkdir -p /shared; mountpoint -q /shared || { sudo apt-get install -y nfs-common && \
sudo mount -t nfs $nfs /shared; }"
    # The images' Python is older than ours; uv brings one.
    on_all_workers "set -e; $mount
if [ -d dreamer ]; then git -C dreamer pull --ff-only; else git clone $repository dreamer; fi
cd dreamer; python3 -m pip install --user uv
[ -d .venv ] || ~/.local/bin/uv venv --python 3.12
~/.local/bin/uv pip install -e '.[tpu]'"
}

# From the start of the line, so that the shells whose command lines hold it are spared.
training="'^[^ ]*python -u -m dreamer_jax.train'"
# What an earlier start may have left would hold the TPU and the run's folder; it may save first.
clear_workers() {
    on_all_workers "pkill -TERM -f $training
for _ in \$(seq 60); do pgrep -f $training >/dev/null || break; sleep 2; done
pkill -KILL -f $training; true"
}

# stand_by: a TPU that is ready, from whatever there is.
stand_by() {
    local now
    while now=$(state) && [[ $now != ACTIVE ]]; do
        echo "$name is $now"
        case $now in
            NONE) create && continue ;;
            SUSPENDED | FAILED) delete && continue ;;
        esac
        sleep "$seconds"
    done
}

train() {
    local command started failures=0
    command="rm -f ~/dreamer_stop; cd dreamer; export DREAMER_INTERRUPTED_CODE=75 $settings
.venv/bin/python -u -m dreamer_jax.train$(printf ' %q' "$@") || [ -e ~/dreamer_stop ]"
    while true; do
        stand_by
        started=$SECONDS
        if setup && clear_workers && on_all_workers "$command"; then
            return 0
        fi
        if [[ $(state) == ACTIVE ]]; then
            ((SECONDS - started > 3600)) && failures=0
            failures=$((failures + 1))
            echo "failure $failures, at most $retries are met with a new start"
            ((failures <= retries)) || return 1
        else
            echo "$name was taken away"
        fi
    done
}

case ${1:-} in
    train) train "${@:2}" ;;
    create) create ;;
    setup) setup ;;
    status) echo "$name is $(state)" ;;
    stop) on_all_workers "touch ~/dreamer_stop; pkill -TERM -f $training" ;;
    delete) delete ;;
    *) sed -n '2,15s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
