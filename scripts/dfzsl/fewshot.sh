#!/usr/bin/env bash
# DFZSL and its data-free baselines: bash scripts/dfzsl/fewshot.sh [DATASET [SEED...]]
source "$(dirname "$0")/../setup.sh" && exec python -m dfzsl.launch fewshot "$@"
