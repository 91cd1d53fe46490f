#!/usr/bin/env bash
#SBATCH --job-name=llmkit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Trains a recipe under Slurm, one task a rank:
#
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 launch/slurm.sh RECIPE [key=value ...]
#
# 300 s before the time limit Slurm sends SIGUSR1 to this script: the ranks save and stop, and the job is queued again,
# as it is when a rank or a node was lost. Ask for more time there (--signal=B:USR1@900) where a step and its save take
# longer. What a recipe, its data or its model cannot do is not tried again; nor is a run that somebody asked to stop
# (scancel --signal=TERM JOB).
#
# The environment: PYTHON (python), INTERFACE (such as ib0), RESTARTS (3: how often a job that failed is queued again);
# with DOCTOR=1 it runs `llmkit doctor --cluster` in place of a recipe, with the words that follow (--disk FOLDER).
set -euo pipefail

PYTHON=${PYTHON:-python}
job=${SLURM_JOB_ID:?fix: start it by sbatch}
(($#)) || [[ -n ${DOCTOR-} ]] || { echo "llmkit: error: no recipe is named; fix: sbatch slurm.sh RECIPE [key=value ...]" >&2 && exit 2; }

stage=("${@:1:1}")
for word in "${@:2}"; do # not what `run` alone knows, such as --accept KEY
    [[ $word == -* || $word != *=* ]] || stage+=("$word")
done

# Where the run stands, in one line of JSON; its exit status is the run's own.
status() { "$PYTHON" -m llmkit status "${stage[@]}" --json; }

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
if [[ -n ${INTERFACE-} ]]; then
    # this script runs on the first host of the job
    MASTER_ADDR=$("$PYTHON" -c '
import psutil, socket, sys
mine = [a.address for a in psutil.net_if_addrs().get(sys.argv[1], ()) if a.family == socket.AF_INET]
print(mine[0]) if mine else sys.exit(f"llmkit: error: {sys.argv[1]} has no address here; fix: name another INTERFACE")
' "$INTERFACE")
    export GLOO_SOCKET_IFNAME=$INTERFACE TP_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME="=$INTERFACE"
fi
MASTER_PORT=${MASTER_PORT:-$((20000 + job % 20000))}
export MASTER_ADDR MASTER_PORT

# What each task does: Slurm's word for its rank is put the way torch reads it.
# shellcheck disable=SC2016 # expanded in the task
task='export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
exec "$@"'

if [[ -n ${DOCTOR-} ]]; then
    srun --export=ALL bash -c "$task" rank "$PYTHON" -m llmkit doctor --cluster "$@"
    exit
fi

limit=''
# Not `kill` to srun, which turns SIGTERM into SIGKILL of its tasks; without --batch it is for the steps alone.
trap 'limit=1; scancel --signal=TERM "$job"' USR1

before=$(status) || [[ -n $before ]] || exit 2 # it says itself what is wrong with the recipe
srun --kill-on-bad-exit=1 --export=ALL bash -c "$task" rank "$PYTHON" -m llmkit run "$@" &
step=$! code=0
while :; do
    code=0
    wait "$step" || code=$?
    kill -0 "$step" 2>/dev/null || break # else it was the signal that ended the wait
done

told=0
after=$(status) || told=$?
# a launcher does not pass every exit status on: the run's own status is the truth, unless it is an older one
[[ $after != "$before" ]] || told=$code
echo "job $job, start ${SLURM_RESTART_COUNT:-0}: $after (exit status $told, srun's $code)"

case $told in
0 | 2 | 3 | 4 | 5) ;;                           # done; or what another try cannot mend
75) [[ -z $limit ]] || scontrol requeue "$job" ;; # out of time: on from where it was
*) ((${SLURM_RESTART_COUNT:-0} >= ${RESTARTS:-3})) || scontrol requeue "$job" ;;
esac
exit "$told"
