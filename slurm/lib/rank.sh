#!/usr/bin/env bash
# LAUNCHER=srun: one training process. Arguments are its own.
set -euo pipefail
trap "" USR1
source "$(dirname "${BASH_SOURCE[0]}")/caches.sh"
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS NODE_RANK=$SLURM_NODEID
export LOCAL_WORLD_SIZE=$PROCESSES
# What copies the output must outlive the signals that end the process.
exec > >(
  trap "" USR1 TERM INT
  exec tee -a "$START_DIRECTORY/ranks/$RANK.log"
) 2>&1
exec python -m pretrain.train "$@"
