"""Make an exported bundle smaller and faster: fp16, or int8 calibrated on your own pictures.

    python export/quantize.py runs/NAME/encoder --to int8 --data ~/Pictures

The new bundle is written next to the old one (encoder-int8/) and is served like it. Its card records the differences.

int8 is static quantisation of weights and activations, in QDQ form: weights per output channel, activations uint8 in
the range of values on the calibration pictures (ONNX Runtime's quantize_static). Weights use 7 of the 8 bits: with 8,
a processor without VNNI adds up products in 16 bits that are too few for them. Pooling and the classifier's head stay
float32; of a transformer only the layers with weights become int8. fp16 is for GPUs: a CPU computes it in float32, and
only the file is smaller.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import export.silence  # noqa: F401  turns off ONNX Runtime's reports before its import

import hashlib
import logging
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import tyro
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16

from export.artifact import Bundle, BundleError, encoder_id, load_bundle, refuse_unwritable, save_bundle
from export.compare import BATCH, NEIGHBOURS, GraphComparison, images_per_s
from export.paths import parse_settings
from export.suggest import SERVE
from export.to_onnx import probe_of, serialised
from training.data import store
from training.data.sources import DataError, open_source

CALIBRATION = 256  # number of pictures; more changed nothing on photographs
LOSS_LIMIT = 0.005  # most kNN accuracy that may be lost; above, some layers stay float32
KEPT_LIMIT = 0.9  # without labels: least share of nearest pictures that must stay the same (0.95 on photographs)
LAYERS = ("Conv", "MatMul", "Gemm")
FLOAT = ("first", "first and last stage")  # layers that stay float32, tried in this order


@dataclass(frozen=True)
class QuantizeSettings:
    """Make an exported bundle smaller and faster, and measure what it loses."""

    bundle: tyro.conf.Positional[Path]
    """Folder of the exported encoder or classifier: runs/NAME/encoder."""
    to: Literal["fp16", "int8"] = "int8"
    """Precision of the new bundle: int8 for CPUs, fp16 for GPUs."""
    data: str = "shapes"
    """Pictures like those that will be embedded: a folder, a .zip, shards, a torchvision name, or shapes. They
    calibrate int8 and measure the loss: how many nearest neighbours stay the same, and kNN accuracy if labelled."""
    limit: int = 5000
    """Compare at most this many pictures; with labels, classify up to a fifth as many more by kNN."""
    out: Path | None = None
    """Folder of the new bundle. By default BUNDLE-int8 or BUNDLE-fp16."""

    def __post_init__(self):
        if not self.limit > NEIGHBOURS:
            raise ValueError(f"--limit must be above {NEIGHBOURS}, not {self.limit}")


def quantize(settings: QuantizeSettings) -> Bundle:
    """Write the new bundle and return it. raises BundleError, DataError, ValueError."""
    bundle = load_bundle(settings.bundle)
    card, graph = bundle.card, bundle.graph.read_bytes()
    if card.precision != "fp32":
        raise BundleError(f"{settings.bundle} is already {card.precision}: give the bundle that it was made from")
    folder = settings.bundle.resolve()
    out = settings.out or folder.with_name(f"{folder.name}-{settings.to}")
    refuse_unwritable(out)
    source = open_source(settings.data)
    train, test = store.load(source, card.preprocessing, "train"), None
    if any(picture.split == "test" and picture.label is not None for picture in source.pictures):
        test = store.load(source, card.preprocessing, "test")
    if len(train) <= NEIGHBOURS:
        raise DataError(f"{settings.data} has {len(train)} pictures: comparing neighbours needs more than {NEIGHBOURS}")
    compare = GraphComparison(graph, train, test, settings.limit)
    if settings.to == "fp16":
        made, in_float = to_fp16(graph), "none"
        lost = compare(made)
    else:
        rows = np.random.default_rng(0).permutation(compare.rows)[:CALIBRATION]  # none of the kNN queries
        made, in_float, lost = to_int8_within(graph, train.pixels[np.sort(rows)], compare)
    rates = images_per_s({"original": graph, settings.to: made}, card.preprocessing.size_px)
    digest = hashlib.sha256(made).hexdigest()
    figures = {name: value for name, value in card.figures.items() if name not in ("parity_error", "measured")}
    figures["quantized"] = {
        "of": card.id,
        "data": source.name,
        "bytes": len(made),
        "bytes_original": len(graph),
        "images_per_s": rates[settings.to],
        "images_per_s_original": rates["original"],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "float_layers": in_float,
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
    return save_bundle(out, made, new, text=bundle.read_text_files())  # the text tower stays as it is


def to_fp16(graph: bytes) -> bytes:
    """Weights and arithmetic in float16; the input stays uint8 and the output float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about weights below the smallest float16, which become that
        return serialised(convert_float_to_float16(onnx.load_from_string(graph), keep_io_types=True))


