"""Export a run's encoder f, without the projection head g, as a bundle that the service loads.

    python export/to_onnx.py runs/NAME

The graph maps uint8 pixels [N, S, S, 3] to float32 h [N, d], for any N, with the scaling to [0, 1] inside. For a
fine-tuned run it also returns the logits [N, C], before any softmax, so that a temperature can still be chosen.
The bundle is saved only if ONNX Runtime agrees with torch at several batch sizes.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hashlib
import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import tyro
from torch import Tensor, nn

from export.artifact import (
    Bundle,
    BundleError,
    ModelCard,
    Preprocessing,
    encoder_id,
    load_bundle,
    probe_pixels,
    probe_values,
    save_bundle,
)
from training import checkpoint, classifier
from training.checkpoint import CheckpointError
from training.config import PretrainSettings
from training.encoders import Encoder, to_input

OUTPUTS = ["embedding", "logits"]
PATHS = ("data", "init", "teacher")  # settings that may contain paths of the machine that trained
PARITY_BATCHES = (1, 2, 7, 32)
PARITY_LIMIT = 1e-4  # largest difference, relative to the largest value of torch's output


@dataclass(frozen=True)
class ExportSettings:
    """Export a run's encoder to ONNX with its model card."""

    run: tyro.conf.Positional[Path]
    """The run's folder (runs/NAME), or a checkpoint file."""
    out: Path | None = None
    """Folder of the bundle. By default RUN/encoder, where the service finds the newest encoder."""
    licence: str = "unspecified"
    """Licence of the encoder, written into its card."""


class ExportedModel(nn.Module):
    """The exported function: uint8 (N, S, S, 3) -> h (N, d) float32; with a head, h and its logits (N, C)."""

    def __init__(self, encoder: Encoder, head: nn.Module | None = None):
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, pixels: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = self.encoder(to_input(pixels)).float()
        return h if self.head is None else (h, self.head(h))


def export(settings: ExportSettings) -> tuple[Bundle, bool]:
    """Returns the bundle, and False if it already existed. Raises CheckpointError, BundleError."""
    path = checkpoint.find(settings.run)
    out = settings.out or (settings.run if settings.run.is_dir() else settings.run.parent) / "encoder"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    saved = checkpoint.load(path)
    about = saved.get("classifier") or saved.get("distillation")
    classes = about.get("classes", []) if about else []
    try:
        existing = load_bundle(out)
        card = existing.card
        same = card.training["checkpoint_sha256"] == digest and card.classes == classes and card.precision == "fp32"
        if same and card.licence == settings.licence and card.probe:
            return existing, False
    except (BundleError, KeyError):
        pass  # no bundle, or an older format: export
    encoder, head = checkpoint.encoder_of(saved), None
    if classes:
        network, _ = classifier.load(path)
        head = nn.Sequential(network.hidden, network.classifier)
    trained = checkpoint.settings_of(saved)
    graph = to_graph(encoder, trained.size_px, head)
    error = parity_error(graph, encoder, trained.size_px, head)
    if not error <= PARITY_LIMIT:
        raise BundleError(
            f"{path}: ONNX Runtime differs from torch by {error:.1e} (limit {PARITY_LIMIT}); not exported"
        )
    card = make_card(graph, trained, encoder.dimension, saved["facts"], digest, error, settings.licence, about)
    return save_bundle(out, graph, card), True


