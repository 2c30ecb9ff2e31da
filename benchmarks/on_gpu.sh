# Sourced by gpu.sh and speedrun.sh: sets $python and $OUT, and installs benchmarks/wheels aside where tyro is missing.
python=${PYTHON:-python3}
if ! "$python" -c "import tyro" 2>/dev/null; then
  aside=$(mktemp -d)
  "$python" -m pip install --quiet --no-index --no-deps --find-links benchmarks/wheels --target "$aside" \
    tyro docstring-parser typeguard || { echo "run benchmarks/wheels.sh where there is a network, and bring its folder"; exit 1; }
  export PYTHONPATH="$aside${PYTHONPATH:+:$PYTHONPATH}"
fi
export OUT=${OUT:-benchmarks/out}
