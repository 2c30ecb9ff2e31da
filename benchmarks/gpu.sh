#!/usr/bin/env bash
# All measurements of training that want a GPU, inside ten minutes: tables here, JSON in $OUT (benchmarks/out by default).
#
#   benchmarks/gpu.sh                   with the environment's python, or PYTHON=...
#
# The speed run takes a quarter of an hour and is a command of its own:
#   time python training/pretrain.py --preset cifar-fast
# Other libraries take part where they are installed: uv pip install -r benchmarks/peers.txt
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
failed=()

measure() { # seconds at most, program, its options
  echo "== ${*:2}"
  timeout "$1" "$python" "benchmarks/${@:2}" || failed+=("$2")
}

measure 120 train_step.py
measure 60 loss_memory.py
measure 170 stream.py --images 1000 --seconds 15
measure 230 train_peers.py
echo
[ ${#failed[@]} -eq 0 ] && echo "all measured" || { echo "failed, or took too long: ${failed[*]}"; exit 1; }
