"""Sets larger than the disk: each picture is decoded anew whenever it is asked for, ahead of the step that wants it.

A Stream stands where a PixelStore stands and gives the same pixels. Any picture can be read at any time, a member of a .tar
too, so an epoch's order is the true shuffle that the training draws, and no buffer of pictures is shuffled instead.
Memory holds the listing and a few batches. Reads are at random: fit for SSDs, slow on a disk that spins.
"""

import shutil
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.artifact import Preprocessing, UnreadableImage, read_pixels
from training.data import store
from training.data.sources import DataError, Picture, Source
from training.data.store import PixelStore

SHARE_OF_DISK = 0.5  # of what is free; a store that needs more is not written
FEW = 16  # pictures; fewer say little about a set, and may hold none that replaces another


class Pixels:
    """`pixels[indices]` as of a PixelStore's array, uint8 (n, S, S, 3), decoded by threads. May be asked from any thread.

    A picture that cannot be read is noted in `unreadable`, and in its place stands another of the same batch: a
    function of the batch alone, so a run that is continued sees the same. raises DataError where more than half of a
    batch cannot be read.
    """

    def __init__(self, pictures: Sequence[Picture], rows: np.ndarray, preprocessing: Preprocessing):
        """rows: (N,) int64, ascending, the places in `pictures` that this is about."""
        self.pictures, self.rows, self.preprocessing = pictures, rows, preprocessing
        self.shape = (len(rows), preprocessing.size_px, preprocessing.size_px, 3)
        self.unreadable: dict[int, tuple[str, str]] = {}  # place in `pictures`: name, reason
        self._threads = ThreadPoolExecutor()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices) -> np.ndarray:
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
            raise DataError(f"{len(broken)} files of {len(rows)} are no readable pictures: {name} {reason}")
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
    """What a PixelStore is, without its folder. The fields that both have mean the same."""

    source: str
    pixels: Pixels
    labels: np.ndarray
    classes: list[str]

    @property
    def names(self) -> list[str]:
        return [self.pixels.pictures[row].name for row in self.pixels.rows]

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Those met so far. They are counted and replaced, whereas a PixelStore leaves them out."""
        return [self.pixels.unreadable[row] for row in sorted(self.pixels.unreadable)]

    def __len__(self) -> int:
        return len(self.pixels)


def load(
    source: Source, preprocessing: Preprocessing, split: str, cache: Path = Path("data"), stream: bool | None = None
) -> PixelStore | Stream:
    """One split of a source: as a PixelStore where the disk has room for it, otherwise as a Stream.

    stream  True or False decides instead; a set that was decoded before is not streamed by itself
    others  as of store.load
    raises  DataError
    """
    rows, labels, number = array("q"), array("q"), {}
    for row, picture in enumerate(source.pictures):
        label = -1 if picture.label is None else number.setdefault(picture.label, len(number))
        if picture.split == split:
            rows.append(row)
            labels.append(label)
    why = "as asked for"
    if stream is None:
        why = too_large(len(rows), preprocessing.size_px, _free_bytes(cache))
        pictures = (source.pictures[row] for row in rows)
        stream = bool(why) and not store.place(source, pictures, preprocessing, split, cache).is_dir()
    if not stream or not rows:  # the store refuses an empty split
        return store.load(source, preprocessing, split, cache)
    print(f"streaming the {len(rows):,} pictures of {source.name} ({split}) from where they are: {why}")
    classes = sorted(number)
    place = {label: i for i, label in enumerate(classes)}
    sorted_number = np.array([*(place[label] for label in number), -1])  # -1 stays the last, -1
    pixels = Pixels(source.pictures, np.array(rows), preprocessing)
    return Stream(source.name, pixels, sorted_number[np.array(labels)], classes)


def too_large(pictures: int, size_px: int, free_bytes: int) -> str:
    """Why so many pictures are not to be decoded onto a disk with so much free, in words; empty where they are."""
    needed = pictures * size_px**2 * 3
    if needed <= SHARE_OF_DISK * free_bytes:
        return ""
    needed_gib, free_gib = needed / 2**30, free_bytes / 2**30
    return f"decoded, they would take {needed_gib:,.1f} GiB of the {free_gib:,.1f} GiB that are free on the disk"


def _free_bytes(folder: Path) -> int:
    """On the disk where a folder is, or would be made."""
    folder = Path(folder).absolute()
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir())).free


def ahead(indices: Iterable[np.ndarray], pixels, batches: int = 2) -> Iterator[np.ndarray]:
    """pixels[i] for each i of `indices`, in their order; up to `batches` are made while the caller works on one.

    pixels  a Stream's, or a PixelStore's, whose pictures then leave the disk in the meantime
    An error stands in its batch's place. Whoever stops early, by close() or by dropping the iterator, waits for the
    batches that are being made, and no thread is left.
    """
    threads, waiting = ThreadPoolExecutor(batches), deque()
    try:
        for i in indices:
            waiting.append(threads.submit(pixels.__getitem__, i))
            if len(waiting) > batches:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)


class StreamedRows:
    """pixels[indices], of which only what is asked for is made: what is measured need not fit in memory."""

    def __init__(self, pixels, indices: np.ndarray):
        self.pixels, self.indices = pixels, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, some) -> np.ndarray:
        return self.pixels[self.indices[some]]
