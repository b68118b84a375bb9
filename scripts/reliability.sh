#!/usr/bin/env bash
# Tries every fault, the slow ones too, and remakes the table of docs/reliability.md
source "$(dirname "$0")/setup.sh" && export OMP_NUM_THREADS=1 &&
    exec python -m pytest -n auto -q -m '' tests/reliability --faults docs/reliability.md "$@"
