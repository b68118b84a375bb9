#!/usr/bin/env bash
# Base-to-new with PromptSRC: bash scripts/promptsrc/base2new.sh DATASET [SEED...]
source "$(dirname "$0")/../setup.sh" && exec python -m dfzsl.launch base2new --methods PromptSRC "$@"
