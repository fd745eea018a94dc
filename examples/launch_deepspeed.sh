#!/usr/bin/env bash
# With DeepSpeed's launcher, from the first node, over ssh. The same command again goes on where the run stopped.
# The hosts need the same environment at the same path. Arguments are overrides: launch_deepspeed.sh run.steps=200
set -euo pipefail
cd "$(dirname "$0")/.."

exec deepspeed --hostfile examples/hosts --module megatron_stable.pretrain --config examples/10b.yaml "$@"
