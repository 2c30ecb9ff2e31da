"""How well the vectors of an encoder find pictures of the same class; shared by the benchmarks of training."""

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from torch import Tensor, nn

from export.artifact import Preprocessing
from export.compare import open_graph
from export.paths import local_path
from export.to_onnx import to_graph
from training.data import shapes
from training.data.sources import open_source
from training.data.store import load_splits
from training.data.stream import StreamedRows
from training.evaluation import retrieval
from training.evaluation.features import Extractor, extract_with_torch
from training.evaluation.knn import knn_predict

K = 20
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 10: 2.26}  # of Student's distribution, two-sided, by the number of values


@contextmanager
def workplace(data: str, quick: bool) -> Iterator[str]:
    """An empty current folder; gives the path of the data, which is a small set of shapes if `quick`."""
    path, before = local_path(data), Path.cwd()
    data = str(path.resolve()) if path.exists() else data
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            if quick:
                shapes.make(Path("few"), train=160, test=40, size_px=48)
            yield "few" if quick else data
        finally:
            os.chdir(before)


def quality(name: str, encoder: nn.Module, preprocessing: Preprocessing, data: str, length: int | None = None) -> dict:
    """`found_by` of a network: on a GPU as it is, on a CPU exported, which takes half the time."""
    extract = extract_with_torch(encoder) if torch.cuda.is_available() else _exported(encoder, preprocessing.size_px)
    return found_by(Extractor(name, preprocessing, extract), data, length)


def _exported(encoder: nn.Module, size_px: int) -> Callable[[np.ndarray], Tensor]:
    session = open_graph(to_graph(encoder, size_px), torch.get_num_threads())
    return lambda pixels: torch.from_numpy(session.run(["embedding"], {"pixels": pixels})[0])


def found_by(extractor: Extractor, data: str, length: int | None = None) -> dict:
    """Of the test pictures among the training pictures, with h centred on these: kNN accuracy, share whose nearest
    picture is of their class, and mean share of their class among the ten nearest.

    length  how many of the first numbers of h are used; by default all
    """
    train, test = load_splits(open_source(data), extractor.preprocessing)
    if test is None:
        raise SystemExit(f"error: {data} has no test split")
    bank, asked = (extractor(StreamedRows(part.pixels, np.arange(len(part))))[:, :length] for part in (train, test))
    centre = bank.mean(dim=0)
    labels, expected = (torch.from_numpy(np.array(part.labels)) for part in (train, test))
    _, places = retrieval.nearest(asked - centre, bank - centre, 10)
    same = labels[places] == expected[:, None]  # (Q, 10)
    predicted = knn_predict(bank - centre, labels, asked - centre, min(K, len(bank)))
    return {
        "knn": (predicted == expected).double().mean().item(),
        "top-1": same[:, 0].double().mean().item(),
        "purity": same.double().mean().item(),
    }


def averaged(results: list[dict]) -> dict[str, str]:
    """Each measure over the seeds, as text."""
    return {measure: with_interval([result[measure] for result in results]) for measure in results[0]}


def with_interval(values: list[float]) -> str:
    """Mean and half the width of its 95 % interval over the seeds, in %."""
    if len(values) < 2:
        return f"{values[0]:.1%}"
    half = T_95.get(len(values), 2.0) * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):.1%} ± {half:.1%}"
