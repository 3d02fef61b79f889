#!/bin/bash
# minilm-distill as a SLURM job: sbatch examples/slurm.sh --teacher ... --output-dir /shared/run ...
#
# One process per GPU. Two minutes before the time limit, the run saves a checkpoint and ends, and the job is queued
# again. It continues from its newest checkpoint, also on another number of nodes.
#SBATCH --job-name=minilm-distill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
set -euo pipefail

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

status=0
# A minute after the first task has ended, SLURM ends the others: all of them save, or wait for one that has failed.
# shellcheck disable=SC2016  # the variables of each task
srun --wait=60 bash -c '
    export WORLD_SIZE=$SLURM_NTASKS RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    exec minilm-distill "$@" --resume-from-checkpoint
' minilm-distill "$@" || status=$?

if [ "$status" = 138 ]; then  # 128 + SIGUSR1
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
