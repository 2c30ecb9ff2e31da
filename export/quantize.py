"""Make an exported bundle smaller and faster: fp16, or int8 calibrated on your own pictures.

    python export/quantize.py runs/NAME/encoder --to int8 --data ~/Pictures

The new bundle stands beside the old one (encoder-int8/) and is served like it. Its card says what was gained and lost.

int8 is static (weights and activations), in the QDQ form: weights per output channel, activations uint8 between the
least and the greatest value that the calibration pictures give (ONNX Runtime's quantize_static). Pooling and the
classifier's head stay float32. fp16 is for GPUs: a CPU computes it in float32 again, and only the file is smaller.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hashlib
import logging
import os
import sys
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import tyro
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16

from export.artifact import Bundle, BundleError, encoder_id, load_bundle, save_bundle
from export.compare import BATCH, NEIGHBOURS, Judge, images_per_s
from export.to_onnx import probe_of, serialised
from training.data import store
from training.data.sources import DataError, open_source

CALIBRATION = 256  # pictures; more changed nothing on photographs
LOSS_LIMIT = 0.005  # of kNN accuracy, above which layers are given back their float32
KEPT_LIMIT = 0.9  # of the nearest pictures, below which they are where there are no labels; 0.95 on photographs
FLOAT = ("first", "first and last stage")  # what is given back, one after the other


@dataclass(frozen=True)
class QuantizeSettings:
    """Make an exported bundle smaller and faster, and say what that costs."""

    bundle: tyro.conf.Positional[Path]
    """The exported encoder's or classifier's folder: runs/NAME/encoder."""
    to: Literal["fp16", "int8"] = "int8"
    """int8 for CPUs, fp16 for GPUs."""
    data: str = "shapes"
    """Pictures like those that will be embedded: a folder, a .zip, shards, a torchvision name, or shapes. They
    calibrate int8, and show what is lost: kNN accuracy where they have labels, always the neighbours kept."""
    limit: int = 5000
    """At most so many pictures are compared; of labelled ones, a fifth as many again are asked about."""
    out: Path | None = None
    """The new bundle's folder; by default BUNDLE-int8 or BUNDLE-fp16."""

    def __post_init__(self):
        if not self.limit > NEIGHBOURS:
            raise ValueError(f"--limit must be above {NEIGHBOURS}, not {self.limit}")


def quantize(settings: QuantizeSettings) -> Bundle:
    """raises BundleError, DataError, ValueError"""
    bundle = load_bundle(settings.bundle)
    card, graph = bundle.card, bundle.graph.read_bytes()
    if card.precision != "fp32":
        raise BundleError(f"{settings.bundle} is {card.precision} already: give the bundle that it was made of")
    source = open_source(settings.data)
    train, test = store.load(source, card.preprocessing, "train"), None
    if any(picture.split == "test" and picture.label is not None for picture in source.pictures):
        test = store.load(source, card.preprocessing, "test")
    if len(train) <= NEIGHBOURS:
        raise DataError(f"{settings.data} has {len(train)} pictures: to compare neighbours takes over {NEIGHBOURS}")
    judge = Judge(graph, train, test, settings.limit)
    if settings.to == "fp16":
        made, kept = to_fp16(graph), "none"
        lost = judge(made)
    else:
        known = np.random.default_rng(0).permutation(judge.rows)[:CALIBRATION]  # none of those that are asked about
        pixels = train.pixels[np.sort(known)]
        made, kept, lost = to_int8_within(graph, pixels, judge)
    rates = images_per_s({"original": graph, settings.to: made}, card.preprocessing.size_px)
    digest = hashlib.sha256(made).hexdigest()
    figures = {name: value for name, value in card.figures.items() if name != "parity_error"}
    figures["quantized"] = {
        "of": card.id,
        "data": source.name,
        "bytes": len(made),
        "bytes_original": len(graph),
        "images_per_s": rates[settings.to],
        "images_per_s_original": rates["original"],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "float_layers": kept,
        **lost,
    }
    new = replace(
        card,
        id=encoder_id(f"{card.architecture}-{settings.to}", digest, card.preprocessing),
        sha256=digest,
        figures=figures,
        probe=probe_of(made, card.preprocessing.size_px),
        precision=settings.to,
    )
    folder = settings.bundle.resolve()
    return save_bundle(settings.out or folder.with_name(f"{folder.name}-{settings.to}"), made, new)


