#!/usr/bin/env bash
# Runs the checks and the tests: bash scripts/test.sh [PYTEST ARGUMENTS]
set -euo pipefail
source "$(dirname "$0")/setup.sh"
export OMP_NUM_THREADS=1
ruff check .
mypy dfzsl trainers datasets configs scripts
bash scripts/lint_imports.sh
python -m pytest -n auto -q compat/dassl
exec python -m pytest -n auto -q "$@"
