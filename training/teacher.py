"""The teacher of a distillation, and how similar teacher and student are."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from export.artifact import CARD, Preprocessing, load_bundle
from export.paths import at_home
from training import checkpoint, classifier
from training.data.sources import Source
from training.data.store import PixelStore, Splits
from training.data.stream import StreamedRows
from training.evaluation import knn
from training.evaluation.features import (
    Extractor,
    extract_with_torch,
    megabytes,
    onnx_session,
    open_encoder,
    size_note,
)
from training.evaluation.retrieval import neighbours_shared

LARGER = 1.1  # a file has some kB besides the weights
BANK_SIZE = 10_000  # pictures of the kNN bank; a fifth as many are queries
TIMED, TIMED_S = 64, 0.5  # pictures of a batch, and the seconds for which it is repeated


@dataclass(frozen=True)
class Teacher:
    """An encoder or a classifier. The trained student is one too."""

    encoder: Extractor
    classes: list[str]
    """Class names of a classifier; empty for an encoder."""
    output: Callable[[np.ndarray], Tensor]
    """uint8 (n, S, S, 3) -> logits (n, C) of a classifier, h (n, d) of an encoder; float32 on the CPU."""

    @property
    def size_px(self) -> int:
        return self.encoder.preprocessing.size_px


def open_teacher(name: str) -> Teacher:
    """
    name    anything that open_encoder takes; a fine-tuned run or its bundle is opened as a classifier
    raises  EncoderError, CheckpointError, BundleError, ZooError
    """
    encoder, path = open_encoder(name), Path(at_home(name))
    if (path / CARD).exists():
        bundle = load_bundle(path)
        if bundle.card.classes:
            session = onnx_session(bundle.graph)
            return Teacher(
                encoder,
                bundle.card.classes,
                lambda pixels: torch.from_numpy(session.run(["logits"], {"pixels": pixels})[0]),
            )
    elif path.exists() and path.suffix != ".onnx":
        file = checkpoint.find(path)
        if "classifier" in checkpoint.load(file):
            network, saved = classifier.load(file)
            return teacher_of(name, network, encoder.preprocessing, saved["classifier"]["classes"])
    return Teacher(encoder, [], encoder.encode)


def teacher_of(name: str, network: nn.Module, preprocessing: Preprocessing, classes: list[str]) -> Teacher:
    """network: a Classifier if there are classes, an Encoder otherwise."""
    f = network.encoder if isinstance(network, classifier.Classifier) else network
    encoder = Extractor(name, preprocessing, extract_with_torch(f), megabytes(f))
    return Teacher(encoder, classes, extract_with_torch(network) if classes else encoder.encode)


def notes(teacher: Teacher, student: nn.Module, size_px: int, source: Source) -> list[str]:
    """Notes on sizes that are probably not intended. student, size_px: the student's encoder and its input size."""
    own, theirs = megabytes(student), teacher.encoder.megabytes
    notes = [size_note(teacher.encoder.name, teacher.size_px, source.pictures)]
    if own > LARGER * theirs:
        notes.append(f"the student is larger than its teacher, {own:.1f} MB of weights against {theirs:.1f}")
    if size_px > teacher.size_px:
        notes.append(f"the student takes {size_px} px, but its teacher sees the pictures at {teacher.size_px} px only")
    return [note for note in notes if note]


def compare(
    models: dict[str, tuple[Teacher, Splits]], bank_size: int = BANK_SIZE, taught: Tensor | None = None
) -> dict[str, dict]:
    """Figures of each model, by name, on the test split, or without one on training pictures.

    models     by name, the teacher last; each with the same pictures at its own size
    bank_size  most pictures of the kNN bank; a fifth as many are its queries, and compared
    taught     (N, d) the teacher's h of all training pictures, if they are there
    returns    size, speed, accuracy where there are labels, and of all but the teacher their agreement with it on
               `pictures`. Classifiers: share of pictures given the same class; encoders: share of each picture's ten
               nearest that are the same
    """
    figures, outputs, teacher = {}, {}, [*models][-1]
    for name, (model, (train, test)) in models.items():
        sample = np.array(train.pixels[:TIMED])  # a copy, since torch warns about read-only arrays
        row = {"MB": model.encoder.megabytes, "images/s": images_per_s(model, sample)}
        row |= {"dimension": model.encoder.encode(sample).shape[1]}
        if len(np.unique(train.labels[train.labels >= 0])) > 1:
            row |= _knn(model, train, test, bank_size, taught if name == teacher else None)
        pictures = test if test is not None and len(test) > 1 else train
        places = np.sort(np.random.default_rng(0).permutation(len(pictures))[: max(2, bank_size // 5)])
        batches = np.array_split(places, -(-len(places) // 256))
        output = torch.cat([model.output(pictures.pixels[batch]) for batch in batches])
        if model.classes:
            output = output.argmax(dim=1)
            number = {name: i for i, name in enumerate(model.classes)}
            labels = [number.get(pictures.classes[i], -1) if i >= 0 else -1 for i in pictures.labels[places]]
            if (known := torch.tensor(labels) >= 0).any():
                row["accuracy"] = _share((output == torch.tensor(labels))[known])
        figures[name], outputs[name] = row, output
    theirs, classes = outputs.pop(teacher), models[teacher][0].classes
    for name, output in outputs.items():
        agreement = _share(output == theirs) if classes else neighbours_shared(output, theirs)
        figures[name] |= {"agreement": agreement, "pictures": len(theirs)}
    return figures


def _knn(
    model: Teacher, train: PixelStore, test: PixelStore | None, bank_size: int, h_train: Tensor | None = None
) -> dict:
    """h_train: (N, d) of all training pictures, if they have been encoded."""
    bank, query_store, queries = knn.split_bank_and_queries(train, test, bank_size)
    h_bank = model.encoder(StreamedRows(train.pixels, bank)) if h_train is None else h_train[torch.from_numpy(bank)]
    h = model.encoder(StreamedRows(query_store.pixels, queries))
    k = knn.default_k(len(bank))
    predicted = knn.knn_predict(h_bank, torch.from_numpy(train.labels[bank]), h, k)
    accuracy = _share(predicted == torch.from_numpy(query_store.labels[queries]))
    return {"knn": accuracy, "k": k, "queries": len(queries)}


def images_per_s(model: Teacher, pixels: np.ndarray) -> int:
    """Speed of its encoder on this machine, by the fastest batch: other work on the machine only slows it."""
    seconds, end = [], time.perf_counter() + TIMED_S
    while len(seconds) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        model.encoder.encode(pixels)
        seconds.append(time.perf_counter() - began)
    return round(len(pixels) / min(seconds))


def _share(right: Tensor) -> float:
    return right.float().mean().item()
