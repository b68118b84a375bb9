#!/usr/bin/env bash
# Base-to-new with ZeroshotCLIP: bash scripts/zsclip/base2new.sh DATASET [SEED...]
source "$(dirname "$0")/../setup.sh" && exec python -m dfzsl.launch base2new --methods ZeroshotCLIP "$@"
