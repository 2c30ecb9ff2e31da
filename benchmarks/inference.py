"""Speed of an encoder on a CPU: in torch, and exported in float32, float16 and int8.

    python benchmarks/inference.py

All variants alternate on the same cores, with whole batches of uint8 pixels as input and float32 h as output. A turn is
a fifth of a second of runs; its first run is not counted, since threads of the previous turn may still be busy. A rate
is the median over turns of the median of a turn, with one thread or one thread per core, whichever is faster. The
results are those of ResNet-18 at 224 px for single pictures, or with --quick of the tiny encoder at 48 px.

torch runs eagerly, with channels last if that is faster, the others in ONNX Runtime. int8 gains most on processors with
instructions for bytes (VNNI); float16 is for GPUs, and a CPU computes it in float32.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import tyro

from benchmarks.result import publish
from export.compare import open_graph
from export.quantize import to_fp16, to_int8
from export.to_onnx import ExportedModel, to_graph
from training.encoders import Encoder, ResNetEncoder

CORES = torch.get_num_threads()
TURN_S = 0.2


@dataclass(frozen=True)
class Options:
    turns: int = 5
    """Turns of each variant."""
    quick: bool = False
    """The tiny encoder at 48 px only."""


class Case(NamedTuple):
    encoder: str
    size_px: int
    batch: int


LARGE = (Case("resnet18", 224, 1), Case("resnet18", 224, 8))
SMALL = (Case("tiny", 48, 1), Case("tiny", 48, 64), Case("tiny", 32, 64))


def main(options: Options) -> None:
    logging.disable(logging.WARNING)  # hides messages of the exporter and the quantiser
    rows = []
    for case in SMALL[:2] if options.quick else LARGE + SMALL:
        rate = {name: case.batch / seconds for name, seconds in measure(case, options.turns).items()}
        row = {"encoder": case.encoder, "px": case.size_px, "batch": case.batch, **rate}
        rows.append(row | {f"{name} over torch": rate[name] / rate["torch"] for name in ("fp32", "int8")})
    print(f"images a second on {CORES} cores; {vnni()}")
    figures = {"onnx_over_torch": rows[0]["fp32 over torch"], "int8_over_torch": rows[0]["int8 over torch"]}
    publish("inference", rows, figures)


def measure(case: Case, turns: int) -> dict[str, float]:
    """Seconds per batch of each variant, with its fastest layout and thread count."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (case.batch, case.size_px, case.size_px, 3), dtype=np.uint8)
    encoder = ResNetEncoder(case.encoder, 1, case.size_px).eval()
    for module in encoder.modules():  # as after training, since blocks that start as identity would be optimised away
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    graphs = export_variants(encoder, case.size_px)
    variants = []
    for threads in sorted({1, CORES}):
        for layout in (torch.contiguous_format, torch.channels_last):
            variants.append(("torch", eager(copy.deepcopy(encoder).to(memory_format=layout), pixels, threads)))
        for name, content in graphs.items():
            session = open_graph(content, threads)
            variants.append((name, lambda session=session: session.run(["embedding"], {"pixels": pixels})))
    seconds: list[list[float]] = [[] for _ in variants]
    for _ in range(turns):
        for (_, run), medians in zip(variants, seconds, strict=True):
            medians.append(take_turn(run))
    best: dict[str, float] = {}
    for (name, _), medians in zip(variants, seconds, strict=True):
        best[name] = min(best.get(name, float("inf")), median(medians))
    return best


def take_turn(run: Callable[[], object]) -> float:
    """Median seconds of the runs of a turn, at least two."""
    times, end = [], time.perf_counter() + TURN_S
    while len(times) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return median(times[1:])


def export_variants(encoder: Encoder, size_px: int) -> dict[str, bytes]:
    graph = to_graph(encoder, size_px)
    calibration = np.random.default_rng(1).integers(0, 256, (8, size_px, size_px, 3), dtype=np.uint8)
    return {"fp32": graph, "fp16": to_fp16(graph), "int8": to_int8(graph, calibration)}


def eager(encoder: Encoder, pixels: np.ndarray, threads: int) -> Callable[[], torch.Tensor]:
    served = ExportedModel(encoder).eval()

    def run() -> torch.Tensor:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            return served(torch.from_numpy(pixels))

    return run


def vnni() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return "whether the processor has VNNI is unknown"
    flags = set(cpuinfo.read_text().split()) & {"avx512_vnni", "avx_vnni", "amx_int8"}
    return f"the processor has {', '.join(sorted(flags))}" if flags else "the processor has no VNNI"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
