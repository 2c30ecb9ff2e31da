#!/usr/bin/env bash
# All benchmarks that need a GPU, within ten minutes. Prints tables; writes a JSON file to $OUT after each measurement.
#
#   benchmarks/gpu.sh            with python3, or PYTHON=...; LIMIT=570 seconds for all of them
#   benchmarks/gpu.sh --quick    a few steps of each, also on a CPU, to show that they run
#
# On a machine without a network, run benchmarks/wheels.sh elsewhere and bring its folder. Other libraries are compared
# if they are installed: uv pip install -r benchmarks/peers.txt. The speed run is benchmarks/speedrun.sh.
set -uo pipefail
cd "$(dirname "$0")/.."
source benchmarks/on_gpu.sh
limit=${LIMIT:-570}
failed=()

measure() { # most seconds, program, its options
  local left=$((limit - SECONDS))
  local most=$(($1 < left ? $1 : left))
  echo "== ${*:2} (at most $most s)"
  [ "$most" -gt 5 ] && timeout "$most" "$python" "benchmarks/${@:2}" "${quick[@]}" || failed+=("$2")
}

quick=("$@")
"$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")'
measure 100 train_step.py
OUT=$OUT/resnet50 measure 120 train_step.py --encoder resnet50 --size-px 224 --batch-size 256
measure 60 gpu_serving.py
measure 50 loss_memory.py
measure 120 stream.py
measure 150 train_peers.py
echo
[ ${#failed[@]} -eq 0 ] && echo "all measured in $SECONDS s" || { echo "failed or timed out: ${failed[*]}"; exit 1; }
