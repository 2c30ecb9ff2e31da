"""The set-up of a training process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pytorch_lightning.plugins.precision import MixedPrecision

from training.device import mixed_precision

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="for runs on a CPU, of glibc")
def test_a_run_on_a_cpu_keeps_the_memory_that_a_step_has_freed():
    code = """
import resource, sys, torch
from training import device
if sys.argv[1] == "kept":
    device.prepare()
for _ in range(12):  # the first ones find out how much is wanted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step = [torch.empty(mib * 2**20, dtype=torch.uint8).fill_(1) for mib in (64, 16, 24, 32)]
    del step
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {}
    for way in ("kept", "usual"):
        command = [sys.executable, "-W", "ignore", "-c", code, way]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=True)
        faults[way] = int(done.stdout)
    assert faults["kept"] < 100 < faults["usual"]  # pages that the system had to give for 136 MiB


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_on_a_gpu_the_precision_is_the_trainers_so_that_nothing_is_compiled_twice():
    ours = mixed_precision(torch.device("cuda"), torch.nn.Identity())
    assert vars(ours) == vars(MixedPrecision("bf16-mixed", "cuda").autocast_context_manager())
