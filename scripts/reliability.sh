#!/usr/bin/env bash
# Runs all reliability tests, also slow ones, and updates the table of docs/reliability.md: bash scripts/reliability.sh
source "$(dirname "$0")/setup.sh" && export OMP_NUM_THREADS=1 &&
    exec python -m pytest -n auto -q -m '' tests/reliability --faults docs/reliability.md "$@"
