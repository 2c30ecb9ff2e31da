"""Filling a collection: threads read, decode and encode pictures, and one writes what they have done.

On the CPU each thread decodes a batch and then encodes it on its own core, so that no core waits for another; twice as
many threads as cores are at it, of which some read. On a GPU one encodes while the others decode.
"""

import csv
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from export.artifact import MAX_PIXELS, Bundle, Preprocessing, TooManyPixels, UnreadableImage
from serving.collection.index import Index, Item, content_id
from serving.indexing.originals import Original
from serving.inference.decode import LARGE_PIXELS
from serving.inference.encoder import CPU, MAX_BATCH, OnnxEncoder
from serving.inference.thumbnail import Read, read
from serving.limits import cores

# Each upsert leaves a piece on the disk that every search looks into, until they are joined.
LEAST_ROWS, ROWS_PER_UPSERT = 512, 2048  # while nothing else is being written; in any case
COMMIT_S = 15.0  # work that a crash may cost
LOOK_S = 0.2  # how often the bar is moved on
# Of a batch on the CPU: larger ones are no faster there, and at the end cores wait for whoever has the last.
ENOUGH_PIXELS, LEAST_BATCH = 2**19, 4

Encode = Callable[[np.ndarray], np.ndarray]


@dataclass
class Tally:
    indexed: int = 0
    present: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason, which completes "<name> ..."."""
    ids: dict[str, str] = field(default_factory=dict)
    """By name, of every file that could be read; only where it is asked for."""

    def __str__(self) -> str:
        return f"indexed {self.indexed:,}, already there {self.present:,}, skipped {len(self.skipped):,}"

    def __iadd__(self, other: "Tally") -> "Tally":
        self.indexed += other.indexed
        self.present += other.present
        self.skipped += other.skipped
        return self


class Work(NamedTuple):
    """What one thread does at a time."""

    encode: Encode
    """uint8 (n, S, S, 3) -> float32 (n, d), for any n from 1 to MAX_BATCH; from all threads at once."""
    preprocessing: Preprocessing
    threads: int
    batch: int = MAX_BATCH
    """Pictures."""


def work_of(bundle: Bundle, threads: int | None = None) -> Work:
    """For as many cores as `threads`, by default all. raises BundleError."""
    threads = threads or cores()
    encoder = OnnxEncoder(bundle, threads=1)
    on_cpu, size_px = encoder.providers[0] == CPU, bundle.card.preprocessing.size_px
    at_once = threading.Semaphore(threads if on_cpu else 1)
    batch = max(LEAST_BATCH, min(MAX_BATCH, ENOUGH_PIXELS // size_px**2)) if on_cpu else MAX_BATCH

    def encode(pixels: np.ndarray) -> np.ndarray:
        with at_once:
            return encoder(pixels)

    return Work(encode, bundle.card.preprocessing, 2 * threads, batch)


def fill(
    originals: Iterable[Original],
    count: int,
    work: Work,
    index: Index,
    tally: Tally,
    known: set[str] | None = None,
    beside: bool = False,
    note_ids: bool = False,
    quiet: bool = False,
) -> None:
    """Add what is not there yet, counting in `tally` as it goes.

    count     of the originals, for the bar
    known     ids that are there already, by default the index's; those that are added come to them
    beside    whether another encoder's vectors may stand beside these
    note_ids  whether tally.ids is wanted
    quiet     no bar
    raises    IndexProblem, and what `originals` raises. What is embedded by then is kept, also where Ctrl-C ends it.
    """
    threads = _Threads(originals, work, index, tally, index.ids() if known is None else known, beside, note_ids)
    with (
        tqdm(total=count, desc="indexing", unit="img", dynamic_ncols=True, disable=quiet) as bar,
        closing(threads.writer),
        ThreadPoolExecutor(work.threads, "filling") as pool,
    ):
        try:
            running = {pool.submit(threads.run) for _ in range(work.threads)}
            while running:
                done, running = wait(running, LOOK_S, FIRST_EXCEPTION)
                bar.update(threads.taken - bar.n)
                for thread in done:
                    thread.result()
        finally:
            threads.stop.set()  # they finish what they have in hand


def write_skipped(path: Path, skipped: list[tuple[str, str]]) -> None:
    """Of the last run; no file where nothing was skipped."""
    if not skipped:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file).writerows([("name", "reason"), *sorted(skipped)])


class _New(NamedTuple):
    item: Item
    thumbnail: bytes
    pixels: np.ndarray  # uint8 (S, S, 3)


class _Threads:
    """What they do, and what they share."""

    def __init__(self, originals, work, index, tally, known, beside, note_ids):
        self.taken = 0
        self.stop = threading.Event()
        self.writer = _Writer(index, tally, beside)
        self._originals: Iterator[Original] = iter(originals)
        self._work, self._tally, self._known, self._note_ids = work, tally, known, note_ids
        self._lock, self._large = threading.Lock(), threading.Lock()

    def run(self) -> None:
        """One thread, until there is nothing more."""
        while batch := self._batch():
            vectors = self._work.encode(np.stack([new.pixels for new in batch]))
            self.writer.put([new.item for new in batch], vectors, {new.item.id: new.thumbnail for new in batch})

    def _batch(self) -> list[_New]:
        """As many that are not known, and now are, as make a batch; fewer at the end only."""
        batch = []
        while len(batch) < self._work.batch and not self.stop.is_set():
            with self._lock:
                if (original := next(self._originals, None)) is None:
                    break
                self.taken += 1
            try:
                new = self._look(original)
            except UnreadableImage as error:
                self._tally.skipped.append((original.name, str(error)))
                continue
            with self._lock:
                if new is None or new.item.id in self._known:  # or another thread had the same one in hand
                    self._tally.present += 1
                else:
                    self._known.add(new.item.id)
                    batch.append(new)
        return batch

    def _look(self, original: Original) -> _New | None:
        """None for one that is known. raises UnreadableImage."""
        if original.id in self._known:
            return None
        data = original.read()
        id = content_id(data)
        if self._note_ids:
            self._tally.ids[original.name] = id
        if original.id not in (None, id):
            raise UnreadableImage(f"has another content than when it was indexed: {original.path}")
        if id in self._known:
            return None
        picture = self._read(data)
        facts = (original.name, original.label, original.path, picture.width, picture.height, len(data))
        return _New(Item(id, *facts, dict(original.metadata)), picture.thumbnail, picture.pixels)

    def _read(self, data: bytes) -> Read:
        """Of very large pictures one at a time: while it is decoded each takes gigabytes."""
        try:
            return read(data, self._work.preprocessing, LARGE_PIXELS)
        except TooManyPixels:
            with self._large:
                return read(data, self._work.preprocessing, MAX_PIXELS)


class _Writer:
    """Gathers rows, and writes them while the next ones gather: no more than two portions are in memory."""

    def __init__(self, index: Index, tally: Tally, beside: bool):
        self._index, self._tally, self._beside = index, tally, beside
        self._rows: list[tuple] = []
        self._since = 0.0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, "writing")
        self._writing = self._pool.submit(lambda: None)

    def put(self, items: list[Item], vectors: np.ndarray, thumbnails: dict[str, bytes]) -> None:
        """raises what a write before this one has raised"""
        with self._lock:
            if not self._rows:
                self._since = time.monotonic()
            self._rows.append((items, vectors, thumbnails))
            rows, late = sum(len(items) for items, _, _ in self._rows), time.monotonic() - self._since > COMMIT_S
            if late or rows >= (LEAST_ROWS if self._writing.done() else ROWS_PER_UPSERT):
                self._commit()

    def close(self) -> None:
        """Write the rest. raises as put"""
        with self._pool:
            self._commit()
            self._writing.result()

    def _commit(self) -> None:
        self._writing.result()  # whoever holds the lock waits here, and then the others for it
        rows, self._rows = self._rows, []
        if rows:
            self._writing = self._pool.submit(self._write, rows)

    def _write(self, rows: list[tuple]) -> None:
        items = [item for some, _, _ in rows for item in some]
        vectors = np.concatenate([some for _, some, _ in rows])
        thumbnails = {id: jpeg for _, _, some in rows for id, jpeg in some.items()}
        self._index.upsert(items, vectors, thumbnails, self._beside)
        self._tally.indexed += len(items)
