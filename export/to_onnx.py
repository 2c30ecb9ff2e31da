"""Export an encoder f, without a projection head or classifier of others, as a bundle that the service loads.

    python export/to_onnx.py runs/NAME                          a run of this project
    python export/to_onnx.py lite0                              an encoder that others trained (training/zoo.py)
    python export/to_onnx.py timm:vit_small_patch14_dinov2
    python export/to_onnx.py FILE.onnx --size-px 224            a graph that others made (export/graph.py)
    python export/to_onnx.py FILE.onnx --text TEXT.onnx --tokenizer tokenizer.json  with its text tower (export/text.py)

The graph maps uint8 pixels [N, S, S, 3] to float32 h [N, d], for any N, with the normalisation inside; how a picture
becomes such a square stands in the card. For a fine-tuned run it also returns the logits [N, C], before any softmax, so
that a temperature can still be chosen. The bundle is saved only if ONNX Runtime agrees with torch, or with the graph of
others, at several batch sizes. Unless the graph is of others, it contains the weights of f for torch too.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hashlib
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
import tyro
from torch import Tensor, nn

from export.artifact import (
    WEIGHTS,
    Bundle,
    BundleError,
    ModelCard,
    Preprocessing,
    encoder_id,
    load_bundle,
    probe_pixels,
    probe_values,
    refuse_unwritable,
    save_bundle,
)
from export.graph import Pooling, foreign_embedding, open_session, read_graph, wrap
from export.paths import at_home, parse_settings
from export.sample import sample
from export.suggest import SERVE, command
from export.text import ForeignText, read_text_tower
from export.weights import weights_file
from training import checkpoint, classifier, zoo
from training.checkpoint import CheckpointError
from training.config import RUNS, PretrainSettings
from training.data.sources import DataError, open_source
from training.encoders import Encoder, embed, shortened, to_input
from training.evaluation import words
from training.zoo import ZooError

OUTPUTS = ["embedding", "logits"]
PATHS = ("data", "init", "teacher")  # settings that may contain paths of the machine that trained
PARITY_BATCHES = (1, 2, 7, 32)
PARITY_LIMIT = 1e-4  # largest difference, relative to the largest value of torch's output
BLACK, WHITE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class ExportSettings:
    """Export an encoder to ONNX with its model card: a run's, one that others trained, or a graph of others."""

    source: tyro.conf.Positional[str]
    """A run's folder (runs/NAME) or checkpoint file; lite0, timm:NAME[:FILE] or torchvision:NAME[:WEIGHTS|FILE]; or an
    ONNX file."""
    out: Path | None = None
    """Folder of the bundle. By default RUN/encoder or runs/NAME/encoder, where the service finds the newest encoder."""
    licence: str = ""
    """Licence of the encoder, written into its card. By default the one that its source states."""
    size_px: int | None = None
    """Side of the encoder's square input, if it is not to be the one that it was trained with."""
    force: bool = False
    """Export the weights of an adapted run even if they are worse than those that it started from, which are exported
    otherwise."""
    centre_on: str = ""
    """Pictures, as --data of pretrain.py: the mean of h over a thousand of them is subtracted in the graph, so that the
    similarity compares how pictures differ from the average one. It is also measured how good the vectors are on these
    pictures, and the page says it. A run is centred on its training pictures already."""

    mean: tuple[float, float, float] = BLACK
    """For an ONNX file: its input is (x - mean) / std, with x in [0, 1]."""
    std: tuple[float, float, float] = WHITE
    """For an ONNX file: see --mean."""
    crop: float | None = 1.0
    """For an ONNX file: side of the centred square that is used, as a share of the shorter side; none: the whole
    picture, squeezed."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """For an ONNX file: how pictures are resized."""
    output: str = ""
    """For an ONNX file with several outputs: the name of the embedding."""
    pooling: Pooling = "none"
    """For an ONNX file whose output is not one vector: mean over its places, or the first token."""

    text: Path | None = None
    """For an ONNX file that is the picture tower of a model such as CLIP: the ONNX file with its text tower, which may
    be the same one. Pictures can then be searched by words."""
    tokenizer: Path | None = None
    """For --text: the model's tokenizer.json."""
    text_output: str = ""
    """For a text tower with several outputs: the name of the embedding."""
    context_length: int | None = None
    """For --text: most tokens of a text, if neither the graph nor the tokenizer says it. 77 for CLIP, 64 for SigLIP."""
    pad_token: str = ""
    """For --text: the token that fills up a text, if the tokenizer does not say it."""
    lower_case: bool = False
    """For --text: lower-case every text, if the tokenizer does not do it."""

    def __post_init__(self) -> None:
        if self.size_px is not None and not self.size_px >= 1:
            raise ValueError(f"--size-px must be at least 1, not {self.size_px}")
        if not all(value > 0 for value in self.std):
            raise ValueError(f"--std must be above 0, not {self.std}")
        if self.crop is not None and not 0 < self.crop <= 1:
            raise ValueError(f"--crop must be in (0, 1] or None, not {self.crop:g}")
        if self.context_length is not None and not self.context_length >= 1:
            raise ValueError(f"--context-length must be at least 1, not {self.context_length}")
        for name in FOR_TEXT:
            if self.text is None and getattr(self, name) != getattr(ExportSettings, name):
                raise ValueError(f"{option(name)} is for a text tower: give its ONNX file with --text")
        if self.text and not self.tokenizer:
            raise ValueError(f"--text {self.text} needs --tokenizer, the tokenizer.json of the model")
        if self.text and self.centre_on:
            raise ValueError(
                "--centre-on cannot be used with --text: without the mean, pictures are not comparable to texts"
            )


