"""Images a second of the served encoder, by the session that the service itself opens: on a GPU if there is one.

    python benchmarks/gpu_serving.py

ResNet-18 and ResNet-50 at 224 px with random weights, exported in float32, float16 and int8. The provider that ONNX
Runtime chose is shown. A rate is the median of five turns of about a second, in which the precisions alternate.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hashlib
import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import tyro

from benchmarks.inference import export_variants
from benchmarks.result import publish
from export.artifact import ModelCard, Preprocessing, encoder_id, save_bundle
from serving.inference.encoder import OnnxEncoder
from training.encoders import ResNetEncoder

TURNS = 5


@dataclass(frozen=True)
class Options:
    encoders: tuple[str, ...] = ("resnet18", "resnet50")
    size_px: int = 224
    batches: tuple[int, ...] = (1, 8, 32)
    """Images in a batch, at most 32."""
    quick: bool = False
    """The tiny encoder at 48 px, and short turns."""


def main(options: Options) -> None:
    logging.disable(logging.WARNING)  # hides messages of the exporter and the quantiser
    if options.quick:
        options = Options(("tiny",), 48, (1, 32), True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.encoders:
            graphs = export_variants(ResNetEncoder(name, 1, options.size_px).eval(), options.size_px)
            encoders = {kind: opened(Path(folder) / kind, graph, name, kind, options) for kind, graph in graphs.items()}
            rows += [measure(name, encoders, batch, options) for batch in options.batches]
    publish("gpu_serving", rows, {"images_per_s_fp16": rows[-1]["fp16"]})


def measure(name: str, encoders: dict[str, OnnxEncoder], batch: int, options: Options) -> dict:
    side, seconds = options.size_px, 0.05 if options.quick else 1.0
    pixels = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)
    rates: dict[str, list[float]] = {kind: [] for kind in encoders}
    for _ in range(TURNS):
        for kind, encoder in encoders.items():
            rates[kind].append(rate(encoder, pixels, seconds))
    provider = sorted({encoder.providers[0] for encoder in encoders.values()})
    row = {"encoder": name, "px": side, "batch": batch, "provider": ", ".join(provider)}
    return row | {kind: median(of_turns) for kind, of_turns in rates.items()}


def opened(folder: Path, graph: bytes, name: str, precision: str, options: Options) -> OnnxEncoder:
    digest, preprocessing = hashlib.sha256(graph).hexdigest(), Preprocessing(options.size_px)
    id, dimension = encoder_id(name, digest, preprocessing), ResNetEncoder(name, 1, options.size_px).dimension
    card = ModelCard(id, name, dimension, preprocessing, digest, precision=precision)
    return OnnxEncoder(save_bundle(folder, graph, card))


def rate(encoder: OnnxEncoder, pixels: np.ndarray, seconds: float) -> float:
    """Images a second over about so many seconds."""
    done, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or not done:
        encoder(pixels)
        done += len(pixels)
    return done / elapsed if elapsed else float("inf")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
