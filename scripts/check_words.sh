#!/usr/bin/env bash
# Checks spelling and the word list scripts/dialect.txt: bash scripts/check_words.sh
set -euo pipefail
source "$(dirname "$0")/setup.sh"
# README.md and the other pages of docs/ follow when they are rewritten.
paths=(dfzsl trainers datasets configs scripts tests docs/architecture.md docs/api.md CONTRIBUTING.md)
status=0
codespell "${paths[@]}" || status=1
if grep -rnwiE -f <(sed -E '/^#/d; s/ +#.*//' scripts/dialect.txt) --include='*.'{py,pyi,yaml,md,sh,css} "${paths[@]}"; then
    echo "error: replace these words by the standard terms in scripts/dialect.txt" >&2
    status=1
fi
exit $status