FOR_TEXT = ("tokenizer", "text_output", "context_length", "pad_token", "lower_case")
FOR_GRAPHS = ("mean", "std", "crop", "interpolation", "output", "pooling", "text")


def option(name: str) -> str:
    """As it is written in the shell."""
    return f"--{name.replace('_', '-')}"


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
    """Returns the bundle, and False if it already existed.

    raises  CheckpointError, ZooError, BundleError, DataError
    """
    path = Path(at_home(settings.source))
    if path.suffix == ".onnx":
        return export_graph(path, settings), True
    for name in FOR_GRAPHS:
        if getattr(settings, name) != getattr(ExportSettings, name):
            how = "has no text tower here" if name == "text" else "says itself how it takes pictures"
            raise BundleError(f"--{name} is for ONNX files; {settings.source} {how}")
    if path.exists():
        return export_run(path, settings)
    if zoo.parse(settings.source):
        return export_zoo(settings), True
    near = zoo.nearest_names(settings.source)
    raise ZooError(
        f"{settings.source} is not a run, a checkpoint, an ONNX file, or a network of timm or torchvision"
        + (f" (nearest: {', '.join(near)})" if near else "")
    )


def export_run(run: Path, settings: ExportSettings) -> tuple[Bundle, bool]:
    path = checkpoint.find(run)
    out = settings.out or (run if run.is_dir() else run.parent) / "encoder"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    saved = checkpoint.load(path)
    about = saved.get("classifier") or saved.get("distillation")
    classes = about.get("classes", []) if about else []
    trained = checkpoint.settings_of(saved)
    if settings.size_px:
        trained = replace(trained, size_px=settings.size_px)
    licence = settings.licence or zoo.UNSPECIFIED
    facts, keeps_start = saved["facts"], checkpoint.keeps_start(saved) and not settings.force
    try:
        existing = load_bundle(out)
        card = existing.card
        same = card.training["checkpoint_sha256"] == digest and card.classes == classes and card.precision == "fp32"
        same = same and card.preprocessing == trained.preprocessing and not (settings.centre_on or settings.force)
        same = same and (not facts.get("verdict") or card.is_start == keeps_start)
        if same and card.licence == licence and card.probe and (out / WEIGHTS).is_file():
            return existing, False
    except (BundleError, KeyError):
        pass  # no bundle, or an older format: export
    refuse_unwritable(out)
    encoder, head = checkpoint.encoder_of(saved, result=settings.force), None
    lengths = shortened(encoder.dimension) if trained.matryoshka and not about else []
    if saved.get("start") and "verdict" in facts:
        print(f"this run is {facts['verdict']['sentence']}")
    if keeps_start:
        print(f"exporting {facts['origin']} as it was; --force exports the result of the run")
        facts, lengths, about = facts | {"after": facts["before"], "before": {}, "epochs": 0}, [], None
    if classes:
        if settings.centre_on:
            raise BundleError(f"{run} is a classifier, whose logits need h as it is: leave --centre-on out")
        network, _ = classifier.load(path)
        head = nn.Sequential(network.hidden, network.classifier)
    measured = {}
    if settings.centre_on:
        centre, measured = sample(settings.centre_on, trained.preprocessing, embed_with(encoder))
        encoder.centre += centre
    graph = to_graph(encoder, trained.size_px, head)
    error = parity_error(graph, encoder, trained.size_px, head)
    check_parity(path, error)
    card = make_card(graph, trained, encoder.dimension, facts, digest, error, licence, about)
    card = replace(card, shortened=lengths)
    weights = weights_file(encoder, trained.architecture)
    return save_bundle(out, graph, with_measured(card, measured), weights), True


