#!/usr/bin/env bash
# Runs the checks and the default tests; with PYTEST ARGUMENTS, only the tests that these select.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
export OMP_NUM_THREADS=1
if [ $# -eq 0 ]; then
    ruff check .
    ruff format --check .
    mypy dfzsl trainers datasets configs scripts
    bash scripts/lint_imports.sh
    # In a process of its own: these tests register trainers that other tests would try as well.
    python -m pytest -n auto -q compat/dassl
fi
exec python -m pytest -n auto -q "$@"
