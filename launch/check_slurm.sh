#!/bin/bash
# Checks launch/slurm.sbatch on a SLURM cluster of two nodes that it starts on this machine, without GPUs; by hand:
#
#     launch/check_slurm.sh            needs slurmctld, slurmd, munge (Debian: apt-get install slurm-wlm munge)
#
# A toy run on two nodes is interrupted twice, by `scontrol requeue` and by the signal that comes before the time limit;
# its losses and its last checkpoint must equal those of a run of two processes that nobody interrupts, bit for bit.
# Everything lives in a temporary folder and ends with the script. Environment: DREAMER_PYTHON (default: python).

set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/sbin:/sbin
if ! python=$(command -v "${DREAMER_PYTHON:-python}"); then
    echo "no program '${DREAMER_PYTHON:-python}': set DREAMER_PYTHON to the python of the environment"
    exit 2
fi
steps=80

for program in munged slurmctld slurmd sbatch srun scontrol squeue; do
    if ! command -v "$program" >/dev/null; then
        echo "SLURM is not installed here ($program is missing); on Debian: apt-get install slurm-wlm munge"
        exit 2
    fi
done

folder=$(mktemp -d /tmp/check_slurm.XXXXXX)
daemons=()
stop() {
    local code=$?
    [[ ${SLURM_CONF:-} ]] && scancel --me --quiet 2>/dev/null && sleep 1
    for daemon in "${daemons[@]}"; do kill "$daemon" 2>/dev/null || true; done
    wait
    if [[ $code == 0 ]]; then
        rm -rf "$folder"
    else
        echo "failed with code $code; logs are in $folder"
    fi
}
trap stop EXIT

seconds() { echo "$(($(date +%s) - began)) s"; }
say() { echo "[$(seconds)] $*"; }
began=$(date +%s)

cat >"$folder/toy.py" <<PYTHON
"""A toy run for the check: sums as documents."""

import json
from pathlib import Path

from dreamer_jax.config import CheckpointConfig, Config, DataConfig, LogConfig, ModelConfig, OptimizerConfig, Source
from dreamer_jax.config import DepthAttentionConfig, ExpertAttentionConfig, RouterConfig, SequenceAttentionConfig
from dreamer_jax.config import TrainConfig

FOLDER = Path("$folder")


def get_config() -> Config:
    rows = [
        json.dumps({"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = {a + b}"})
        for a in range(30)
        for b in range(20)
    ]
    for name, part in (("train", rows[:540]), ("validation", rows[540:])):
        if not (FOLDER / f"{name}.jsonl").exists():
            (FOLDER / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    return Config(
        name="toy",
        out=str(FOLDER / "runs"),
        model=ModelConfig(
            depth=2, width=16, vocab=300,
            sa=SequenceAttentionConfig(query_heads=2, kv_heads=1, head_size=8),
            da=DepthAttentionConfig(head_size=8),
            ea=ExpertAttentionConfig(experts=6, active_experts=2, expert_width=8),
            router=RouterConfig(size=8, attention_experts=3),
        ),
        data=DataConfig(
            sources=(Source("sums", train=("train.jsonl",), validation=("validation.jsonl",)),),
            root=str(FOLDER), prepared=str(FOLDER / "prepared"), context=48,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=3),
        train=TrainConfig(steps=$steps, batch=32, dtype="float32", remat="none", validation_batches=1,
                          validate_every=30),
        checkpoint=CheckpointConfig(every=25, keep=2),
        log=LogConfig(every=1, tensorboard=False),
    )
PYTHON

export JAX_PLATFORMS=cpu
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$folder/compiled}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3
unset XLA_FLAGS

say "two processes without SLURM"
"$python" launch/local.py --processes 2 --devices 1 -- --config "$folder/toy.py" --name plain >"$folder/plain.out" 2>&1

say "munge, slurmctld and two slurmd"
(umask 077 && head -c 128 /dev/urandom >"$folder/munge.key")
munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
    --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" \
    >"$folder/munged.out" 2>&1 &
