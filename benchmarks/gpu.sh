#!/usr/bin/env bash
# All that needs a GPU, in one call: bash benchmarks/gpu.sh [TABLE.md]
# First CUDA's correctness, then each benchmark against the plain way beside it, into one file.
set -euo pipefail
source "$(dirname "$0")/../scripts/setup.sh"
table=${1:-gpu.md}
python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "error: no GPU that torch can use")'
python -m pytest -q tests/test_cuda.py
{
    nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
    for precision in fp32 amp bf16; do
        echo "## prompts, $precision"
        python benchmarks/prompts.py --device cuda --precision "$precision"
        echo "## extract, $precision"
        python benchmarks/extract.py --device cuda --precision "$precision"
    done
    echo "## pipeline"
    python benchmarks/pipeline.py --device cuda
} | tee "$table"
