#!/usr/bin/env bash
# CIFAR-10 as fast as possible: short runs of several recipes, then the best one in full, in calls of limited length.
#
#   benchmarks/speedrun.sh scouts     50 epochs of each recipe of screen.py; repeat until it says that all are done
#   benchmarks/speedrun.sh winner     the best recipe in full; repeat until it says that it is finished
#
# LIMIT=570 seconds for a call. DATA=cifar10, or a folder with train/ and test/. PYTHON=python3. What is done is kept under
# runs/, and the seconds of all calls of the winner are added up from the start of the process.
set -uo pipefail
cd "$(dirname "$0")/.."
source benchmarks/on_gpu.sh
data=${DATA:-cifar10} limit=${LIMIT:-570} clock=runs/speedrun.seconds options=runs/screen/best_options.txt
scale=(${SCALE:---encoder resnet18}) # of the scouts: SCALE="--encoder tiny --pictures 200 --batch-size 20" for a trial

case ${1:-} in
scouts)
  timeout --signal=INT "$limit" "$python" benchmarks/screen.py --data "$data" --epochs "${EPOCHS:-50}" --seeds 1 "${scale[@]}"
  [ $? -eq 0 ] && echo "all scouts are done; next: benchmarks/speedrun.sh winner" || echo "not done: run it again"
  ;;
winner)
  [ -f "$options" ] || { echo "there is no $options: run benchmarks/speedrun.sh scouts first"; exit 1; }
  mapfile -t recipe <"$options"
  timeout --signal=INT "$((limit - 30))" "$python" training/pretrain.py --data "$data" --name speedrun --resume "${recipe[@]}"
  status=$?
  mkdir -p runs && echo $(($(cat "$clock" 2>/dev/null || echo 0) + SECONDS)) >"$clock"
  echo "seconds in all calls: $(cat "$clock")"
  [ $status -eq 0 ] || { echo "not finished: run it again"; exit 0; }
  for k in 200 10; do "$python" training/evaluate.py runs/speedrun --data "$data" --k "$k"; done
  ;;
*)
  sed -n '2,9p' "$0"
  exit 1
  ;;
esac
