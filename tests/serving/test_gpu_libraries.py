"""Whether ONNX Runtime's CUDA provider finds its libraries in the environment; this needs no GPU."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

PACKAGES = Path(sysconfig.get_path("platlib"))
PROVIDER = PACKAGES / "onnxruntime" / "capi" / "libonnxruntime_providers_cuda.so"
DRIVERS = {"libcuda.so.1"}  # comes with a GPU's driver

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not PROVIDER.exists() or not shutil.which("ldd"),
    reason="for onnxruntime-gpu on Linux with ldd",
)


def test_every_library_of_the_cuda_provider_is_in_the_environment_except_the_drivers():
    folders = sorted({str(path.parent) for path in PACKAGES.glob("nvidia/**/*.so*")})
    environment = os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(folders)}
    needed = subprocess.run(["ldd", PROVIDER], env=environment, capture_output=True, text=True, check=True).stdout
    assert "libcublas.so" in needed
    assert set(re.findall(r"(\S+) => not found", needed)) <= DRIVERS
    assert list(PACKAGES.glob("nvidia/**/libcudnn.so.9")), "ONNX Runtime loads cuDNN when it meets a convolution"
