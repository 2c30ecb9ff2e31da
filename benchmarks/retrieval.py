"""Share of nearest pictures of the same class: by raw pixels, before training, and after it.

    python benchmarks/retrieval.py --data clothing.zip --run runs/clothing-tiny

The training split is indexed as the service does it, and searched with every picture of the test split. A rate is the
share of queries whose first result, or one of whose first five, is of their own class.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

from benchmarks.result import publish
from export.artifact import Preprocessing, UnreadableImage, read_pixels
from export.to_onnx import ExportedModel, ExportSettings, export
from serving.collection.index import Index
from serving.indexing.fill import BatchEncoder, Tally, fill
from serving.indexing.originals import original
from serving.inference.encoder import OnnxEncoder
from training import checkpoint, encoders
from training.config import PretrainSettings
from training.data.sources import SourcePicture, open_source

K = 5
QUICK = 400  # pictures of each split


@dataclass(frozen=True)
class Options:
    run: Path
    """A finished run, runs/NAME."""
    data: str = "shapes"
    """Labelled pictures with a test split."""
    quick: bool = False
    """400 pictures of each split only."""


def main(options: Options) -> None:
    source = open_source(options.data)
    collection, queries = ([p for p in source.pictures if p.split == split] for split in ("train", "test"))
    if options.quick:
        rng = np.random.default_rng(0)
        collection, queries = (
            [pictures[i] for i in rng.permutation(len(pictures))[:QUICK]] for pictures in (collection, queries)
        )
    saved = checkpoint.load(checkpoint.find(options.run))
    settings, bundle = checkpoint.settings_of(saved), export(ExportSettings(str(options.run)))[0]
    rows = []
    for name, encode in (
        ("raw pixels", lambda pixels: pixels.reshape(len(pixels), -1).astype(np.float32) - 127.5),
        ("untrained", untrained(settings)),
        ("trained", OnnxEncoder(bundle)),
    ):
        top1, topk = rates(encode, bundle.card.preprocessing, collection, queries)
        rows.append({"encoder": name, "queries": len(queries), "top-1": top1, f"top-{K}": topk})
    publish("retrieval", rows, {"top1_untrained": rows[1]["top-1"], "top1_trained": rows[2]["top-1"]})


def untrained(settings: PretrainSettings) -> Callable[[np.ndarray], np.ndarray]:
    """The encoder with the initial weights of the run, drawn from its seed."""
    torch.manual_seed(settings.seed)
    served = ExportedModel(encoders.ResNetEncoder(settings.encoder, settings.width, settings.size_px)).eval()

    def encode(pixels: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return served(torch.from_numpy(pixels)).numpy()

    return encode


def rates(
    encode: Callable[[np.ndarray], np.ndarray],
    preprocessing: Preprocessing,
    collection: list[SourcePicture],
    queries: list[SourcePicture],
) -> tuple[float, float]:
    """Share of the queries with the label of their nearest picture, and of any of their K nearest."""
    size = preprocessing.size_px
    dimension = encode(np.zeros((1, size, size, 3), np.uint8)).shape[1]
    first, among = [], []
    with tempfile.TemporaryDirectory() as folder:
        index = Index(Path(folder), "measured", dimension)
        encoder = BatchEncoder(encode, preprocessing, threads=1)
        fill(map(original, collection), len(collection), encoder, index, Tally())
        for query in tqdm(queries, desc="searching", unit="img"):
            try:
                pixels = read_pixels(query.read(), preprocessing)
            except UnreadableImage:
                continue
            labels = [item.label for item, _ in index.search(encode(pixels[None])[0], K)]
            first.append(labels[0] == query.label)
            among.append(query.label in labels)
    return float(np.mean(first)), float(np.mean(among))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
