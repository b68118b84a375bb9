#!/usr/bin/env bash
# Runs the checks and the default tests, or only the tests that the arguments select: bash scripts/test.sh [PYTEST ARGUMENT...]
set -euo pipefail
source "$(dirname "$0")/setup.sh"
export OMP_NUM_THREADS=1
if [ $# -eq 0 ]; then
    ruff check .
    ruff format --check .
    mypy dfzsl trainers datasets configs scripts
    bash scripts/lint_imports.sh
    bash scripts/check_words.sh
    # In a separate process, because these tests register trainers that other tests would use too.
    python -m pytest -n auto -q compat/dassl
fi
exec python -m pytest -n auto -q "$@"