def to_int8(graph: bytes, pixels: np.ndarray, in_float: str = "none") -> bytes:
    """Quantise weights and activations.

    pixels    uint8 (n, S, S, 3), n >= 1, the calibration pictures
    in_float  one of FLOAT, the layers that stay float32, or "none"
    """
    with tempfile.TemporaryDirectory() as folder:
        before, prepared, after = (str(Path(folder) / f"{name}.onnx") for name in ("before", "prepared", "after"))
        Path(before).write_bytes(graph)
        quant_pre_process(before, prepared, skip_symbolic_shape=True)
        layers, last = layers_and_rest(onnx.load(prepared).graph)
        excluded = list(last)
        if in_float in FLOAT:
            excluded += layers[:1]
        if in_float == FLOAT[1]:
            excluded += layers[-max(1, len(layers) // 4) :]
        transformer = any(node.op_type == "Softmax" for node in onnx.load(prepared).graph.node)
        quantize_static(
            prepared,
            after,
            Calibration(pixels),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,  # 7 bits
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=excluded,
            op_types_to_quantize=list(LAYERS) if transformer else None,
        )
        return serialised(onnx.load(after))


def layers_and_rest(graph: onnx.GraphProto) -> tuple[list[str], list[str]]:
    """Names of the encoder's layers with weights, in order, and of the nodes that always stay float32.

    Those are the products of two activations (attention), and all nodes from the pooling or the last layer on: the
    whitening of h, and the classifier's head.
    """
    weights = {tensor.name for tensor in graph.initializer}
    needed, ours = {"embedding"}, []
    for i in reversed(range(len(graph.node))):
        if needed.intersection(graph.node[i].output):
            needed.update(graph.node[i].input)
            ours.insert(0, i)
    layers = [i for i in ours if graph.node[i].op_type in LAYERS and weights.intersection(graph.node[i].input[:2])]
    if not layers:
        raise BundleError("this graph has no convolution or matrix product with weights, so int8 would change nothing")
    pools = [i for i in ours if graph.node[i].op_type in ("ReduceMean", "GlobalAveragePool")]
    convolutions = [i for i in layers if graph.node[i].op_type == "Conv"]
    if pools and convolutions and pools[-1] > convolutions[-1]:
        layers = [i for i in layers if i < pools[-1]]  # what follows is one product for each image
    pooled = next((i for i in pools if i > layers[-1]), None)
    end = layers[-1] + 1 if pooled is None else pooled
    products = [i for i in ours if graph.node[i].op_type in LAYERS and i not in layers]
    kept = sorted({*products, *range(end, len(graph.node)), *(set(range(len(graph.node))) - set(ours))})
    return [graph.node[i].name for i in layers], [graph.node[i].name for i in kept]


def to_int8_within(graph: bytes, pixels: np.ndarray, compare: Callable[[bytes], dict]) -> tuple[bytes, str, dict]:
    """The first graph, by float layers in the order of FLOAT, whose loss is within its limit, or the best of all.

    compare  a graph -> its loss, as from GraphComparison
    returns  the graph, its float layers, its loss
    """
    tried = []
    for in_float in ("none", *FLOAT):
        made = to_int8(graph, pixels, in_float)
        lost = compare(made)
        tried.append((made, in_float, lost))
        if excess(lost) <= 0:
            return tried[-1]
        if "knn_loss" in lost:
            loss = f"kNN accuracy falls by {lost['knn_loss']:.1%}"
        else:
            loss = f"{lost['neighbours_kept']:.1%} of neighbours stay the same"
        print(f"{loss} with these layers in float32: {in_float}")
    return min(tried, key=lambda result: excess(result[2]))


def excess(lost: dict) -> float:
    """How far the loss exceeds its limit, in kNN accuracy, or without labels in the share of nearest pictures."""
    return lost["knn_loss"] - LOSS_LIMIT if "knn_loss" in lost else KEPT_LIMIT - lost["neighbours_kept"]


class Calibration(CalibrationDataReader):
    def __init__(self, pixels: np.ndarray):
        self.batches = iter(np.array_split(pixels, -(-len(pixels) // BATCH)))

    # None ends the calibration; the base class's annotation lacks it
    def get_next(self) -> dict[str, np.ndarray] | None:  # pyrefly: ignore[bad-override]
        batch = next(self.batches, None)
        return None if batch is None else {"pixels": batch}


def main() -> None:
    logging.disable(logging.WARNING)  # the quantiser's advice to preprocess, which is done here
    try:
        settings = parse_settings(QuantizeSettings)
        bundle = quantize(settings)
    except (BundleError, DataError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nStopped. Nothing was exported.")
        sys.exit(130)
    figures = bundle.card.figures["quantized"]
    print(f"{bundle.card.id}: {figures['bytes'] / 1e6:.1f} MB instead of {figures['bytes_original'] / 1e6:.1f}")
    print(
        f"{figures['images_per_s']:,.0f} images/s on {figures['cores']} cores instead of "
        f"{figures['images_per_s_original']:,.0f}; {figures['neighbours_kept']:.1%} of the {NEIGHBOURS} nearest of "
        f"{figures['pictures']:,} pictures are the same"
    )
    if "knn" in figures:
        print(
            f"kNN accuracy {figures['knn']:.1%} instead of {figures['knn_original']:.1%} ({figures['asked']:,} queries)"
        )
    if "same_class" in figures:
        print(f"{figures['same_class']:.1%} of the pictures get the same class")
    print(
        f"wrote {bundle.folder}\nnext: index your pictures with it, then "
        f"TWINVIEW_ENCODER={shlex.quote(str(bundle.folder.absolute()))} {SERVE}"
    )


if __name__ == "__main__":
    main()
