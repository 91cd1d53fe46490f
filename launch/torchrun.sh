#!/usr/bin/env bash
# Trains a recipe by torchrun, on this host or on those of a hostfile:
#
#   launch/torchrun.sh --gpus 8 RECIPE [key=value ...]
#   launch/torchrun.sh --nodes 2 --gpus 8 --hostfile hosts --interface ib0 RECIPE [key=value ...]
#
# The options are in hosts.sh. It exits as the run did: 0 done, 75 stopped and resumable, 6 peers, and so on.
# shellcheck source-path=SCRIPTDIR source=hosts.sh disable=SC2034,SC2154
. "$(dirname "${BASH_SOURCE[0]}")/hosts.sh"

# Fills `launcher` with the command of this host.
node_command() {
    launcher=("$PYTHON" -m torch.distributed.run --nproc-per-node "$gpus" --max-restarts "$restarts")
    if ((nodes == 1)); then
        launcher+=(--standalone)
    else
        # c10d, not static: the agents of all hosts start their ranks again together
        [[ -n $master && -n $node ]] || fail "$nodes nodes need a hostfile, or --node-rank and --master; fix: give --hostfile"
        local host=0
        ((node == 0)) && host=1
        launcher+=(--nnodes "$nodes" --node-rank "$node" --rdzv-backend c10d --rdzv-endpoint "$master:$port")
        launcher+=(--rdzv-id "llmkit-$port" --rdzv-conf "is_host=$host,join_timeout=600")
    fi
    [[ -z $local_address ]] || launcher+=(--local-addr "$local_address")
    launcher+=(-m llmkit "${work[@]}")
}

launch "$@"
