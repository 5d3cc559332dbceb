#!/usr/bin/env bash
# Train on this machine through the deepspeed CLI: a rank per GPU, or gloo ranks on the CPU where there is none.
#   launch/local.sh [-n RANKS] CONFIG [key=value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage="usage: launch/local.sh [-n RANKS] CONFIG [key=value ...]"
ranks=
while getopts ":n:h" option; do
    case $option in
        n) ranks=$OPTARG ;;
        h) echo "$usage" && exit 0 ;;
        *) die "unknown option -${OPTARG}; $usage" ;;
    esac
done
shift $((OPTIND - 1))
[ $# -ge 1 ] || die "no CONFIG given; $usage"
activate

gpus=$(count_gpus)
if [ "$gpus" -gt 0 ]; then
    ranks=${ranks:-$gpus}
    [[ $ranks =~ ^[0-9]+$ && $ranks -ge 1 && $ranks -le $gpus ]] || die "-n is $ranks; allowed: 1 to the $gpus GPUs here"
    [[ ${CUDA_VISIBLE_DEVICES:-0} =~ ^[0-9]+(,[0-9]+)*$ ]] ||
        die "CUDA_VISIBLE_DEVICES is $CUDA_VISIBLE_DEVICES; allowed: numbers of GPUs, by which the deepspeed CLI knows them"
    # The deepspeed CLI keeps to CUDA_VISIBLE_DEVICES only where no number of ranks is given.
    devices=$(echo "${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((ranks - 1)))}" | cut -d, -f "1-$ranks")
    unset CUDA_VISIBLE_DEVICES
    where=(--include "localhost:$devices")
else
    ranks=${ranks:-1}
    [[ $ranks =~ ^[0-9]+$ && $ranks -ge 1 ]] || die "-n is $ranks; allowed: a number from 1"
    where=(--num_accelerators "$ranks")
fi
# One thread too many on a rank costs more than the rank gains: share the cores out.
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
port=${MASTER_PORT:-$("${CONTAINER[@]}" python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}

# The deepspeed CLI passes signals on to one process after the other, or not at all. It runs in a session of its own,
# and this script hands one signal to all ranks: they save and stop, with status 75. The second time all are killed.
setsid "${CONTAINER[@]}" deepspeed --quiet "${where[@]}" --no_local_rank --master_port "$port" --module distprune train "$@" &
session=$!
asked=
pass_on() {
    if [ -n "$asked" ] || ! "${CONTAINER[@]}" python "$REPOSITORY/launch/pass_on.py" "$1" "$session"; then
        "${CONTAINER[@]}" python "$REPOSITORY/launch/pass_on.py" KILL "$session" all || true
    fi
    asked=1
}
trap 'pass_on TERM' INT TERM HUP
trap 'pass_on USR1' USR1
# A signal ends a wait, and not the run.
while kill -0 "$session" 2>/dev/null; do
    wait "$session" || true
done
wait "$session"
