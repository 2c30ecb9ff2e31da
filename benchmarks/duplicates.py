"""Near-duplicates of a whole collection: which copies are found, or the time relative to comparing all pairs.

    python benchmarks/duplicates.py --data clothing.zip --encoder lite0
    python benchmarks/duplicates.py --data clothing.zip --encoder untrained
    python benchmarks/duplicates.py

With --data, copies of a tenth of the pictures are added: recompressed, resized or lightly cropped. All are compared at
the collection's own threshold. `precision` is the share of copies that were planted, among those that are suggested to
go; `recall` the share of the planted ones that are suggested, or whose original is. Pairs that the set itself holds
count as wrong.

Without --data there are vectors only, in clusters; a twentieth of them are noisy copies of others. In one set the
variance decreases from direction to direction, as in vectors of encoders; in the other it is the same in all
directions, the worst case for the bounds of the search. All pairs are compared by matrix products in blocks, on all
cores.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import io
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

from benchmarks.result import publish
from export.artifact import Preprocessing, read_pixels
from serving.collection.index import Index, Item, unit
from serving.derived.duplicates import compute, group, is_too_much
from serving.derived.pairs import near_pairs
from training.data.sources import open_source
from training.encoders import ResNetEncoder
from training.evaluation.features import Extractor, extract_with_torch, open_encoder

CLUSTERS = 2000
BLOCK = 2048
QUICK = 25_000
KINDS = ("recompressed", "resized", "cropped")
UNTRAINED = "untrained"
BATCH = 64


@dataclass(frozen=True)
class Options:
    data: str | None = None
    """A folder of pictures, or what else pretrain.py reads: looks for planted copies. Without it, times the search."""
    encoder: str = "lite0"
    """Encoder for --data: as evaluate.py takes it, or `untrained`: `tiny` with random weights."""
    most: int = 4000
    """Most pictures of --data."""
    rows: int = 100_000
    """Number of vectors."""
    dimension: int = 512
    """Length of the vectors."""
    threshold: float = 0.95
    """Least cosine of near-duplicates."""
    quick: bool = False
    """25,000 vectors only."""


def main(options: Options) -> None:
    if options.data:
        find_planted(options.data, options.encoder, options.most)
    else:
        compare_all(options)


def find_planted(data: str, encoder: str, most: int) -> None:
    rng = np.random.default_rng(0)
    pictures = open_source(data).pictures
    files = [pictures[i].read() for i in rng.permutation(len(pictures))[:most].tolist()]
    n = len(files)
    of = rng.permutation(n)[: n // 10].tolist()
    kinds = [KINDS[i] for i in rng.integers(len(KINDS), size=len(of)).tolist()]
    files += [planted(files[i], kind, rng) for i, kind in zip(of, kinds, strict=True)]
    ids, extractor = [f"{i:032x}" for i in range(len(files))], opened(encoder)
    h, items = [], []
    for start in tqdm(range(0, len(files), BATCH), desc="encoding", unit="batch"):
        some = files[start : start + BATCH]
        h.append(extractor.encode(np.stack([read_pixels(file, extractor.preprocessing) for file in some])).numpy())
    for id, file in zip(ids, files, strict=True):
        with Image.open(io.BytesIO(file)) as image:
            items.append(Item(id, id, None, None, image.width, image.height, len(file)))
    with tempfile.TemporaryDirectory() as folder:
        index = Index(folder, "benchmark", h[0].shape[1])
        index.upsert(items, unit(np.concatenate(h)))
        arrays = compute(index, lambda stage, share: None)
    threshold = float(arrays["own"])
    groups = group(arrays, threshold)
    original = {id: i if i < n else of[i - n] for i, id in enumerate(ids)}
    right, wrong = set(), 0
    for one in groups:
        for other in one.exact + one.near:
            if original[other] == original[one.keep]:
                right.add(original[other])
            else:
                wrong += 1
    rows = []
    for kind in KINDS:
        copied = [i for i, its in zip(of, kinds, strict=True) if its == kind]
        rows.append({"copies": kind, "planted": len(copied), "found": len(right & set(copied))})
    print(f"{n} pictures, {len(of)} copies, {encoder}: threshold {threshold:.5f}, {len(groups)} groups, {wrong} wrong")
    if is_too_much(groups, len(files)):
        print("they are too many: none would be suggested")
    publish("duplicates", rows, {"precision": len(right) / max(1, len(right) + wrong), "recall": len(right) / len(of)})


def planted(file: bytes, kind: str, rng: np.random.Generator) -> bytes:
    """A changed copy of a picture, as a JPEG file."""
    with Image.open(io.BytesIO(file)) as opened_file:
        image = opened_file.convert("RGB")
    width, height = image.size
    quality = 90
    if kind == "recompressed":
        quality = int(rng.integers(40, 81))
    elif kind == "resized":
        share = rng.uniform(0.5, 0.8)
        image = image.resize((max(1, round(width * share)), max(1, round(height * share))))
    else:
        left, top, right, bottom = rng.uniform(0, 0.04, 4)
        box = (width * left, height * top, width * (1 - right), height * (1 - bottom))
        image = image.crop(tuple(round(side) for side in box))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def opened(encoder: str) -> Extractor:
    if encoder != UNTRAINED:
        return open_encoder(encoder)
    torch.manual_seed(0)
    return Extractor(encoder, Preprocessing(64), extract_with_torch(ResNetEncoder("tiny", 1, 64).eval()))


def compare_all(options: Options) -> None:
    n = QUICK if options.quick else options.rows
    rows = []
    for spectrum, power in (("decaying", -0.5), ("flat", 0.0)):
        vectors = clustered(n, options.dimension, power)
        started = time.perf_counter()
        expected = all_pairs(vectors, options.threshold)
        all_s, started = time.perf_counter() - started, time.perf_counter()
        pairs = near_pairs(vectors, options.threshold)
        ours_s = time.perf_counter() - started
        found = set((pairs.first.astype(np.int64) * n + pairs.second).tolist())
        rows.append(
            {
                "spectrum": spectrum,
                "vectors": n,
                "pairs": len(expected),
                "found": len(found & expected),
                "too many": len(found - expected),
                "all pairs (s)": all_s,
                "ours (s)": ours_s,
                "share": ours_s / all_s,
            }
        )
    recall = min(row["found"] / row["pairs"] for row in rows)
    publish("duplicates", rows, {"pairs_recall": recall, "over_all_pairs": rows[0]["share"]})


def clustered(n: int, d: int, power: float) -> np.ndarray:
    """Unit vectors (n, d) in clusters; direction k is scaled by k ** power."""
    rng = np.random.default_rng(0)
    scale = np.arange(1, d + 1, dtype=np.float32) ** power
    centres = rng.standard_normal((CLUSTERS, d), np.float32)
    vectors = (centres[rng.integers(CLUSTERS, size=n)] + 0.6 * rng.standard_normal((n, d), np.float32)) * scale
    originals, copies = rng.integers(n, size=(2, n // 20))
    noise = unit(rng.standard_normal((len(copies), d))) * rng.uniform(0.05, 0.5, (len(copies), 1))
    vectors[copies] = unit(vectors[originals]) + noise
    return unit(vectors)


def all_pairs(vectors: np.ndarray, threshold: float) -> set[int]:
    """The pairs i < j above the threshold, each as i * n + j."""
    n, pairs = len(vectors), set()
    for i in range(0, n, BLOCK):
        for j in range(i, n, BLOCK):
            a, b = np.nonzero(vectors[i : i + BLOCK] @ vectors[j : j + BLOCK].T >= threshold)
            a, b = a + i, b + j
            pairs.update((a * n + b)[a < b].tolist())
    return pairs


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
