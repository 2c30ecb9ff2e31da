"""Fills a collection: threads read, decode and encode pictures, and one more thread writes the results.

On the CPU each thread decodes a batch and then encodes it on its own core, so that no core waits for another. There are
twice as many threads as cores, because some of them wait for files. On a GPU one thread encodes and the others decode.
Each thread decodes in a process of its own: a file that crashes its decoder is skipped and listed.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from export.artifact import Bundle, Preprocessing, TooManyPixels, UnreadableImage
from export.spreadsheet import save_rows
from serving.collection.index import Index, Item, content_id
from serving.indexing.originals import Original
from serving.inference import decode
from serving.inference.decode import BYTES_PER_CALL, FILES_PER_CALL, LANES, DecodingLane, NotDecoded
from serving.inference.encoder import CPU, MAX_BATCH, OnnxEncoder
from serving.inference.reading import Done, FileProblem
from serving.inference.thumbnail import DecodedPicture
from serving.limits import DECODE_S, cores

# Each upsert leaves a fragment on the disk, which every search has to read until fragments are merged.
MIN_ROWS_PER_UPSERT = 512  # written when the writer is idle
MAX_ROWS_PER_UPSERT = 2048  # written even if the threads have to wait for the writer
COMMIT_S = 15.0  # commit at least this often: a crash loses no more work than this
BAR_S = 0.2  # how often the progress bar moves
# Larger batches are no faster on the CPU, and at the end the other cores would wait longer for the last one.
MAX_CPU_BATCH_PIXELS, MIN_CPU_BATCH = 2**19, 4

DECODING = DecodingLane(LANES["quick"].max_work, DECODE_S)


@dataclass
class Tally:
    indexed: int = 0
    present: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason; together they form a sentence."""
    ids: dict[str, str] = field(default_factory=dict)
    """Id of every file that could be read, by name; only if `note_ids` is set."""
    paths: dict[str, str] = field(default_factory=dict)
    """The same by path, of those that have one and are pictures."""

    def __str__(self) -> str:
        return f"indexed {self.indexed:,}, already there {self.present:,}, skipped {len(self.skipped):,}"

    def __iadd__(self, other: "Tally") -> "Tally":
        self.indexed += other.indexed
        self.present += other.present
        self.skipped += other.skipped
        return self


class BatchEncoder(NamedTuple):
    encode: Callable[[np.ndarray], np.ndarray]
    """uint8 (n, S, S, 3) -> float32 (n, d), for n from 1 to MAX_BATCH; from all threads at once."""
    preprocessing: Preprocessing
    threads: int
    """Threads that decode and encode."""
    batch: int = MAX_BATCH
    """Pictures in a batch."""


