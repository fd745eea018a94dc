#!/usr/bin/env bash
# An example with torchrun, on every node at once:
#
#   HEAD=node1 examples/launch_torchrun.sh 10b                # as many nodes of 8 GPUs as it needs
#   HEAD=node1 NODES=4 RANKS=32 examples/launch_torchrun.sh 10b run.steps=200
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/example.sh "$@"

gpus=${GPUS:-8}
nodes=${NODES:-$(((ranks + gpus - 1) / gpus))}
have $((nodes * gpus)) "$nodes nodes of $gpus GPUs (NODES, GPUS)"

exec "$bin/torchrun" --nnodes "$nodes" --nproc-per-node "$gpus" --rdzv-backend c10d \
    --rdzv-endpoint "${HEAD:?name the first node}:${PORT:-29500}" \
    -m megatron_stable.pretrain --config "$config" "${overrides[@]}"