def export_zoo(settings: ExportSettings) -> Bundle:
    out = settings.out or RUNS / zoo.short_name(settings.source) / "encoder"
    refuse_unwritable(out)
    model = zoo.load(settings.source, settings.size_px)
    encoder, size_px = model.encoder, model.preprocessing.size_px
    training, measured = {"origin": model.origin}, {}
    if settings.centre_on:
        centre, measured = sample(settings.centre_on, model.preprocessing, embed_with(encoder))
        encoder.centre += centre
        training["centred_on"] = open_source(settings.centre_on).name
    graph = to_graph(encoder, size_px)
    error = parity_error(graph, encoder, size_px)
    check_parity(settings.source, error)
    licence = settings.licence or model.licence
    card = card_of_others(graph, model.architecture, encoder.dimension, model.preprocessing, training, error, licence)
    return save_bundle(out, graph, with_measured(card, measured), weights_file(encoder, model.architecture))


def export_graph(file: Path, settings: ExportSettings) -> Bundle:
    out = settings.out or RUNS / file.stem / "encoder"
    refuse_unwritable(out)
    foreign = read_graph(file, settings.size_px, settings.output)
    preprocessing = Preprocessing(foreign.size_px, settings.crop, settings.interpolation)
    mean, std, pooling = settings.mean, settings.std, settings.pooling
    graph = wrap(foreign, mean, std, pooling)
    if (mean, std) == (BLACK, WHITE) and not foreign.takes_pixels:
        print("note: the graph gets pixels in [0, 1]; if it was trained with a normalisation, give --mean and --std")
    training, measured = {"origin": f"the file {file.name}"}, {}
    session = open_session(str(file), graph)
    rng, size, error = np.random.default_rng(0), foreign.size_px, 0.0
    for n in PARITY_BATCHES:
        pixels = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
        expected = foreign_embedding(foreign, pixels, mean, std, pooling)
        actual = np.asarray(session.run(OUTPUTS[:1], {"pixels": pixels})[0])
        error = float(np.maximum(error, np.abs(actual - expected).max() / (np.abs(expected).max() or 1)))  # keeps NaN
    check_parity(file, error)
    if settings.centre_on:
        centre, measured = sample(
            settings.centre_on,
            preprocessing,
            lambda pixels: torch.from_numpy(np.asarray(session.run(OUTPUTS[:1], {"pixels": pixels})[0])),
        )
        graph = wrap(foreign, mean, std, pooling, centre.numpy())
        training["centred_on"] = open_source(settings.centre_on).name
    dimension = onnx.load_from_string(graph).graph.output[0].type.tensor_type.shape.dim[1].dim_value
    licence = settings.licence or zoo.UNKNOWN
    card = card_of_others(graph, f"onnx:{file.stem}", dimension, preprocessing, training, error, licence)
    files = None
    if settings.text and settings.tokenizer:
        given = ForeignText(
            settings.text,
            settings.tokenizer,
            settings.text_output,
            settings.context_length,
            settings.pad_token,
            settings.lower_case,
        )
        files, tower = read_text_tower(given, str(file), dimension)
        card = replace(card, text=tower)
    return save_bundle(out, graph, with_measured(card, measured), text=files)


