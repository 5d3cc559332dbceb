#!/usr/bin/env bash
# Train on several machines without SLURM, from one of them: a rank per GPU (or per slot), one folder on all machines.
#   launch/multinode.sh -H HOSTFILE CONFIG [key=value ...]
#       the deepspeed CLI over pdsh and ssh; a line of HOSTFILE is: NAME slots=RANKS
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
[[ $PWD != *[[:space:]]* ]] || die "this folder, $PWD, has a space, which DeepSpeed's line to pdsh does not quote; allowed with -H: one without"
command -v pdsh >/dev/null || die "pdsh is missing; install it with: apt-get install -y pdsh"
# pdsh hands over little of the environment; the deepspeed CLI reads the rest from a file of this name in $HOME or here.
settings=$(mktemp -d)
trap 'rm -rf "$settings"' EXIT
env | grep -E '^(PATH|LD_LIBRARY_PATH|OMP_NUM_THREADS|TOKENIZERS_PARALLELISM|DISTPRUNE_|WANDB_|HF_|NCCL_|FI_|CUDA_HOME|TORCH_|PYTORCH_|XDG_CACHE_HOME|.*_proxy)' \
    >"$settings/.deepspeed_env"
if [ -n "$accelerator" ]; then echo "DS_ACCELERATOR=$accelerator" >>"$settings/.deepspeed_env"; fi
# --quiet, or it logs these settings, in which there are keys.
DS_ENV_FILE=$settings/.deepspeed_env deepspeed --quiet --hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}" \
    --no_local_rank --module distprune train "$@"
