"""What a student learns from, and how far the two are alike."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.artifact import CARD, Preprocessing, load_bundle
from training import checkpoint, classifier
from training.data import store
from training.data.sources import Source
from training.data.store import PixelStore
from training.data.stream import StreamedRows
from training.evaluation import knn
from training.evaluation.features import Extractor, by_torch, megabytes, open_encoder, size_note

Splits = tuple[PixelStore, PixelStore | None]
"""Training pictures, and test pictures where there are some."""

MOST = 10_000  # pictures of the bank; a fifth as many are asked about
NEAREST = 10
TIMED, TIMED_S = 64, 0.5  # pictures of a batch, and for how long it is repeated


@dataclass(frozen=True)
class Teacher:
    """The student is one too, once it has learnt."""

    encoder: Extractor
    classes: list[str]
    """Of a classifier; none of an encoder."""
    answer: Callable[[np.ndarray], Tensor]
    """uint8 (n, S, S, 3) -> logits (n, C) of a classifier, h (n, d) of an encoder; float32 on the CPU."""

    @property
    def size_px(self) -> int:
        return self.encoder.preprocessing.size_px


def open_teacher(name: str) -> Teacher:
    """name    whatever open_encoder takes. Of a fine-tuned run, or its bundle, it is the classifier
    raises  EncoderError, CheckpointError, BundleError, ZooError
    """
    encoder, path = open_encoder(name), Path(name).expanduser()
    if (path / CARD).exists():
        bundle = load_bundle(path)
        if bundle.card.classes:
            import onnxruntime  # takes a second, and runs need none of it

            gpu = torch.cuda.is_available()
            providers = onnxruntime.get_available_providers() if gpu else ["CPUExecutionProvider"]
            session = onnxruntime.InferenceSession(bundle.graph, providers=providers)
            return Teacher(
                encoder,
                bundle.card.classes,
                lambda pixels: torch.from_numpy(session.run(["logits"], {"pixels": pixels})[0]),
            )
    elif path.exists() and path.suffix != ".onnx":
        file = checkpoint.find(path)
        if "classifier" in checkpoint.load(file):
            network, saved = classifier.load(file)
            return of_network(name, network, encoder.preprocessing.size_px, saved["classifier"]["classes"])
    return Teacher(encoder, [], encoder.encode)


def of_network(name: str, network: nn.Module, size_px: int, classes: list[str]) -> Teacher:
    """network: a Classifier where there are classes, an Encoder otherwise."""
    f = network.encoder if classes else network
    encoder = Extractor(name, Preprocessing(size_px), by_torch(f), megabytes(f))
    return Teacher(encoder, classes, by_torch(network) if classes else encoder.encode)


def load_both(source: Source, size_px: int) -> Splits:
    tested = any(picture.split == "test" for picture in source.pictures)
    train = store.load(source, Preprocessing(size_px), "train")
    return train, store.load(source, Preprocessing(size_px), "test") if tested else None


def notes(teacher: Teacher, encoder: nn.Module, size_px: int, source: Source) -> list[str]:
    """What may be other than was meant. encoder, size_px: the student's."""
    own, theirs = megabytes(encoder), teacher.encoder.megabytes
    found = [size_note(teacher.encoder.name, teacher.size_px, source.pictures)]
    if own > theirs:
        found.append(f"the student is larger than its teacher, {own:.1f} MB of weights against {theirs:.1f}")
    if size_px > teacher.size_px:
        found.append(f"the student sees {size_px} px and can learn only what its teacher sees at {teacher.size_px}")
    return [note for note in found if note]


def compare(student: Teacher, teacher: Teacher, own: Splits, theirs: Splits) -> dict:
    """How far both agree on pictures asked about, and a row of figures for each.

    own, theirs  the same pictures at the student's and the teacher's size
    agreement    of classifiers, how often the first answer is the same; of encoders, the share of each picture's ten
                 nearest that are the same ten. Of the test split, or without one of pictures that were learnt from
    """
    rows, found = {}, []
    for who, one, (train, test) in (("student", student, own), ("teacher", teacher, theirs)):
        some = np.array(train.pixels[:TIMED])  # a copy: a store is read-only, and torch warns of that
        row = {"encoder": who, "MB": one.encoder.megabytes, "images/s": speed(one, some)}
        row |= {"dimension": one.encoder.encode(some).shape[1]}
        if len(np.unique(train.labels[train.labels >= 0])) > 1:
            bank, asked_of, asked = knn.split_bank_and_queries(train, test, MOST)
            h_bank, h = one.encoder(StreamedRows(train.pixels, bank)), one.encoder(StreamedRows(asked_of.pixels, asked))
            labels, right = torch.from_numpy(train.labels[bank]), torch.from_numpy(asked_of.labels[asked])
            k = knn.default_k(len(bank))
            row |= {"knn": _share(knn.knn_predict(h_bank, labels, h, k) == right), "k": k, "queries": len(asked)}
        seen = test if test is not None and len(test) > 1 else train
        places = np.sort(np.random.default_rng(0).permutation(len(seen))[: MOST // 5])
        out = torch.cat([one.answer(seen.pixels[part]) for part in np.array_split(places, -(-len(places) // 256))])
        if one.classes:
            out = out.argmax(dim=1)
            number = {name: i for i, name in enumerate(one.classes)}
            label = [number.get(seen.classes[i], -1) if i >= 0 else -1 for i in seen.labels[places]]
            if (known := torch.tensor(label) >= 0).any():
                row["accuracy"] = _share((out == torch.tensor(label))[known])
        rows[who] = row
        found.append(out)
    agreement = _share(found[0] == found[1]) if student.classes else neighbours_shared(*found)
    return {"agreement": agreement, "pictures": len(places), "rows": list(rows.values())}


def neighbours_shared(h: Tensor, other: Tensor, k: int = NEAREST) -> float:
    """Share of each picture's k nearest by cosine that are the same: h (N, d), other (N, d') float, in [0, 1]."""
    k = min(k, len(h) - 1)
    near = []
    for one in (h, other):
        unit = F.normalize(one, dim=1)
        near.append((unit @ unit.T).fill_diagonal_(-torch.inf).topk(k, dim=1).indices)  # (N, k)
    return (near[0][:, :, None] == near[1][:, None, :]).any(dim=2).float().mean().item()


def speed(teacher: Teacher, pixels: np.ndarray) -> int:
    """Pictures a second of its encoder on this machine: of the fastest batch, as others' work only slows them."""
    seconds, end = [], time.perf_counter() + TIMED_S
    while len(seconds) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        teacher.encoder.encode(pixels)
        seconds.append(time.perf_counter() - began)
    return round(len(pixels) / min(seconds))


def _share(right: Tensor) -> float:
    return right.float().mean().item()