def to_graph(encoder: Encoder, size_px: int, head: nn.Module | None = None) -> bytes:
    """The serialised ONNX graph, reproducible: same weights, same bytes."""
    example = torch.zeros(2, size_px, size_px, 3, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            ExportedModel(encoder, head).eval(),
            (example,),
            input_names=["pixels"],
            output_names=OUTPUTS[: 1 if head is None else 2],
            dynamic_shapes={"pixels": {0: torch.export.Dim("N")}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # only dynamo=False returns None
    return serialised(program.model_proto)


def serialised(proto: onnx.ModelProto) -> bytes:
    """Checked and serialised, without the exporter's notes on source files."""
    for part in (proto, proto.graph, *proto.graph.node, *proto.graph.initializer, *proto.functions):
        del part.metadata_props[:]
        part.doc_string = ""
    del proto.graph.value_info[:]
    onnx.checker.check_model(proto)
    return proto.SerializeToString(deterministic=True)


def parity_error(graph: bytes, encoder: Encoder, size_px: int, head: nn.Module | None = None) -> float:
    """Largest difference between ONNX Runtime and torch over several batch sizes.

    Relative to the largest absolute value of the output: h, or the logits.
    """
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    model, rng = ExportedModel(encoder, head).eval(), np.random.default_rng(0)
    worst = 0.0
    for n in PARITY_BATCHES:
        pixels = rng.integers(0, 256, (n, size_px, size_px, 3), dtype=np.uint8)
        with torch.no_grad():
            outputs = model(torch.from_numpy(pixels))
        expected = [output.numpy() for output in (outputs if head is not None else [outputs])]
        actual = [np.asarray(output) for output in session.run(OUTPUTS[: len(expected)], {"pixels": pixels})]
        if any(a.shape != e.shape for a, e in zip(actual, expected, strict=True)):
            return float("inf")
        errors = [np.abs(a - e).max() / (np.abs(e).max() or 1) for a, e in zip(actual, expected, strict=True)]
        worst = max(worst, *map(float, errors))
    return worst


def probe_of(graph: bytes, size_px: int) -> list[float]:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    embedding = np.asarray(session.run(["embedding"], {"pixels": probe_pixels(size_px)})[0])  # (1, d)
    return probe_values(embedding[0])


def make_card(
    graph: bytes,
    trained: PretrainSettings,
    dimension: int,
    facts: dict,
    digest: str,
    error: float,
    licence: str,
    about: dict | None = None,
) -> ModelCard:
    """about: the checkpoint's entry `classifier` (training/classifier.py) or `distillation`, if it has one."""
    sha256 = hashlib.sha256(graph).hexdigest()
    preprocessing = Preprocessing(trained.size_px)
    # The service publishes the card, so it contains no paths of this machine.
    how = {"settings": _without_paths(trained.to_dict()) | {"data": facts["data"]}}
    if about:
        how |= {"origin": Path(about["origin"]).name}
        distilled = "teacher" in about["settings"]
        how |= {"distillation" if distilled else "finetuning": _without_paths(about["settings"])}
    return ModelCard(
        id=encoder_id(trained.architecture, sha256, preprocessing),
        architecture=trained.architecture,
        dimension=dimension,
        preprocessing=preprocessing,
        sha256=sha256,
        training={
            "checkpoint_sha256": digest,
            "data": facts["data"],
            "images": facts["images"],
            "epochs": facts.get("epochs", 0),
            "commit": facts["commit"],
            **how,
        },
        figures={"parity_error": error, "before": facts.get("before", {}), "after": facts.get("after", {})},
        licence=licence,
        probe=probe_of(graph, trained.size_px),
        classes=about.get("classes", []) if about else [],
    )


def _without_paths(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if name not in PATHS}


def main() -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    settings = tyro.cli(ExportSettings)
    try:
        bundle, exported = export(settings)
    except (CheckpointError, BundleError, OSError) as error:
        sys.exit(f"error: {error}")
    card = bundle.card
    if exported:
        print(
            f"exported {card.id}: {bundle.graph.stat().st_size / 1e6:.1f} MB, {card.dimension} dimensions, "
            + (f"{len(card.classes)} classes, " if card.classes else "")
            + f"parity error {card.figures['parity_error']:.1e}"
        )
    print(f"{'wrote' if exported else 'already exported:'} {bundle.folder}")
    print("next: python serving/bulk.py --data YOUR_IMAGES, then bentoml serve")


if __name__ == "__main__":
    main()
