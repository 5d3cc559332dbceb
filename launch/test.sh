#!/usr/bin/env bash
# Run the tests in the project's environment; arguments go to pytest, e.g. launch/test.sh -m "not slow".
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$REPOSITORY"
install
activate
exec pytest "$@"
