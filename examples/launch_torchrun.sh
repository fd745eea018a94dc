#!/usr/bin/env bash
# With torchrun, on every node at once: HEAD=node1 examples/launch_torchrun.sh, or NODES=2 for fewer than 8 nodes.
# Arguments are overrides: launch_torchrun.sh run.steps=200
set -euo pipefail
cd "$(dirname "$0")/.."

exec torchrun --nnodes "${NODES:-8}" --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "${HEAD:?name the first node}:29500" \
    -m megatron_stable.pretrain --config examples/10b.yaml "$@"
