"""Sets larger than the disk: pictures are decoded each time they are read, by threads, ahead of the training step.

A Stream takes the place of a PixelStore and gives the same pixels. Any picture can be read at any time, also inside a
.tar, so an epoch follows the true shuffle drawn by the training, without a shuffle buffer. Memory holds the list of
pictures and a few batches. Reads are random: fast on an SSD, slow on a hard disk.
"""

import shutil
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.artifact import Preprocessing, UnreadableImage, read_pixels
from training.data import store
from training.data.sources import DataError, Source, SourcePicture
from training.data.store import PixelStore

Indices = int | slice | Sequence[int] | np.ndarray
SHARE_OF_DISK = 0.5  # largest share of the free disk that a store may take
FEW = 16  # a smaller batch with unreadable pictures is extended by this many, to find replacements


class Pixels:
    """`pixels[indices]` like the array of a PixelStore, uint8 (n, S, S, 3), decoded by threads. Thread-safe.

    An unreadable picture is recorded in `unreadable` and replaced by another one of the same batch. The choice depends
    on the batch alone, so that a resumed run sees the same.
    raises  DataError when more than half of a batch is unreadable
    """

    def __init__(self, pictures: Sequence[SourcePicture], rows: np.ndarray, preprocessing: Preprocessing) -> None:
        """rows: (N,) int64, ascending, the places in `pictures` of the pictures of this split."""
        self.pictures, self.rows, self.preprocessing = pictures, rows, preprocessing
        self.shape = (len(rows), preprocessing.size_px, preprocessing.size_px, 3)
        self.unreadable: dict[int, tuple[str, str]] = {}  # place in `pictures` -> name, reason
        self._threads = ThreadPoolExecutor()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: Indices) -> np.ndarray:
        rows = self.rows[indices]
        pixels = self._batch(np.atleast_1d(rows))
        return pixels if np.ndim(rows) else pixels[0]

    def _batch(self, rows: np.ndarray) -> np.ndarray:
        pixels = np.empty((len(rows), *self.shape[1:]), np.uint8)
        readable = np.fromiter(self._threads.map(self._decode, rows.tolist(), pixels), bool, len(rows))
        if readable.all():
            return pixels
        if len(rows) < FEW:
            after = np.searchsorted(self.rows, rows[-1]) + 1 + np.arange(FEW)
            return self._batch(np.append(rows, self.rows[after % len(self)]))[: len(rows)]
        broken = np.flatnonzero(~readable)
        if len(broken) > len(rows) / 2:
            name, reason = self.unreadable[rows[broken[0]]]
            raise DataError(f"{len(broken)} files of {len(rows)} are not readable pictures: {name} {reason}")
        pixels[broken] = pixels[np.flatnonzero(readable)[: len(broken)]]
        return pixels

    def _decode(self, row: int, pixels: np.ndarray) -> bool:
        picture = self.pictures[row]
        try:
            pixels[:] = read_pixels(picture.read(), self.preprocessing)
        except UnreadableImage as error:
            self.unreadable[row] = (picture.name, str(error))
            return False
        return True


@dataclass(frozen=True)
class Stream:
    """A PixelStore without a folder. The fields that both have mean the same."""

    source: str
    pixels: Pixels
    labels: np.ndarray
    classes: list[str]

    @property
    def names(self) -> list[str]:
        return [self.pixels.pictures[row].name for row in self.pixels.rows]

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Unreadable pictures found so far. They are replaced, whereas a PixelStore leaves them out."""
        return [self.pixels.unreadable[row] for row in sorted(self.pixels.unreadable)]

    def __len__(self) -> int:
        return len(self.pixels)


def load(
    source: Source, preprocessing: Preprocessing, split: str, cache: Path = Path("data"), stream: bool | None = None
) -> PixelStore | Stream:
    """One split of a source: as a PixelStore if the disk has room for it, otherwise as a Stream.

    stream  True or False overrides that choice; by default a set that is already decoded is not streamed

    The other arguments and errors are those of store.load.
    """
    rows, labels, number = array("q"), array("q"), {}
    for row, picture in enumerate(source.pictures):
        label = -1 if picture.label is None else number.setdefault(picture.label, len(number))
        if picture.split == split:
            rows.append(row)
            labels.append(label)
    why = "--stream was given"
    if stream is None:
        why = too_large(len(rows), preprocessing.size_px, _free_bytes(cache))
        pictures = (source.pictures[row] for row in rows)
        stream = bool(why) and not store.store_folder(source, pictures, preprocessing, split, cache).is_dir()
    if not stream or not rows:  # store.load reports an empty split
        return store.load(source, preprocessing, split, cache)
    print(f"decoding the {len(rows):,} pictures of {source.name} ({split}) in every epoch: {why}")
    classes = sorted(number)
    place = {label: i for i, label in enumerate(classes)}
    sorted_number = np.array([*(place[label] for label in number), -1])  # -1 stays the last, -1
    pixels = Pixels(source.pictures, np.array(rows), preprocessing)
    return Stream(source.name, pixels, sorted_number[np.array(labels)], classes)


def too_large(pictures: int, size_px: int, free_bytes: int) -> str:
    """Why the decoded pictures should not be written to a disk with `free_bytes` free; empty if they should be."""
    needed = pictures * size_px**2 * 3
    if needed <= SHARE_OF_DISK * free_bytes:
        return ""
    needed_gib, free_gib = needed / 2**30, free_bytes / 2**30
    return f"stored, they would take {needed_gib:,.1f} GiB of the {free_gib:,.1f} GiB that are free on the disk"


def _free_bytes(folder: Path) -> int:
    """Free space of the disk that holds the folder, or will hold it."""
    folder = Path(folder).absolute()
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir())).free


class StreamedRows:
    """A view of pixels[indices] that reads only the rows asked for, so that they need not fit in memory."""

    def __init__(self, pixels: np.ndarray | Pixels, indices: np.ndarray) -> None:
        self.pixels, self.indices = pixels, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: Indices) -> np.ndarray:
        return self.pixels[self.indices[rows]]
