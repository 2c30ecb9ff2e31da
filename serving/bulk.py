"""Embed a collection of pictures and add it to the index, so that it can be searched.

    python serving/bulk.py --data ~/Pictures

Pictures that are in the index already are left as they are, so what was broken off is taken up by running it again.
Files that are no readable pictures are listed in INDEX/skipped.csv.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import csv
import io
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from export.artifact import BundleError, Preprocessing, UnreadableImage, read_image, read_pixels
from serving.encoder import MAX_BATCH, Encoder, find_bundle
from serving.index import Index, IndexProblem, Item, content_id
from serving.limits import cores
from training.data import DataError, Picture, open_source

THUMBNAIL_PX = 256
ROWS_PER_UPSERT = 1024  # each makes a piece on the disk that every search looks into, until they are joined at the end
AHEAD = 8 * MAX_BATCH  # pictures that may be decoded before the encoder has taken them


@dataclass(frozen=True)
class BulkSettings:
    data: str
    """A folder of images, a .zip of one, WebDataset shards ('shards/*.tar'), a torchvision name (cifar10, cifar100,
    stl10, ...), or shapes: the built-in set."""
    encoder: str | None = os.environ.get("TWINVIEW_ENCODER", "").partition(",")[0].strip() or None
    """An encoder bundle's folder, or a tag of BentoML's model store. By default the first that TWINVIEW_ENCODER names,
    else the newest under runs/."""
    index: Path = Path(os.environ.get("TWINVIEW_INDEX", "index"))
    """Folder of the collection; made where there is none. By default what TWINVIEW_INDEX names, else ./index."""
    split: Literal["all", "train", "test"] = "all"
    """Which part, where the data has parts."""


@dataclass
class Tally:
    indexed: int = 0
    present: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason, which completes "<name> ..."."""

    def __str__(self) -> str:
        return f"indexed {self.indexed:,}, already there {self.present:,}, skipped {len(self.skipped):,}"


class Prepared(NamedTuple):
    item: Item
    pixels: np.ndarray  # uint8 (S, S, 3)


def bulk(
    pictures: list[Picture],
    encode: Callable[[np.ndarray], np.ndarray],
    preprocessing: Preprocessing,
    index: Index,
    tally: Tally,
) -> None:
    """Add pictures to the index, counting in `tally` as it goes. Threads decode while the encoder works.

    encode  uint8 (n, S, S, 3) -> float32 (n, d), for any n from 1 to MAX_BATCH
    raises  IndexProblem. What is embedded by then is kept, also where Ctrl-C ends it.
    """
    known = index.ids()
    rows: list[tuple[list[Item], np.ndarray]] = []  # of each batch

    def commit() -> None:
        if rows:
            items = [item for batch, _ in rows for item in batch]
            index.upsert(items, np.concatenate([vectors for _, vectors in rows]))
            tally.indexed += len(items)
            rows.clear()

    new = _new(pictures, preprocessing, index, known, tally)
    try:
        while batch := list(islice(new, MAX_BATCH)):
            items, pixels = zip(*batch, strict=True)
            rows.append((items, encode(np.stack(pixels))))
            if len(rows) * MAX_BATCH >= ROWS_PER_UPSERT:
                commit()
    finally:
        commit()
    index.compact()


def _new(
    pictures: list[Picture], preprocessing: Preprocessing, index: Index, known: set[str], tally: Tally
) -> Iterator[Prepared]:
    """What is not yet `known`, in order; it then is. Up to AHEAD pictures are in the hands of threads."""
    pool = ThreadPoolExecutor(cores(), "decode")
    pending: deque[tuple[Picture, Future]] = deque()
    waiting = iter(pictures)
    try:
        for _ in tqdm(pictures, desc="indexing", unit="img", dynamic_ncols=True):
            for picture in islice(waiting, AHEAD - len(pending)):
                pending.append((picture, pool.submit(_prepare, picture, preprocessing, index, known)))
            picture, future = pending.popleft()
            try:
                prepared = future.result()
            except UnreadableImage as error:
                tally.skipped.append((picture.name, str(error)))
                continue
            if prepared is None or prepared.item.id in known:
                tally.present += 1
            else:
                known.add(prepared.item.id)
                yield prepared
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _prepare(picture: Picture, preprocessing: Preprocessing, index: Index, known: set[str]) -> Prepared | None:
    """Decode, and write the thumbnail. None for a picture that is known. raises UnreadableImage, IndexProblem."""
    data = picture.read()
    id = content_id(data)
    if id in known:
        return None
    pixels = read_pixels(data, preprocessing)
    image = read_image(data)
    width, height = image.size
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), reducing_gap=2.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    index.add_thumbnail(id, buffer.getvalue())
    path = _text(str(picture.path)) if picture.path else None
    return Prepared(Item(id, _text(picture.name), picture.label and _text(picture.label), path, width, height), pixels)


def _text(name: str) -> str:
    """File names may hold bytes that are no text; a table takes none."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def write_skipped(path: Path, skipped: list[tuple[str, str]]) -> None:
    """Of the last run; no file where nothing was skipped."""
    if not skipped:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file).writerows([("name", "reason"), *skipped])


def run(settings: BulkSettings) -> Tally:
    """raises DataError, BundleError, IndexProblem; KeyboardInterrupt after keeping what was done."""
    source = open_source(settings.data)
    pictures = [picture for picture in source.pictures if settings.split in ("all", picture.split)]
    if not pictures:
        raise DataError(f"{settings.data} has no {settings.split} split")
    bundle = find_bundle(settings.encoder)
    encoder, index = Encoder(bundle), Index(settings.index, bundle.card.id, bundle.card.dimension)
    print(f"embedding {len(pictures):,} pictures of {settings.data} with {bundle.card.id} into {settings.index}")
    tally = Tally()
    try:
        bulk(pictures, encoder, bundle.card.preprocessing, index, tally)
    except KeyboardInterrupt:
        print(f"stopped: {tally}; the same command goes on from here")
        raise
    write_skipped(settings.index / "skipped.csv", tally.skipped)
    listed = f" (see {settings.index / 'skipped.csv'})" if tally.skipped else ""
    print(f"{tally}{listed}; the index holds {index.count():,}")
    return tally


def main() -> None:
    import tyro

    try:
        run(tyro.cli(BulkSettings, description=__doc__))
    except (DataError, BundleError, IndexProblem, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
