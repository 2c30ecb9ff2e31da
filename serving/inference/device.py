"""On which hardware an encoder runs: on a GPU in one lane, or on the CPU in a lane per core.

An encoder whose GPU fails, at the start or later, runs on the CPU from then on, unless TWINVIEW_GPU is `required`.
"""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from export.artifact import Bundle, BundleError
from serving.inference.encoder import CPU, OnnxEncoder, has_accelerator
from serving.inference.lane import (
    MAX_PROCESSES,
    START_S,
    BatchResult,
    Lane,
    LaneLost,
    Part,
    PrivateCopy,
    ProcessLane,
    run_batch,
)

log = logging.getLogger("twinview")

GPU_LIMIT_S = 60.0
MOST_LOSSES = 2  # in a row, before the GPU is given up: memory of other programs may be freed, a broken context is not


def open_lanes(bundle: Bundle, cores: int, max_work: int, gpu_required: bool = False) -> Sequence[Lane]:
    """Raises BundleError."""
    graph = PrivateCopy(bundle)
    problem = None
    if has_accelerator():
        encoder = OnnxEncoder(bundle, 1, graph.read())
        if encoder.providers[0] != CPU:
            return [GpuLane(bundle, graph, encoder, cores, max_work, gpu_required)]
        problem = encoder.gpu_problem
    if gpu_required:
        raise BundleError(
            f"TWINVIEW_GPU is required, and {bundle.card.id} runs on no GPU ({problem or 'there is none'})"
        )
    count = min(cores, MAX_PROCESSES)
    threads = cores // count  # one core each is efficient
    lanes = [ProcessLane(bundle.card, graph, threads, max_work, problem) for _ in range(count)]
    for lane in lanes:
        lane.wait()
    return lanes


class GpuLane:
    """Runs batches in a thread, on a GPU; after its failure in a process, on all cores."""

    def __init__(
        self,
        bundle: Bundle,
        graph: PrivateCopy,
        encoder: OnnxEncoder,
        cores: int,
        max_work: int,
        gpu_required: bool,
    ):
        self._bundle, self._graph, self._cores, self._max_work = bundle, graph, cores, max_work
        self._gpu, self._required = encoder.providers[0], gpu_required
        self._encoder: OnnxEncoder | None = encoder
        self._thread = ThreadPoolExecutor(1, "encoder")
        self._cpu: ProcessLane | None = None
        self._losses, self._reason = 0, ""

    @property
    def provider(self) -> str:
        return CPU if self._cpu else self._gpu

    @property
    def gpu_problem(self) -> str | None:
        return self._reason if self._cpu else None

    async def __call__(self, parts: list[Part]) -> BatchResult:
        """parts: on the GPU pixels only"""
        if self._cpu:
            return await self._cpu(parts)
        if self._encoder is None:
            raise LaneLost("the encoder could not be loaded again")
        call = asyncio.get_running_loop().run_in_executor(self._thread, run_batch, parts, self._encoder.rows)
        try:
            async with asyncio.timeout(GPU_LIMIT_S):
                result = await call
        except TimeoutError:
            self._losses = MOST_LOSSES
            self._reason = f"the encoder has not answered for {GPU_LIMIT_S:g} s"
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            self._losses += 1
            self._reason = f"{type(error).__name__}: {error}"
        else:
            self._losses = 0
            return result
        raise LaneLost(self._reason)

    async def restart(self) -> None:
        if self._cpu:
            return await self._cpu.restart()
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._thread, self._encoder = (
            ThreadPoolExecutor(1, "encoder"),
            None,
        )  # frees its memory before it is loaded again
        reason = self._reason
        if self._losses < MOST_LOSSES or self._required:
            try:
                return await self._load_again()
            except (BundleError, TimeoutError) as error:
                reason += f"; then it could not be loaded again: {error}"
        if self._required:
            raise BundleError(f"{self._gpu} does not work any more ({reason}); restart the service")
        cpu = ProcessLane(self._bundle.card, self._graph, self._cores, self._max_work)
        await asyncio.to_thread(cpu.wait)
        self._cpu, self._reason = cpu, reason
        card = self._bundle.card.id
        log.error("%s failed, so %s runs on the CPU until the service is restarted: %s", self._gpu, card, reason)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._cpu:
            self._cpu.close()

    async def _load_again(self) -> None:
        """Raises BundleError, and TimeoutError when the GPU does not answer."""

        def load() -> OnnxEncoder:
            return OnnxEncoder(self._bundle, 1, self._graph.read())

        async with asyncio.timeout(START_S):
            encoder = await asyncio.get_running_loop().run_in_executor(self._thread, load)
        if encoder.providers[0] != self._gpu:
            raise BundleError(encoder.gpu_problem or f"ONNX Runtime chose {encoder.providers[0]}")
        self._encoder = encoder
