# Sourced by torchrun.sh and deepspeed.sh, which say how one node is started (`node_command`); this file says on which
# hosts, passes a request to stop on to the ranks, and ends with the exit status of the run itself.
# shellcheck shell=bash disable=SC2034,SC2154
#
#   --nodes N         hosts (1)
#   --gpus G          ranks a host, one for each GPU (1)
#   --hostfile FILE   one host a line, `NAME slots=G`; the first N are used, over ssh. Every host has the same paths:
#                     this folder, the Python environment, the working folder with the recipe, its data and its `out`
#   --node-rank I     without a hostfile: start only this host's part, the I-th from 0
#   --master ADDRESS  where the first host is reached; its name in the hostfile, or its address on the interface
#   --port P          the rendezvous (29500)
#   --interface IF    the network interface that rendezvous and collectives use, such as eth0 or ib0
#   --restarts R      how often torchrun starts the ranks again after one has died (0)
#   --doctor          in place of a run: llmkit doctor --cluster, with the words that follow, such as --disk FOLDER
#   --print           show the command of each host, and start nothing
#
# The environment: PYTHON (python), and SSH (ssh -o BatchMode=yes), which reaches a host. Other hosts get what concerns
# Python, CUDA, NCCL, gloo and caches, and no tokens or keys: log in to the Hub there (hf auth login).
set -euo pipefail

PYTHON=${PYTHON:-python}
read -ra SSH <<<"${SSH:-ssh -o BatchMode=yes}"
nodes=1 gpus=1 hostfile='' node='' master='' port=29500 interface='' restarts=0 show='' doctor='' given=() run=() work=() stage=()

fail() {
    printf 'llmkit: error: %s\n' "$1" >&2
    exit 2
}

options() {
    while (($#)); do
        case $1 in
        --print) show=1 && shift && continue ;;
        --doctor) doctor=1 && given+=(--doctor) && shift && break ;;
        --nodes) nodes=${2-} ;;
        --gpus) gpus=${2-} ;;
        --hostfile) hostfile=${2-} ;;
        --node-rank) node=${2-} ;;
        --master) master=${2-} ;;
        --port) port=${2-} ;;
        --interface) interface=${2-} ;;
        --restarts) restarts=${2-} ;;
        -*) fail "$1 is no option; fix: see the head of ${BASH_SOURCE[0]}" ;;
        *) break ;;
        esac
        [[ -n ${2-} ]] || fail "$1 has no value; fix: give one"
        case $1 in --nodes | --gpus | --port | --restarts | --node-rank)
            [[ $2 =~ ^(0|[1-9][0-9]{0,5})$ ]] || fail "$1 $2 is no number; fix: give one"
            ;;
        esac
        case $1 in --nodes | --gpus | --port | --restarts | --interface) given+=("$1" "$2") ;; esac
        shift 2
    done
    run=("$@") work=(run "$@") stage=("${@:1:1}")
    local word
    for word in "${@:2}"; do # not what `run` alone knows, such as --accept KEY
        [[ $word == -* || $word != *=* ]] || stage+=("$word")
    done
    [[ -z $doctor ]] || work=(doctor --cluster "$@")
    ((${#run[@]})) || [[ -n $doctor ]] || fail "no recipe is named; fix: $(basename "$0") [options] RECIPE [key=value ...]"
}

# The IPv4 address of a network interface of this host.
address() {
    "$PYTHON" -c '
import psutil, socket, sys
found = psutil.net_if_addrs()
mine = [a.address for a in found.get(sys.argv[1], ()) if a.family == socket.AF_INET]
print(mine[0]) if mine else sys.exit("llmkit: error: no address on %s here; fix: use one of %s" % (sys.argv[1], ", ".join(sorted(found))))
' "$1"
}

bind() {
    [[ -n $interface ]] || return 0
    local_address=ADDRESS_ON_$interface
    [[ -n $show ]] || local_address=$(address "$interface") || exit 2
    export GLOO_SOCKET_IFNAME=$interface TP_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME="=$interface"
}

# Where the run stands, in one line of JSON; its exit status is the run's own.
status() { "$PYTHON" -m llmkit status "${stage[@]}" --json; }

# SIGTERM to the ranks below a process. Not to the launchers: torchrun kills ranks that take more than 30 s to save,
# deepspeed kills them at once.
ask_to_stop() {
    local child
    # shellcheck disable=SC2013 # the file holds words, not lines
    for child in $(cat "/proc/$1/task/"*/children 2>/dev/null); do
        if tr '\0' '\n' <"/proc/$child/environ" 2>/dev/null | grep -q '^LOCAL_RANK='; then
            kill -TERM "$child" 2>/dev/null || true
        else
            ask_to_stop "$child"
        fi
    done
}

# Waits for processes, through signals; the exit status is that of the first that failed.
await() {
    local pid code again result=0
    for pid in "$@"; do
        while :; do
            code=0
            wait "$pid" || code=$?
            kill -0 "$pid" 2>/dev/null || break # else it was a signal to us that ended the wait
        done
        if ((code > 128)); then # or it ended just then: what it said is still to be had
            again=0
            wait "$pid" 2>/dev/null || again=$?
            ((again == 127)) || code=$again
        fi
        ((result)) || result=$code
    done
    return "$result"
}

# A command as a shell would take it, with what binds it to the interface.
shown() {
    [[ -z $interface ]] || printf '%q ' "GLOO_SOCKET_IFNAME=$interface" "TP_SOCKET_IFNAME=$interface" "NCCL_SOCKET_IFNAME==$interface"
    printf '%q ' "${@:1:$#-1}"
    printf '%q\n' "${*: -1}"
}

# This host's part. Tethered to the host that launched it: it stops when that one closes our standard input.
here() {
    local_address=''
    bind
    [[ -n $local_address && ${node:-0} == 0 && -z $master ]] && master=$local_address
    node_command
    if [[ -n $show ]]; then
        shown "${launcher[@]}"
        return
    fi
    setsid "${launcher[@]}" </dev/null & # away from the terminal, whose Ctrl-C is for us to pass on
    local child=$! code=0 tether=''
    trap 'ask_to_stop $child' TERM INT HUP
    if [[ -n ${LLMKIT_TETHERED-} ]]; then
        exec 3<&0
        # holds neither stream: ssh waits for all that write to them, and this outlives us until it closes our input
        { cat <&3 && kill -TERM $$; } >/dev/null 2>&1 &
        tether=$!
    fi
    await "$child" || code=$?
    trap '' TERM INT HUP # there is nobody left to ask, and how it ended is yet to be said
    [[ -z $tether ]] || kill "$tether" 2>/dev/null || true
    return "$code"
}

# What the hosts need to know of our environment; no secrets, for a command line can be read by all who are on a host.
environment() {
    local name
    for name in $(compgen -e); do
        case $name in
        *TOKEN* | *SECRET* | *PASSWORD* | *_KEY) ;;
        PYTHON | PYTHONPATH | PATH | LD_LIBRARY_PATH | CUDA_* | DS_* | GLOO_* | HF_* | LLMKIT_* | NCCL_* | OMP_* | TORCH_* | TP_*)
            printf '%q ' "$name=${!name}"
            ;;
        esac
    done
}

