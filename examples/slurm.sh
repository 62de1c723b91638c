#!/bin/bash
# Tunes on an array of machines, then trains on several at once, under Slurm:
#
#     export NOMADAM_STORAGE=postgresql://user@host/nomadam  # a database that all machines reach
#     sbatch --array=0-7 --gpus-per-node=1 examples/slurm.sh tune --budget 32
#     sbatch --nodes=2 --gpus-per-node=4 examples/slurm.sh train --set optimizer.lr=1e-2
#
# Both can be sent again after a time limit: what has ended is not trained again, and what was
# stopped goes on from its checkpoint. Change the lines of #SBATCH to your cluster's.
#SBATCH --job-name=nomadam
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail

study=${NOMADAM_STUDY:-gpt2_pretraining.small_openwebtext}
runs=${NOMADAM_RUNS:-$PWD/runs} # on a file system that all machines share
command=${1:-}
shift || true

case $command in
tune) # each task of the array takes trials from the one storage
    exec nomadam tune "$study" --storage "${NOMADAM_STORAGE:?the address of a database}" \
        --workers "${NOMADAM_WORKERS:-1}" --out "$runs/tune-$study" "$@"
    ;;
train) # a launcher on each machine, which starts a process for each of its GPUs
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    exec srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
        --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$first:29500" \
        --max-restarts=3 --shutdown-timeout=100 \
        -m nomadam run "$study" --optimizer sgd_sai --out "$runs/train-$study" "$@"
    ;;
*)
    echo "usage: sbatch examples/slurm.sh tune|train [OPTION OF nomadam ...]" >&2
    exit 2
    ;;
esac
