"""GPUs that fail, at the start or later. There is none here: a fake one computes on the CPU until it breaks."""

import asyncio
import logging
import threading

import numpy as np
import pytest

from export.artifact import BundleError
from serving.errors import NotReady
from serving.inference import device
from serving.inference import served as served_module
from serving.inference.batcher import Batcher
from serving.inference.device import open_lanes
from serving.inference.encoder import CPU, OnnxEncoder
from serving.inference.health import Health

GPU = "CUDAExecutionProvider"
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
NO_MEMORY = RuntimeError("CUDA error 2: out of memory")


class Gpu:
    """What happens to the encoder at its next loads and runs; None for nothing."""

    def __init__(self):
        self.loads: list[Exception | None] = []
        self.runs: list[Exception | threading.Event | None] = []
        self.loaded = 0


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    state = Gpu()

    class Fake(OnnxEncoder):
        def __init__(self, bundle, threads=None, graph=None):
            state.loaded += 1
            error = state.loads.pop(0) if state.loads else None
            super().__init__(bundle, threads, graph)
            self.gpu_problem, self.kind = (str(error), CPU) if error else (None, GPU)

        providers = property(lambda self: [self.kind, CPU] if self.kind == GPU else [CPU])

        def _open(self, *arguments):
            self.kind = CPU
            super()._open(*arguments)

        def rows(self, pixels):
            if self.kind == GPU and state.runs and (event := state.runs.pop(0)):
                if isinstance(event, Exception):
                    raise event
                event.wait()
            return super().rows(pixels)

    monkeypatch.setattr(device, "OnnxEncoder", Fake)
    monkeypatch.setattr(device, "has_accelerator", lambda: True)
    monkeypatch.setattr("serving.inference.batcher.RESTART_S", 0)
    return state


def served(bundle, use, required: bool = False):
    """use(lane, batch) as a coroutine, with the lane of this bundle."""

    async def run():
        (lane,) = open_lanes(bundle, 1, 2**20, required)
        batch = Batcher([lane])
        try:
            await use(lane, batch)
        finally:
            batch.close()

    asyncio.run(run())


async def works(batch, means) -> None:
    np.testing.assert_allclose((await batch(PIXELS)).vectors, means(PIXELS), atol=1e-5)


def test_a_gpu_that_works_is_used(gpu, bundle, means):
    async def use(lane, batch):
        await works(batch, means)
        assert (lane.provider, lane.gpu_problem) == (GPU, None)

    served(bundle, use)


def test_one_lost_batch_is_run_again_on_the_gpu(gpu, bundle, means):
    async def use(lane, batch):
        for _ in range(3):  # never twice in a row
            gpu.runs[:] = [NO_MEMORY]
            await works(batch, means)
            assert lane.provider == GPU

    served(bundle, use)
    assert gpu.loaded == 4


@pytest.mark.slow
def test_a_gpu_that_fails_twice_in_a_row_is_replaced_by_the_cpu(gpu, bundle, means, caplog):
    async def use(lane, batch):
        gpu.runs[:] = [NO_MEMORY] * 2
        with pytest.raises(NotReady, match="out of memory"):
            await batch(PIXELS)
        await works(batch, means)
        assert lane.provider == CPU and "out of memory" in lane.gpu_problem
        await Health(batch, 32).check()

    with caplog.at_level(logging.ERROR, "twinview"):
        served(bundle, use)
    assert f"{GPU} failed, so {bundle.card.id} runs on the CPU until the service is restarted" in caplog.text


@pytest.mark.slow
def test_a_gpu_whose_context_is_broken_is_replaced_by_the_cpu_and_loses_no_request(gpu, bundle, means):
    """An error of CUDA that stays: the encoder cannot even be loaded again."""

    async def use(lane, batch):
        gpu.runs[:] = [RuntimeError("CUDA error 700: illegal memory access")]
        gpu.loads[:] = [RuntimeError("CUDA error 700 again")]
        await works(batch, means)
        assert lane.provider == CPU
        assert "illegal memory access; then it could not be loaded again: CUDA error 700 again" in lane.gpu_problem

    served(bundle, use)


@pytest.mark.slow
def test_a_gpu_that_hangs_is_replaced_by_the_cpu(gpu, bundle, means, monkeypatch):
    monkeypatch.setattr(device, "GPU_LIMIT_S", 0.1)
    stop = threading.Event()

    async def use(lane, batch):
        gpu.runs[:] = [stop]
        await works(batch, means)
        assert lane.provider == CPU and "has not answered for 0.1 s" in lane.gpu_problem
        stop.set()

    served(bundle, use)


def test_where_a_gpu_is_required_its_failure_is_not_ready(gpu, bundle, means):
    async def use(lane, batch):
        gpu.runs[:] = [RuntimeError("CUDA error 700")]
        gpu.loads[:] = [RuntimeError("again")] * 1000
        with pytest.raises(NotReady, match=f"{GPU} does not work any more"):
            await Health(batch, 32).check()
        gpu.loads.clear()  # it works again
        while lane._encoder is None:
            await asyncio.sleep(0.01)
        await works(batch, means)
        assert lane.provider == GPU

    served(bundle, use, required=True)


@pytest.mark.slow
def test_a_gpu_that_fails_at_the_start_is_replaced_by_the_cpu_unless_it_is_required(gpu, bundle, means):
    gpu.loads[:] = [NO_MEMORY] * 2

    async def use(lane, batch):
        await works(batch, means)
        assert lane.provider == CPU and lane.gpu_problem == str(NO_MEMORY)

    served(bundle, use)
    with pytest.raises(BundleError, match=r"TWINVIEW_GPU is required, .* runs on no GPU \(CUDA error 2: out of memory"):
        open_lanes(bundle, 1, 2**20, gpu_required=True)


def test_a_gpu_may_be_required_where_there_is_none(bundle):
    with pytest.raises(BundleError, match=r"TWINVIEW_GPU is required, .* runs on no GPU \(there is none\)"):
        open_lanes(bundle, 1, 2**20, gpu_required=True)


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_the_encoder_says_why_it_does_not_run_on_the_gpu(bundle, monkeypatch):
    monkeypatch.setattr("serving.inference.encoder._accelerations", lambda: [[GPU, CPU], [CPU]])
    assert OnnxEncoder(bundle).gpu_problem == "ONNX Runtime could not use CUDAExecutionProvider"


def test_readiness_and_metrics_say_that_the_gpu_has_failed(http):
    assert http.get("/readyz").json()["gpu_problem"] is None
    assert "\ntwinview_gpu_failed 0.0\n" in http.get("/metrics").text
    lane = http.app.state.engine._encoders.default.batch.lanes[0]
    lane.gpu_problem = "no memory"
    assert http.get("/readyz").json()["gpu_problem"] == "no memory"
    assert "\ntwinview_gpu_failed 1.0\n" in http.get("/metrics").text


@pytest.mark.parametrize(("setting", "required"), [("", False), ("auto", False), ("required", True)])
def test_the_setting_reaches_the_encoder(serve, monkeypatch, setting, required):
    monkeypatch.setenv("TWINVIEW_GPU", setting)
    lanes, asked = served_module.open_lanes, []

    def open_lanes(*arguments):
        asked.append(arguments[-1])
        return lanes(*arguments)

    monkeypatch.setattr(served_module, "open_lanes", open_lanes)
    serve()
    assert asked == [required]
