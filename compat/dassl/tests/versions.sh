#!/usr/bin/env bash
# Runs the tests of this package, built as a wheel, with other versions of torch: versions.sh 2.4.1 2.15.0 ...
# Each gets an environment of its own (gigabytes, where torch brings CUDA). PYTHON names another Python.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1
"${PYTHON:-python3}" -m pip wheel --quiet --no-deps --wheel-dir "$work" .
for torch in "$@"; do
    "${PYTHON:-python3}" -m venv "$work/$torch"
    "$work/$torch/bin/python" -m pip install --quiet "torch==$torch" tensorboard "$work"/dassl-*.whl pytest
    # From elsewhere, so that it is the wheel that is tested.
    cp -r tests "$work/tests" && rm -f "$work/tests/versions.sh"
    (cd "$work/tests" && "$work/$torch/bin/python" -m pytest -q -p no:cacheprovider .)
    rm -rf "${work:?}/$torch" "$work/tests"
done