daemons+=($!)
# Nodes are called by addresses of the loopback interface, so that JAX can reach the first one by its name.
cat >"$folder/slurm.conf" <<CONF
ClusterName=check
SlurmctldHost=localhost
SlurmctldPort=16817
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
NodeName=127.0.0.1 NodeHostname=localhost Port=16821 CPUs=1 State=UNKNOWN
NodeName=127.0.0.2 NodeHostname=localhost Port=16822 CPUs=1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$folder/slurm.conf
mkdir "$folder/state"
slurmctld -D >"$folder/slurmctld.out" 2>&1 &
daemons+=($!)
for node in 127.0.0.1 127.0.0.2; do
    slurmd -D -N "$node" >"$folder/slurmd-$node.out" 2>&1 &
    daemons+=($!)
done

# waits_for SECONDS WHAT COMMAND...: until the command succeeds.
waits_for() {
    local until=$(($(date +%s) + $1)) what=$2
    shift 2
    until "$@" 2>/dev/null; do
        if (($(date +%s) > until)); then
            say "waited in vain for $what"
            exit 1
        fi
        sleep 0.2
    done
}
nodes_idle() { [[ $(sinfo --noheader --Node --states idle --format %N | wc -l) == 2 ]]; }
state_is() { [[ $(squeue --noheader --jobs "$job" --format %T) == "$1" ]]; }
gone() { state=$(squeue --noheader --jobs "$job" --format %T) && [[ -z $state ]]; }
progress() { wc -l <"$folder/runs/slurm/metrics.jsonl"; }
reached() { (($(progress) >= $1)); }
# A requeued job would wait for two minutes. In the second of its requeue its old credential is still being revoked.
soon() { sleep 3 && scontrol update "JobId=$job" StartTime=now; }

waits_for 30 "two idle nodes" nodes_idle
job=$(DREAMER_PYTHON=$python sbatch --parsable --nodes 2 --ntasks-per-node 1 --gpus-per-node 0 --time 30 \
    --output "$folder/job.out" launch/slurm.sbatch --config "$folder/toy.py" --name slurm)
say "job $job submitted"
waits_for 120 "20 steps" reached 20
scontrol requeue "$job"
say "scontrol requeue after $(progress) records"
waits_for 60 "the requeued job" state_is PENDING
soon
before=$(progress)
waits_for 120 "steps of the restarted job" reached $((before + 15))
scancel --batch --signal=USR1 "$job"
say "SIGUSR1 to the script, as before the time limit, after $(progress) records"
waits_for 60 "the requeued job" state_is PENDING
soon
waits_for 180 "the end of job $job" gone
say "job $job has ended; its output:"
grep -E "^job|^resuming|: saved step|^time limit|^trained|^slurmstepd.*JOB|ended with code" "$folder/job.out" |
    sed -E -e "s#$folder#FOLDER#g" -e 's/^/    /'

"$python" - "$folder/toy.py" <<'PYTHON'
"""Compare the two runs, bit for bit."""

import json
import sys

import jax
import numpy as np

from dreamer_jax.config import load
from dreamer_jax.sharding import make_mesh
from dreamer_jax.training.checkpoint import Checkpoints
from dreamer_jax.training.step import init_state


def records(name):
    lines = (config(name).run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("speed/")} for line in lines]


def config(name):
    return load(sys.argv[1], ["--name", name])


def arrays(name):
    with Checkpoints(config(name).run_dir) as checkpoints:
        return jax.tree.leaves(checkpoints.restore(like, checkpoints.latest)), checkpoints.latest


_, like = init_state(config("plain"), make_mesh(config("plain").mesh))
(plain, last), (slurm, last_of_slurm) = arrays("plain"), arrays("slurm")
assert last == last_of_slurm == config("plain").train.steps, (last, last_of_slurm)
assert records("plain") == records("slurm"), "the records differ"
for a, b in zip(plain, slurm, strict=True):
    np.testing.assert_array_equal(a, b)
losses = [record["train/loss"] for record in records("slurm") if "train/loss" in record]
print(f"    {len(losses)} training losses ({losses[0]:.6f} to {losses[-1]:.6f}) and all other figures: equal")
print(f"    checkpoint of step {last}, {len(plain)} arrays with the optimizer's: equal")
PYTHON
say "an interrupted run in SLURM equals an uninterrupted one without it"