def batch_encoder(bundle: Bundle, cpu_cores: int | None = None) -> BatchEncoder:
    """Raises BundleError. cpu_cores: by default all."""
    cpu_cores = cpu_cores or cores()
    encoder = OnnxEncoder(bundle, threads=1)
    on_cpu, size_px = encoder.providers[0] == CPU, bundle.card.preprocessing.size_px
    at_once = threading.Semaphore(cpu_cores if on_cpu else 1)
    batch = max(MIN_CPU_BATCH, min(MAX_BATCH, MAX_CPU_BATCH_PIXELS // size_px**2)) if on_cpu else MAX_BATCH

    def encode(pixels: np.ndarray) -> np.ndarray:
        with at_once:
            return encoder(pixels)

    return BatchEncoder(encode, bundle.card.preprocessing, 2 * cpu_cores, batch)


def fill(
    originals: Iterable[Original],
    count: int,
    encoder: BatchEncoder,
    index: Index,
    tally: Tally,
    known: set[str] | None = None,
    allow_other_encoder: bool = False,
    note_ids: bool = False,
    quiet: bool = False,
) -> None:
    """Add the pictures that are not in the collection yet, as one change. Updates `tally` during the work.

    count                number of originals, for the progress bar
    known                ids in the collection, by default read from `index`; the ids that are added are added here too
    allow_other_encoder  fill it even if the collection only has vectors of another encoder
    note_ids             fill in tally.ids
    quiet                no progress bar
    raises               IndexProblem, and what `originals` raises. The pictures embedded by then are stored, also after
                         Ctrl-C.
    """
    known = index.ids() if known is None else known
    with index.one_change() as whole:
        writer = _IndexWriter(whole, tally, allow_other_encoder)
        _fill(_Threads(originals, encoder, writer, tally, known, note_ids), count, encoder, index, quiet)


def _fill(threads: "_Threads", count: int, encoder: BatchEncoder, index: Index, quiet: bool) -> None:
    with (
        index.filling(),
        tqdm(total=count, desc="indexing", unit="img", dynamic_ncols=True, disable=quiet) as bar,
        closing(threads.writer),
        ThreadPoolExecutor(encoder.threads, "filling") as pool,
    ):
        try:
            running = {pool.submit(threads.run) for _ in range(encoder.threads)}
            while running:
                done, running = wait(running, BAR_S, FIRST_EXCEPTION)
                bar.update(threads.taken - bar.n)
                for thread in done:
                    thread.result()
        except KeyboardInterrupt:
            if not quiet:
                bar.write("stopping: the pictures embedded so far are being stored")
            raise
        finally:
            threads.stop.set()  # they finish their current batches


def write_skipped(path: Path, skipped: list[tuple[str, str]]) -> None:
    """Replace the list of the last run; delete the file if nothing was skipped."""
    if not skipped:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    save_rows(path, [("name", "reason"), *sorted(skipped)])


class _Read(NamedTuple):
    original: Original
    id: str
    data: bytes


class _Decoded(NamedTuple):
    item: Item
    thumbnail: bytes
    pixels: np.ndarray  # uint8 (S, S, 3)


class _Rows(NamedTuple):
    items: list[Item]
    vectors: np.ndarray  # (n, d)
    thumbnails: Mapping[str, bytes]


class PictureReader:
    """Decodes files, in the process of the thread that calls it."""

    def __init__(self, preprocessing: Preprocessing):
        self._preprocessing, self._one_large = preprocessing, threading.Lock()

    def __call__(self, process: decode.DecodingProcess, files: Sequence[bytes]) -> Iterator[DecodedPicture | str]:
        """The picture of each file, or the reason why there is none."""
        while files:
            try:
                answers = process("picture", files, self._preprocessing)
            except NotDecoded as error:  # one of the files
                if len(files) > 1:
                    for data in files:
                        yield from self(process, [data])
                    return
                answers = [FileProblem(UnreadableImage(f"was not decoded: {error}"))]
            for data, answer in zip(files, answers, strict=False):
                if isinstance(answer, FileProblem) and isinstance(answer.error, TooManyPixels) and answer.error.work:
                    answer = self._large(data, answer.error.work)
                yield answer.result if isinstance(answer, Done) else str(answer.error)
            files = files[len(answers) :]  # a process may stop at a file that cannot be decoded

    def _large(self, data: bytes, work: int) -> Done | FileProblem:
        """Decodes a large picture, one at a time, because each takes gigabytes of memory."""
        with self._one_large, closing(decode.DecodingProcess(LANES["large"])) as process:
            max_work = min(work, process.lane.max_work)
            try:
                return process("picture", [data], self._preprocessing, max_work=max_work)[0]
            except NotDecoded as error:
                return FileProblem(UnreadableImage(f"was not decoded: {error}"))


class _Threads:
    """The work of the threads, and the state they share."""

    def __init__(
        self,
        originals: Iterable[Original],
        encoder: BatchEncoder,
        writer: "_IndexWriter",
        tally: Tally,
        known: set[str],
        note_ids: bool,
    ):
        self.taken = 0
        self.stop = threading.Event()
        self.writer = writer
        self._originals: Iterator[Original] = iter(originals)
        self._encoder, self._tally, self._known, self._note_ids = encoder, tally, known, note_ids
        self._lock, self._pictures = threading.Lock(), PictureReader(encoder.preprocessing)

    def run(self) -> None:
        """Embed batches until no originals are left. Each thread runs this."""
        with closing(decode.DecodingProcess(DECODING)) as process:
            self._run(process)

    def _run(self, process: decode.DecodingProcess) -> None:
        while batch := self._next_batch(process):
            vectors = self._encoder.encode(np.stack([decoded.pixels for decoded in batch]))
            thumbnails = {decoded.item.id: decoded.thumbnail for decoded in batch}
            self.writer.put(_Rows([decoded.item for decoded in batch], vectors, thumbnails))

    def _next_batch(self, process: decode.DecodingProcess) -> list[_Decoded]:
        """Returns a full batch of unknown pictures, and a smaller one at the end. Adds their ids to the known ids."""
        batch: list[_Decoded] = []
        while len(batch) < self._encoder.batch and not self.stop.is_set():
            read, any_left = self._read_some(self._encoder.batch - len(batch))
            pictures = self._pictures(process, [file.data for file in read])
            for (original, id, data), picture in zip(read, pictures, strict=True):
                if isinstance(picture, str):
                    self._tally.skipped.append((original.name, picture))
                    self._tally.paths.pop(original.path or "", None)
                elif self._is_new(id):
                    facts = (original.name, original.label, original.path, picture.width, picture.height, len(data))
                    item = Item(id, *facts, dict(original.metadata))
                    batch.append(_Decoded(item, picture.thumbnail, picture.pixels))
            if not any_left:
                break
        return batch

    def _read_some(self, most: int) -> tuple[list[_Read], bool]:
        """Reads the unknown files of one call to a process, and returns whether any are left."""
        read: list[_Read] = []
        size = 0
        while len(read) < min(most, FILES_PER_CALL) and size < BYTES_PER_CALL and not self.stop.is_set():
            with self._lock:
                if (original := next(self._originals, None)) is None:
                    return read, False
                self.taken += 1
            try:
                file = self._read_unless_known(original)
            except UnreadableImage as error:
                self._tally.skipped.append((original.name, str(error)))
                continue
            if file is None:
                with self._lock:
                    self._tally.present += 1
            else:
                read.append(file)
                size += len(file.data)
        return read, True

    def _is_new(self, id: str) -> bool:
        """Adds it to the known ids. It may be known because another thread had the same file."""
        with self._lock:
            if id in self._known:
                self._tally.present += 1
                return False
            self._known.add(id)
            return True

    def _read_unless_known(self, original: Original) -> _Read | None:
        """Raises UnreadableImage."""
        if original.id in self._known:
            return None
        data = original.read()
        id = original.id if original.is_item and original.id else content_id(data)
        if self._note_ids:
            self._tally.ids[original.name] = id
            if original.path is not None:
                self._tally.paths[original.path] = id
        if original.id not in (None, id):
            raise UnreadableImage(f"has changed since it was indexed: {original.path}")
        return None if id in self._known else _Read(original, id, data)


class _IndexWriter:
    """Gathers rows, and writes them while the next ones are gathered: at most two upserts are in memory."""

    def __init__(self, index: Index, tally: Tally, allow_other_encoder: bool):
        self._index, self._tally, self._allow_other_encoder = index, tally, allow_other_encoder
        self._gathered: list[_Rows] = []
        self._since = 0.0
        self._rows = 0  # written since the last maintenance
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, "writing")
        self._writing = self._pool.submit(lambda: None)

    def put(self, rows: _Rows) -> None:
        """Raises the error of an earlier write."""
        with self._lock:
            if not self._gathered:
                self._since = time.monotonic()
            self._gathered.append(rows)
            count = sum(len(rows.items) for rows in self._gathered)
            late = time.monotonic() - self._since > COMMIT_S
            if late or count >= (MIN_ROWS_PER_UPSERT if self._writing.done() else MAX_ROWS_PER_UPSERT):
                self._commit()

    def close(self) -> None:
        """Write the rest. Raises like put."""
        with self._pool:
            self._commit()
            self._writing.result()

    def _commit(self) -> None:
        self._writing.result()  # other threads wait for the lock meanwhile
        gathered, self._gathered = self._gathered, []
        if gathered:
            self._writing = self._pool.submit(self._write, gathered)

    def _write(self, gathered: list[_Rows]) -> None:
        items = [item for rows in gathered for item in rows.items]
        vectors = np.concatenate([rows.vectors for rows in gathered])
        thumbnails = {id: jpeg for rows in gathered for id, jpeg in rows.thumbnails.items()}
        self._index.upsert(items, vectors, thumbnails, self._allow_other_encoder)
        self._tally.indexed += len(items)
        self._rows += len(items)
        if self._rows >= self._index.rows_per_maintenance:
            self._index.maintain()
            self._rows = 0
