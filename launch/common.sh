# Sourced by the scripts beside it: where the repository and its environment are, and how a failure is said.
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$REPOSITORY/.venv}

# What this site needs before anything runs: module load, conda activate, NCCL_SOCKET_IFNAME, proxies ...
SITE=${DISTPRUNE_SITE:-$REPOSITORY/site.sh}
# shellcheck source=/dev/null
site() { source "$SITE"; }
# Without the caller's arguments, and with unset variables as modules and environments expect them: empty.
if [ -f "$SITE" ]; then
    set +u
    site
    set -u
fi

# What every program is run by, e.g. DISTPRUNE_CONTAINER="apptainer exec --nv distprune.sif" in the site file; none: .venv
read -ra CONTAINER <<<"${DISTPRUNE_CONTAINER:-}"

die() {
    echo "$(basename "$0"): error: $*" >&2
    exit 2
}

# A fresh machine: name what is missing in one line, with the command that installs it.
check_prerequisites() {
    local python=${PYTHON:-python3}
    command -v "$python" >/dev/null || die "python3 is missing; install it with: apt-get install -y python3 python3-venv python3-dev"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$("$python" --version) is too old; Python 3.11 or newer is needed (set PYTHON to its path)"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || die "Python's venv module is missing; install it with: apt-get install -y python3-venv"
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
        die "Python's headers are missing; install them with: apt-get install -y python3-dev"
    command -v git >/dev/null || die "git is missing; install it with: apt-get install -y git"
    command -v g++ >/dev/null || die "a C++ compiler is missing; install it with: apt-get install -y g++"
}

# Make the environment and install the package into it, once; again where pyproject.toml changed.
install() {
    local stamp=$VENV/.distprune-installed
    if [ -f "$stamp" ] && cmp -s "$REPOSITORY/pyproject.toml" "$stamp"; then
        return
    fi
    check_prerequisites
    [ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
    echo "installing distprune into $VENV (a few minutes the first time) ..."
    # The version that is tested. Where pip's index holds CPU builds, it saves gigabytes on a machine without a GPU.
    if ! command -v nvidia-smi >/dev/null; then
        "$VENV/bin/pip" install --quiet torch==2.13.0
    fi
    "$VENV/bin/pip" install --quiet --editable "$REPOSITORY[dev]"
    cp "$REPOSITORY/pyproject.toml" "$stamp"
}

# GPUs to use: those that this machine has or CUDA_VISIBLE_DEVICES names; none where DS_ACCELERATOR=cpu asks for that.
count_gpus() {
    if [ "${DS_ACCELERATOR:-cuda}" = cpu ]; then
        echo 0
        return
    fi
    local present
    present=$({ command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null; } | grep -c '^GPU' || true)
    if [ "$present" -eq 0 ] || [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then
        echo "$present"
        return
    fi
    # As CUDA reads it: -1 ends the list.
    echo "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | awk '/^$|^-/ { exit } { n++ } END { print n + 0 }'
}

activate() {
    if [ "${#CONTAINER[@]}" -eq 0 ]; then
        if [ -x "$VENV/bin/python" ]; then
            export PATH=$VENV/bin:$PATH
        elif [ "$VENV" != "$REPOSITORY/.venv" ]; then
            die "VENV is $VENV, which has no bin/python; allowed: an environment's folder, or leave it out"
        elif ! (cd / && python -c 'import distprune') 2>/dev/null; then # else an environment is active already
            die "$VENV is missing; make it with: launch/quickstart.sh, or activate an environment that distprune is installed in"
        fi
    fi
    # DeepSpeed asks for an accelerator by name where it finds none, and says so at length.
    if [ "$(count_gpus)" -eq 0 ]; then
        if [ -z "${DS_ACCELERATOR:-}" ] && [ "${SLURM_GPUS_ON_NODE:-0}" != 0 ]; then
            die "SLURM gave this job $SLURM_GPUS_ON_NODE GPUs a node, and nvidia-smi and CUDA_VISIBLE_DEVICES show none on $(hostname); allowed: a node where they do, or DS_ACCELERATOR set to cpu or cuda"
        fi
        export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
    fi
}
