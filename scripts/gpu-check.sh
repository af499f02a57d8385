#!/usr/bin/env bash
# Checks and measures the CUDA engine on a machine with a GPU. Needs the ctq binary (no Rust), the golden folder of this
# repository and python3; PyTorch for the speed of dense products, compute-sanitizer for its part, where they are there.
#
#   scripts/gpu-check.sh [--ctq PATH] [--out DIR] [--device cuda:0] [--quick]
#
# Writes DIR/gpu-check.json and prints a short table last. Exit 0: everything that ran is within its bounds.
set -euo pipefail
exec python3 "$(dirname "$0")/gpu_check.py" "$@"
