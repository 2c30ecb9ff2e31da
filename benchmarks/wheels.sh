#!/usr/bin/env bash
# Gathers in benchmarks/wheels what gpu.sh and speedrun.sh need on a machine without a network that has Python 3.12,
# torch, torchvision, Lightning and the usual scientific packages: tyro and what it needs, 0.3 MB.
set -euo pipefail
cd "$(dirname "$0")/.."
${PYTHON:-python3} -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 -d benchmarks/wheels \
  tyro docstring-parser typeguard
ls benchmarks/wheels
