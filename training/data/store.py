"""The decoded pictures of a source: decoded once, in parallel, and kept on disk as one array of pixels.

    data/store/<name>-<split>-<size>px-<key>/
        pixels.npy     uint8 (N, S, S, 3), opened as a memory map, so that the system's page cache holds it
        facts.json     the source, the preprocessing, and the files that were skipped
        skipped.csv    name, reason; only if files were skipped

The key changes with the name, size or time of any file and with the preprocessing, so a store is never out of date.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from tqdm import tqdm

from export.artifact import Preprocessing, UnreadableImage, read_pixels
from export.spreadsheet import save_rows
from training.data.sources import DataError, Source, SourcePicture, make_once, none_readable

T = TypeVar("T")
R = TypeVar("R")
DECODING = 2  # part of the key: increase it when read_pixels gives other pixels than before
PER_TASK = 16  # pictures per task of a thread
AHEAD = 64  # tasks that may be queued or done before the oldest is written


@dataclass(frozen=True)
class PixelStore:
    source: str
    """The source's name."""
    pixels: np.ndarray
    """uint8 (N, S, S, 3) RGB, read-only."""
    labels: np.ndarray
    """int64 (N,), index into `classes`; -1 for a picture without label."""
    classes: list[str]
    """Class names of the whole source, so that a label means the same in both splits."""
    names: list[str]
    skipped: list[tuple[str, str]]
    """Name and reason of each file that is not a readable picture. The reason completes the sentence "<name> ..."."""
    folder: Path

    def __len__(self) -> int:
        return len(self.names)


Splits = tuple[PixelStore, PixelStore | None]
"""Training pictures, and test pictures if the source has a test split."""


def load(source: Source, preprocessing: Preprocessing, split: str, cache: Path = Path("data")) -> PixelStore:
    """Decode one split of a source, or open the store if it exists.

    split   train or test
    cache   folder; stores are kept in cache/store
    raises  DataError: the split has no pictures, none of them is readable, or the store cannot be written
    """
    pictures = [picture for picture in source.pictures if picture.split == split]
    if not pictures:
        others = ", ".join(f"{count:,} in {name}" for name, count in Counter(p.split for p in source.pictures).items())
        raise DataError(f"{source.name} has no pictures in its split {split}; there are {others}")
    folder = store_folder(source, pictures, preprocessing, split, cache)
    make_once(folder, partial(_write, source, pictures, preprocessing, split))
    try:
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        pixels = np.load(folder / "pixels.npy", mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is damaged; delete it, and it will be written again") from error
    skipped = [(name, reason) for name, reason in facts["skipped"]]
    if skipped:
        print(f"skipped {len(skipped):,} of {len(pictures):,} files (listed in {folder / 'skipped.csv'})")
    skipped_names = {name for name, _ in skipped}
    readable = [picture for picture in pictures if picture.name not in skipped_names]
    classes = sorted({picture.label for picture in source.pictures if picture.label is not None})
    number = {label: i for i, label in enumerate(classes)}
    labels = np.array([-1 if picture.label is None else number[picture.label] for picture in readable], dtype=np.int64)
    return PixelStore(source.name, pixels, labels, classes, [picture.name for picture in readable], skipped, folder)


def load_splits(source: Source, preprocessing: Preprocessing) -> Splits:
    """The train split, and the test split if the source has one. raises DataError like `load`"""
    tested = any(picture.split == "test" for picture in source.pictures)
    train = load(source, preprocessing, "train")
    return train, load(source, preprocessing, "test") if tested else None


def store_folder(
    source: Source, pictures: Iterable[SourcePicture], preprocessing: Preprocessing, split: str, cache: Path
) -> Path:
    """Folder that contains, or would contain, the decoded pictures."""
    key = _key(pictures, preprocessing)
    return Path(cache) / "store" / f"{source.name}-{split}-{preprocessing.size_px}px-{key}"


def _key(pictures: Iterable[SourcePicture], preprocessing: Preprocessing) -> str:
    digest = hashlib.sha256(json.dumps([DECODING, dataclasses.asdict(preprocessing)]).encode())
    for picture in pictures:
        digest.update(json.dumps([picture.name, picture.stamp]).encode())  # ASCII for any name
    return digest.hexdigest()[:16]


def _write(
    source: Source, pictures: list[SourcePicture], preprocessing: Preprocessing, split: str, folder: Path
) -> None:
    shape = (preprocessing.size_px, preprocessing.size_px, 3)
    needed = len(pictures) * np.prod(shape, dtype=np.int64)
    if shutil.disk_usage(folder).free < needed:
        raise DataError(f"the disk is full: {source.name} needs {needed / 2**20:,.0f} MiB in {folder.parent}")
    skipped = []
    tasks = [pictures[start : start + PER_TASK] for start in range(0, len(pictures), PER_TASK)]
    # A plain file: on a full disk a write raises an error, whereas a memory map would kill the process.
    with (
        open(folder / "pixels.npy", "wb") as file,
        closing(map_ahead(partial(_decode, preprocessing), tasks, AHEAD)) as decoded,
        tqdm(total=len(pictures), desc=f"decoding {source.name} ({split})", unit="img") as bar,
    ):
        _write_header(file, len(pictures), shape)
        for task, results in zip(tasks, decoded, strict=True):
            for picture, result in zip(task, results, strict=True):
                if isinstance(result, str):
                    skipped.append((picture.name, result))
                else:
                    file.write(result.tobytes())
            bar.update(len(task))
        file.seek(0)
        _write_header(file, len(pictures) - len(skipped), shape)
        file.flush()
        os.fsync(file.fileno())
    if len(skipped) == len(pictures):
        raise none_readable(skipped, source.name)
    if skipped:
        save_rows(folder / "skipped.csv", [("name", "reason"), *skipped])
    facts = {
        "source": source.name,
        "split": split,
        "preprocessing": dataclasses.asdict(preprocessing),
        "pictures": len(pictures) - len(skipped),
        "skipped": skipped,
    }
    (folder / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def _decode(preprocessing: Preprocessing, pictures: Sequence[SourcePicture]) -> list[np.ndarray | str]:
    """uint8 (S, S, 3) for each picture, or the reason why it cannot be read."""
    results: list[np.ndarray | str] = []
    for picture in pictures:
        try:
            results.append(read_pixels(picture.read(), preprocessing))
        except UnreadableImage as error:
            results.append(str(error))
    return results


def map_ahead(function: Callable[[T], R], items: Iterable[T], ahead: int) -> Generator[R, None, None]:
    """function(item) for each item, in order: threads compute up to `ahead` results before they are needed.

    An item's error is raised when its result is due. A caller that stops early, by close() or by dropping the iterator,
    waits for the calls in progress, and no thread is left.
    """
    pool, waiting = ThreadPoolExecutor(min(ahead, (os.cpu_count() or 1) + 4)), deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _write_header(file: BinaryIO, count: int, shape: tuple[int, ...]) -> None:
    """Write the header of a .npy file. Its length does not depend on `count`: numpy leaves room for the first axis."""
    np.lib.format.write_array_header_1_0(
        file,
        {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": (count, *shape)},
    )
