#!/usr/bin/env bash
# Compare all methods: bash scripts/compare.sh DATASET|all [SEED...] [--image-prompts]
source "$(dirname "$0")/setup.sh" && exec python -m dfzsl.launch base2new --methods all "$@"
