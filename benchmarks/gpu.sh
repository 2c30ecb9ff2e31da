#!/usr/bin/env bash
# All training benchmarks that need a GPU, within ten minutes. Prints tables; writes JSON to $OUT (default benchmarks/out).
#
#   benchmarks/gpu.sh                   with the environment's python, or PYTHON=...
#
# The speed run takes 15 minutes and is a separate command:
#   time python training/pretrain.py --preset cifar-fast
# Other libraries are compared if they are installed: uv pip install -r benchmarks/peers.txt
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
failed=()

measure() { # time limit in seconds, program, its options
  echo "== ${*:2}"
  timeout "$1" "$python" "benchmarks/${@:2}" || failed+=("$2")
}

measure 120 train_step.py
measure 60 loss_memory.py
measure 170 stream.py --images 1000 --seconds 15
measure 230 train_peers.py
echo
[ ${#failed[@]} -eq 0 ] && echo "all measured" || { echo "failed or timed out: ${failed[*]}"; exit 1; }
