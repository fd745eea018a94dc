#!/usr/bin/env bash
# In a container: a node that DeepSpeed's launcher reaches by ssh, on port ${1:-2222}, as the container's user.
# Further arguments are sshd's: tools/node.sh 2222 -o LogLevel=VERBOSE
#
# Keys only: those in ~/.ssh/authorized_keys. Commands that come in get this shell's PATH, as they read no profile.
set -euo pipefail

own=$(mktemp -d)
ssh-keygen -q -t ed25519 -N '' -f "$own/host"
exec "$(command -v sshd || echo /usr/sbin/sshd)" -D -e -p "${1:-2222}" -f /dev/null -h "$own/host" \
    -o PidFile="$own/pid" -o UsePAM=no -o PasswordAuthentication=no -o KbdInteractiveAuthentication=no \
    -o SetEnv="PATH=$PATH" "${@:2}"