everywhere() {
    local -a hosts pids=()
    local i hold part
    mapfile -t hosts < <(sed -e 's/#.*//' -e '/^[[:space:]]*$/d' -e 's/^[[:space:]]*//' -e 's/[[:space:]].*//' "$hostfile")
    ((${#hosts[@]} >= nodes)) || fail "$hostfile names ${#hosts[@]} hosts, and there are to be $nodes; fix: --nodes ${#hosts[@]}, or name more"
    if [[ -z $master && -n $interface && -z $show ]]; then
        part=$(printf 'PYTHON=%q; %s; address %q' "$PYTHON" "$(declare -f address)" "$interface")
        master=$("${SSH[@]}" "${hosts[0]}" "bash -c $(printf %q "$part")" </dev/null) || exit 2
    fi
    master=${master:-${hosts[0]}}
    if [[ -n $show ]]; then
        for ((node = 0; node < nodes; node++)); do
            echo "# ${hosts[node]}" && here
        done
        return
    fi
    # opened here and not by the parts: one that starts late would find no name any more
    hold=$(mktemp -u) && mkfifo "$hold" && exec 9<>"$hold"
    exec 8<"$hold" && rm -f "$hold"
    for ((i = 0; i < nodes; i++)); do
        part="cd $(printf %q "$PWD") && env $(environment) PYTHON=$(printf %q "$PYTHON") LLMKIT_TETHERED=1 "
        part+="bash $(printf '%q ' "$(realpath "$0")" --node-rank "$i" --master "$master" "${given[@]}" "${run[@]}")"
        setsid "${SSH[@]}" "${hosts[i]}" "$part" <&8 8<&- 9>&- &
        pids+=($!)
    done
    exec 8<&-
    trap 'exec 9>&-' TERM INT HUP # the parts see their standard input end
    await "${pids[@]}"
}

launch() {
    options "$@"
    local before after code=0 told=0
    if [[ -n $show || -n $doctor || -n ${LLMKIT_TETHERED-} ]]; then
        if [[ -n $hostfile ]]; then everywhere; else here; fi
        exit
    fi
    before=$(status) || [[ -n $before ]] || exit 2 # it says itself what is wrong with the recipe
    if [[ -n $hostfile ]]; then
        everywhere || code=$?
    else
        LLMKIT_EXIT_FILE=$(mktemp -u) && export LLMKIT_EXIT_FILE # the first rank that fails leaves its status there
        here || code=$?
        if ((code)) && [[ -f $LLMKIT_EXIT_FILE ]]; then code=$(<"$LLMKIT_EXIT_FILE"); fi
        rm -f "$LLMKIT_EXIT_FILE"
    fi
    after=$(status) || told=$?
    # a launcher says 1 of every fault, and 0 of a clean stop: the run's own status is the truth, unless it is an older one
    ((code)) && [[ $after == "$before" ]] && exit "$code"
    echo "$after" >&2
    exit "$told"
}
