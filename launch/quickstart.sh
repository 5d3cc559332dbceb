#!/usr/bin/env bash
# From nothing to a pruned model in minutes: install, make a task and a model, train dense, prune once, prune gradually.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ "${#CONTAINER[@]}" -eq 0 ] || die "DISTPRUNE_CONTAINER is ${DISTPRUNE_CONTAINER}; allowed here: none, as this installs into .venv"
cd "$REPOSITORY"
install
activate

run=runs/quickstart
rm -rf "$run"
gpus=$(count_gpus)
ranks=$((gpus == 1 ? 1 : 2))
sparsity=0.95

say() { printf '\n== %s\n' "$*"; }

say "1/5 make a synthetic text task and an untrained model: $run/task"
python -m distprune.synthetic "$run/task"
say "2/5 train the dense model on $ranks ranks, ZeRO-2"
launch/local.sh -n "$ranks" configs/quickstart_dense.yaml
say "3/5 prune it once to $sparsity, without training"
distprune oneshot "$run/dense/final" "$run/oneshot" pruning.sparsity="$sparsity"
# The result is the last line: DeepSpeed may print before it.
distprune eval "$run/oneshot" configs/quickstart_gradual.yaml | tail -n 1 >"$run/oneshot.json"
say "4/5 prune it gradually to $sparsity with distillation: student ZeRO-2, teacher sharded at ZeRO-3"
launch/local.sh -n "$ranks" configs/quickstart_gradual.yaml pruning.sparsity="$sparsity"
say "5/5 compare"
python -m distprune.quickstart "$run"
