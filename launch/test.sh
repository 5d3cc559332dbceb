#!/usr/bin/env bash
# Run the tests in the project's environment; arguments go to pytest, e.g. launch/test.sh -m "not slow".
# With --cluster, jobs go to the cluster that sbatch reaches (tests/cluster).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ "${#CONTAINER[@]}" -eq 0 ] || die "DISTPRUNE_CONTAINER is ${DISTPRUNE_CONTAINER}; allowed here: none, as this installs into .venv"
cd "$REPOSITORY"
install
activate
# Two files at a time: a test of one process, or of ranks that wait for each other, leaves a core free. In the order of
# their names, by which the short ones of tests/unit come last: both end at the same time.
exec pytest -n "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
