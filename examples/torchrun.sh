#!/bin/sh
# minilm-distill on several machines with torchrun. Start this script on every machine, with the same options:
#
#     NODES=2 GPUS=8 HEAD=host1:29500 examples/torchrun.sh --teacher ... --output-dir /shared/run ...
#
# HEAD is one of the machines and a free port. --output-dir is on a disk that all machines share. If a process ends,
# torchrun starts all of them again, and they continue from the newest checkpoint.
set -eu
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # otherwise new processes may wait for the addresses of ended ones
exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --rdzv-backend c10d --rdzv-endpoint "$HEAD" \
    --max-restarts "${RESTARTS:-3}" -m minilm_kernels.distill "$@" --resume-from-checkpoint
