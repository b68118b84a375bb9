#!/usr/bin/env bash
# DFZSL with one part changed at a time: bash scripts/dfzsl/ablation.sh [DATASET [SEED...]]
source "$(dirname "$0")/../setup.sh" && exec python -m dfzsl.launch base2new --methods TextTeacherMix,FLPT@virtual,CoOp@virtual,DFZSL,DFZSL:paper,DFZSL+all "$@"