def to_fp16(graph: bytes) -> bytes:
    """Weights and arithmetic in float16; pixels stay uint8, and what comes out float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights below float16's least: they become that
        return serialised(convert_float_to_float16(onnx.load_from_string(graph), keep_io_types=True))


def to_int8(graph: bytes, pixels: np.ndarray, in_float: str = "none") -> bytes:
    """pixels    uint8 (n, S, S, 3), n >= 1: what calibrates
    in_float  one of FLOAT: convolutions that stay as they are
    """
    with tempfile.TemporaryDirectory() as folder:
        before, prepared, after = (str(Path(folder) / f"{name}.onnx") for name in ("before", "prepared", "after"))
        Path(before).write_bytes(graph)
        quant_pre_process(before, prepared, skip_symbolic_shape=True)
        nodes = onnx.load(prepared).graph.node
        convolutions = [node.name for node in nodes if node.op_type == "Conv"]
        pooling = next(i for i, node in enumerate(nodes) if node.op_type == "ReduceMean")
        kept = [node.name for node in nodes[pooling:]]
        if in_float in FLOAT:
            kept += convolutions[:1]
        if in_float == FLOAT[1]:
            kept += convolutions[-max(1, len(convolutions) // 4) :]
        quantize_static(
            prepared,
            after,
            Calibration(pixels),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=kept,
        )
        return serialised(onnx.load(after))


def to_int8_within(graph: bytes, pixels: np.ndarray, judge: Judge) -> tuple[bytes, str, dict]:
    """The graph with as few float layers as keep what is lost within its limit, or else with the least loss; which
    layers those are; what is lost."""
    tried = []
    for in_float in ("none", *FLOAT):
        made = to_int8(graph, pixels, in_float)
        lost = judge(made)
        tried.append((made, in_float, lost))
        if excess(lost) <= 0:
            return tried[-1]
        words = f"kNN loses {lost['knn_loss']:.1%}" if "knn_loss" in lost else f"{lost['neighbours_kept']:.1%} are kept"
        print(f"{words} with these layers in float32: {in_float}")
    return min(tried, key=lambda result: excess(result[2]))


def excess(lost: dict) -> float:
    """By how much more is lost than may be: of kNN accuracy, or without labels of the nearest pictures."""
    return lost["knn_loss"] - LOSS_LIMIT if "knn_loss" in lost else KEPT_LIMIT - lost["neighbours_kept"]


class Calibration(CalibrationDataReader):
    def __init__(self, pixels: np.ndarray):
        self.batches = iter(np.array_split(pixels, -(-len(pixels) // BATCH)))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"pixels": batch}


def main() -> None:
    logging.disable(logging.WARNING)  # the quantiser's advice on what has been done
    try:
        settings = tyro.cli(QuantizeSettings)
        bundle = quantize(settings)
    except (BundleError, DataError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    found = bundle.card.figures["quantized"]
    print(f"{bundle.card.id}: {found['bytes'] / 1e6:.1f} MB, before {found['bytes_original'] / 1e6:.1f}")
    print(
        f"{found['images_per_s']:,.0f} images/s on {found['cores']} cores, before "
        f"{found['images_per_s_original']:,.0f}; {found['neighbours_kept']:.1%} of the {NEIGHBOURS} nearest of "
        f"{found['pictures']:,} pictures are the same"
    )
    if "knn" in found:
        print(f"kNN accuracy {found['knn']:.1%}, before {found['knn_original']:.1%} ({found['asked']:,} asked)")
    if "same_class" in found:
        print(f"{found['same_class']:.1%} of the pictures are given the same class")
    print(f"wrote {bundle.folder}\nnext: TWINVIEW_ENCODER={bundle.folder} bentoml serve, after indexing with it")


if __name__ == "__main__":
    main()
