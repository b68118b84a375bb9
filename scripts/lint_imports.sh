#!/usr/bin/env bash
# Checks the import rules in pyproject.toml: bash scripts/lint_imports.sh
# import-linter reads one folder, so the packages are copied into the layout of an installation.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
cp -r dfzsl pyproject.toml "$tree"
cp -r trainers datasets configs compat/dassl/dassl/utils/safe_pickle "$tree/dfzsl"
cd "$tree"
lint-imports --no-cache --no-logo
