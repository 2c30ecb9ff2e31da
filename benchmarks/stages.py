"""Cost of indexing a picture, stage by stage on one core, and the resulting cost of a million and more.

    python benchmarks/stages.py
    python benchmarks/stages.py --data ~/Pictures --encoder runs/Pictures-tiny/encoder

By default with an untrained ResNet-18 at 224 px and JPEG files of 500 x 375. The rows from "1e+06 pictures" on are
calculated from the others.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import tyro

from benchmarks.result import publish
from benchmarks.serving import Case, prepare
from export.artifact import UnreadableImage, load_bundle
from serving.collection.index import Index, Item, content_id
from serving.inference.encoder import OnnxEncoder
from serving.inference.thumbnail import read_picture
from training.data.sources import open_source

PICTURES = 256
BATCH = 32
ROUNDS = 5
COUNTS = (10**6, 10**8, 10**10)


@dataclass(frozen=True)
class Options:
    data: str | None = None
    """Your own pictures: anything that `twinview index add` takes."""
    encoder: Path | None = None
    """Folder of a bundle."""
    quick: bool = False
    """A quarter of the pictures and two rounds only."""


def main(options: Options) -> None:
    count, rounds = (PICTURES // 4, 2) if options.quick else (PICTURES, ROUNDS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = prepare(Case("224", 224, 224, (500, 375), seconds=0), folder)
        if options.data:
            files = random_files(options.data, count)
        files = (files * (count // len(files) + 1))[:count]
        bundle = load_bundle(options.encoder or folder / "encoder")
        encode = OnnxEncoder(bundle, threads=1)
        decode_ms, decoded = measure(lambda file: read_picture(file, bundle.card.preprocessing), files, rounds)
        batches = [np.stack([picture.pixels for picture in decoded[i : i + BATCH]]) for i in range(0, count, BATCH)]
        encode_ms, encoded = measure(encode, batches, rounds)
        encode_ms *= len(batches) / count
        row_bytes, keep_ms = store(folder / "index", np.concatenate(encoded))
    file_bytes = float(np.mean([len(file) for file in files]))
    thumbnail_bytes = float(np.mean([len(picture.thumbnail) for picture in decoded]))
    stages = {
        "decode, with its thumbnail": (decode_ms, thumbnail_bytes),
        "encode": (encode_ms, 4.0 * bundle.card.dimension),
        "keep": (keep_ms, row_bytes),
    }
    rows = [{"": stage, "ms": ms, "images/s": 1000 / ms, "bytes": size} for stage, (ms, size) in stages.items()]
    rows += [
        {
            "": f"{many:.0e} pictures",
            "decode (core h)": decode_ms * many / 3.6e6,
            "encode (core h)": encode_ms * many / 3.6e6,
            "files (GB)": file_bytes * many / 1e9,
            "thumbnails (GB)": thumbnail_bytes * many / 1e9,
            "rows (GB)": row_bytes * many / 1e9,
        }
        for many in COUNTS
    ]
    whole_ms = decode_ms + encode_ms + keep_ms
    publish("stages", rows, {"bytes_per_image": thumbnail_bytes + row_bytes, "core_ms_per_image": whole_ms})


def random_files(data: str, count: int) -> list[bytes]:
    """Bytes of `count` random pictures of `data`."""
    pictures, files = open_source(data).pictures, []
    for i in np.random.default_rng(0).permutation(len(pictures)):
        try:
            files.append(pictures[i].read())
        except UnreadableImage:
            continue
        if len(files) == count:
            break
    return files


def measure(work: Callable, parts: Sequence, rounds: int) -> tuple[float, list]:
    """Milliseconds of CPU time per part, the median of the rounds; and the results."""
    ms = []
    for _ in range(rounds):
        started = time.process_time()
        done = [work(part) for part in parts]
        ms.append((time.process_time() - started) * 1000 / len(parts))
    return median(ms), done


def store(folder: Path, vectors: np.ndarray, rows: int = 8192) -> tuple[float, float]:
    """Bytes of a row on the disk, and milliseconds to write it durably."""
    rng = np.random.default_rng(0)
    vectors = vectors[rng.integers(len(vectors), size=rows)] + rng.normal(0, 0.01, (rows, vectors.shape[1]))
    names = [f"folder-{i % 100}/picture-{i:08d}.jpg" for i in range(rows)]
    ids = [content_id(name.encode()) for name in names]
    items = [Item(id, n, n[:9], f"/data/{n}", 500, 375, 50_000) for id, n in zip(ids, names, strict=True)]
    index = Index(folder, "measured", vectors.shape[1])
    started = time.perf_counter()
    index.upsert(items, vectors)
    return index.facts().bytes / rows, (time.perf_counter() - started) * 1000 / rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
