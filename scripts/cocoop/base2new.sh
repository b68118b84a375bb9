#!/usr/bin/env bash
# Base-to-new with CoCoOp: bash scripts/cocoop/base2new.sh DATASET [SEED...]
source "$(dirname "$0")/../setup.sh" && exec python -m dfzsl.launch base2new --methods CoCoOp "$@"
