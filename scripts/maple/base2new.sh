#!/usr/bin/env bash
# Base-to-new with MaPLe: bash scripts/maple/base2new.sh DATASET [SEED...]
source "$(dirname "$0")/../setup.sh" && exec python -m dfzsl.launch base2new --methods MaPLe "$@"
