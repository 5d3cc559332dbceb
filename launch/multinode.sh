#!/usr/bin/env bash
# Train on several machines without SLURM, from one of them: a rank per GPU (or per slot), one folder on all machines.
#   launch/multinode.sh -H HOSTFILE CONFIG [key=value ...]
#       the deepspeed CLI over pdsh and ssh; a line of HOSTFILE is: NAME slots=RANKS. Keys of wandb and the hub are taken
#       from where wandb login and hf auth login leave them, and not from this environment.
#   launch/multinode.sh -t HEAD:PORT -n NODES -r NODE -p RANKS CONFIG [key=value ...]
#       torchrun, to be started on each machine by yourself: NODE counts from 0, and machine 0 is HEAD
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage="usage: launch/multinode.sh -H HOSTFILE CONFIG [key=value ...], or -t HEAD:PORT -n NODES -r NODE -p RANKS CONFIG ..."
hostfile='' head='' nodes='' node='' ranks=''
while getopts ":H:t:n:r:p:h" option; do
    case $option in
        H) hostfile=$OPTARG ;;
        t) head=$OPTARG ;;
        n) nodes=$OPTARG ;;
        r) node=$OPTARG ;;
        p) ranks=$OPTARG ;;
        h) echo "$usage" && exit 0 ;;
        *) die "unknown option -${OPTARG}; $usage" ;;
    esac
done
shift $((OPTIND - 1))
[ $# -ge 1 ] || die "no CONFIG given; $usage"
accelerator=${DS_ACCELERATOR:-} # as given: a machine without a GPU may start ranks on others that have some
activate
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [ -n "$head" ]; then
    [[ $head == *:* && -n $nodes && -n $node && -n $ranks ]] || die "-t needs HEAD:PORT, -n, -r and -p; $usage"
    exec "${CONTAINER[@]}" torchrun --nnodes "$nodes" --node-rank "$node" --nproc-per-node "$ranks" \
        --master-addr "${head%:*}" --master-port "${head##*:}" -m distprune train "$@"
fi
[ "${#CONTAINER[@]}" -eq 0 ] || die "DISTPRUNE_CONTAINER is ${DISTPRUNE_CONTAINER}; allowed with -H: none (-t takes one)"
[ -r "$hostfile" ] || die "the hostfile ${hostfile:-(none given)} cannot be read; $usage"
for argument in "$@"; do
    [[ $argument != *[\|\&\;\<\>\(\)\$\`\\\'\"]* ]] \
        || die "$argument has characters of the shell that pdsh starts; allowed with -H: such values within CONFIG"
done
[[ $PWD != *[[:space:]\|\&\;\<\>\(\)\$\`\\\'\"]* ]] \
    || die "this folder, $PWD, has a space or a character of the shell, which DeepSpeed's line to pdsh does not quote; allowed with -H: one without"
command -v pdsh >/dev/null || die "pdsh is missing; install it with: apt-get install -y pdsh"
# pdsh hands over little of the environment; the deepspeed CLI reads the rest from a file of this name in $HOME or here,
# and writes it into command lines, which all users of the machines can read: no keys.
settings=$(mktemp -d)
trap 'rm -rf "$settings"' EXIT
wanted='^(PATH|LD_LIBRARY_PATH|OMP_NUM_THREADS|TOKENIZERS_PARALLELISM|CUDA_HOME|XDG_CACHE_HOME|(DISTPRUNE|WANDB|HF|NCCL|FI|TORCH|PYTORCH)_[A-Za-z0-9_]*|[A-Za-z]+_proxy)='
is_secret() {
    case ${1%%=*} in
        TOKENIZERS_PARALLELISM | HF_HUB_DISABLE_IMPLICIT_TOKEN | *_PATH | *_FILE) return 1 ;;
        *API_KEY* | *TOKEN* | *SECRET* | *PASSWORD*) return 0 ;;
    esac
    [[ ${1#*=} == *://*@* ]]
}
while IFS= read -r -d '' setting; do
    if ! [[ $setting =~ $wanted ]]; then continue; fi
    if is_secret "$setting"; then
        echo "distprune: ${setting%%=*} is not handed to the other machines, where all users could read it; it has to be" \
            "known there: by wandb login or hf auth login, or from a start-up file of the shell" >&2
    elif [[ $setting != *$'\n'* ]]; then
        echo "$setting"
    fi
done < <(env -0) >"$settings/.deepspeed_env"
if [ -n "$accelerator" ]; then echo "DS_ACCELERATOR=$accelerator" >>"$settings/.deepspeed_env"; fi
unset "${!MLFLOW_@}" # DeepSpeed hands these over by itself
DS_ENV_FILE=$settings/.deepspeed_env deepspeed --quiet --hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}" \
    --no_local_rank --module distprune train "$@"
