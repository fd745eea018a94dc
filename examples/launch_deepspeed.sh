#!/usr/bin/env bash
# An example with DeepSpeed's launcher, from the first node, over ssh:
#
#   examples/launch_deepspeed.sh 10b                          # on the nodes that examples/hosts names
#   HOSTFILE=hosts RANKS=32 examples/launch_deepspeed.sh 10b run.steps=200
#
# The nodes have the same environment and the same data at the same paths. The same command again goes on where the run
# stopped. nohup and & leave it behind when the terminal closes.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/example.sh "$@"

hosts=${HOSTFILE:-examples/hosts}
[[ -f $hosts ]] || fail "the hostfile $hosts is not there: HOSTFILE names another"
have "$(awk -F slots= '/^[^#]/ {n += $2} END {print n + 0}' "$hosts")" "the slots in $hosts"

exec "$bin/deepspeed" --hostfile "$hosts" --module megatron_stable.pretrain --config "$config" "${overrides[@]}"
