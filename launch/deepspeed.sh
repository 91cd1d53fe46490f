#!/usr/bin/env bash
# Trains a recipe by DeepSpeed's launcher, on this host or on those of a hostfile:
#
#   launch/deepspeed.sh --gpus 8 RECIPE [key=value ...]
#   launch/deepspeed.sh --nodes 2 --gpus 8 --hostfile hosts --interface ib0 RECIPE [key=value ...]
#
# The options are in hosts.sh; DeepSpeed starts nothing again (--restarts is torchrun's). It exits as the run did.
# shellcheck source-path=SCRIPTDIR source=hosts.sh disable=SC2034,SC2154
. "$(dirname "${BASH_SOURCE[0]}")/hosts.sh"

# Fills `launcher` with the command of this host. DeepSpeed reads the number of hosts and ranks from a file of its own.
node_command() {
    ((nodes == 1)) || [[ -n $master && -n $node ]] || fail "$nodes nodes need a hostfile, or --node-rank and --master; fix: give --hostfile"
    ((restarts == 0)) || fail "deepspeed starts no ranks again; fix: use torchrun for --restarts"
    local i slots
    slots=$(mktemp "${TMPDIR:-/tmp}/llmkit-hosts-XXXXXX") # of one run and one user
    # shellcheck disable=SC2064 # this one
    [[ -n $show ]] || trap "rm -f $(printf %q "$slots")" EXIT
    for ((i = 0; i < nodes; i++)); do echo "node-$i slots=$gpus"; done >"$slots"
    launcher=("$PYTHON" -m deepspeed.launcher.runner --hostfile "$slots" --no_ssh --node_rank "${node:-0}")
    launcher+=(--master_addr "${master:-127.0.0.1}" --master_port "$port" --module llmkit "${work[@]}")
}

launch "$@"
