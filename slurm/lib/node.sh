#!/usr/bin/env bash
# On each node, once: torchrun, which starts the node's training processes. Arguments are theirs.
set -euo pipefail
# The signal is for the training processes, which finish their step; it would kill torchrun, and them with it.
trap "" USR1
source "$(dirname "${BASH_SOURCE[0]}")/caches.sh"
local_address=()
# Rank 0 of the agents meets the others: torchrun would guess from host names where that is, which an address or a second
# interface's name in MASTER_ADDR defeats. Many nodes that load from a cold file system do not come within its minute.
is_host=false
[ "$SLURM_NODEID" != 0 ] || is_host=true
# Without it workers of other nodes look for the full name of this host, which some of them cannot resolve.
getent ahosts "$SLURMD_NODENAME" >/dev/null && local_address=(--local-addr "$SLURMD_NODENAME")
exec python -m torch.distributed.run --nnodes "$TRAIN_NODES" --nproc-per-node "$PROCESSES" --max-restarts 0 \
  --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-conf "is_host=$is_host,read_timeout=600" --rdzv-id "$SLURM_JOB_ID.$SLURM_RESTART_COUNT" \
  "${local_address[@]}" --log-dir "$START_DIRECTORY/ranks/$SLURMD_NODENAME" --tee 3 --role "$SLURMD_NODENAME:" -m pretrain.train "$@"