def check_parity(source: str | Path, error: float) -> None:
    if not error <= PARITY_LIMIT:
        raise BundleError(f"{source}: ONNX Runtime differs by {error:.1e} (limit {PARITY_LIMIT}); not exported")


def embed_with(encoder: Encoder) -> Callable[[np.ndarray], Tensor]:
    return lambda pixels: embed(encoder, torch.from_numpy(pixels))


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
    session = open_session("the exported graph", graph)
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
        worst = float(np.max([worst, *errors]))  # keeps NaN
    return worst


def probe_of(graph: bytes, size_px: int) -> list[float]:
    session = open_session("the exported graph", graph)
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
    preprocessing = trained.preprocessing
    # The service publishes the card, so it contains no paths of this machine.
    how = {"settings": _without_paths(trained.to_dict()) | {"data": facts["data"]}}
    if facts.get("origin"):
        how |= {"origin": Path(facts["origin"]).name}
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
        figures={"parity_error": error} | figures_of(facts),
        licence=licence,
        probe=probe_of(graph, trained.size_px),
        classes=about.get("classes", []) if about else [],
    )


def card_of_others(
    graph: bytes,
    architecture: str,
    dimension: int,
    preprocessing: Preprocessing,
    training: dict,
    error: float,
    licence: str,
) -> ModelCard:
    sha256 = hashlib.sha256(graph).hexdigest()
    return ModelCard(
        id=encoder_id(architecture, sha256, preprocessing),
        architecture=architecture,
        dimension=dimension,
        preprocessing=preprocessing,
        sha256=sha256,
        training=training,
        figures={"parity_error": error},
        licence=licence,
        probe=probe_of(graph, preprocessing.size_px),
    )


def with_measured(card: ModelCard, measured: dict) -> ModelCard:
    return replace(card, figures=card.figures | {"measured": measured}) if measured else card


def _without_paths(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if name not in PATHS}


def figures_of(facts: dict) -> dict:
    """Those of a run before and after training, and what they say."""
    before, after = facts.get("before", {}), facts.get("after", {})
    measured = any(name in before and {name, cases} <= after.keys() for name, (cases, _) in words.MEASURES.items())
    comparable = measured and before != after
    said = {"verdict": words.trained(before, after)[1]} if comparable else {}
    return {"before": before, "after": after} | said


def main() -> None:
    logging.disable(logging.WARNING)  # the exporter's notes on what it does not simplify
    try:
        bundle, exported = export(parse_settings(ExportSettings))
    except (CheckpointError, ZooError, BundleError, DataError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nStopped. Nothing was exported.")
        sys.exit(130)
    card = bundle.card
    if exported:
        print(
            f"exported {card.id}: {bundle.graph.stat().st_size / 1e6:.1f} MB, {card.dimension} dimensions, "
            + (f"{len(card.classes)} classes, " if card.classes else "")
            + (f"texts of up to {card.text.length} tokens, " if card.text else "")
            + f"parity error {card.figures['parity_error']:.1e}"
        )
    if card.licence == zoo.UNKNOWN:
        print("note: the licence of these weights is not known; find it out before you share them (--licence)")
    print(f"{'wrote' if exported else 'already exported:'} {bundle.folder}")
    print(f"next: {command('serving/bulk.py', '--data', 'YOUR_IMAGES')}, then {SERVE}")


if __name__ == "__main__":
    main()
