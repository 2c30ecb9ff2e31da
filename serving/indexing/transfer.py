"""Moving collections: into a Parquet file, back from one, and from one index into another.

What is there already is not sent again, and what has changed is: whatever was broken off, the same call completes it.
A portion is durable once it is sent. Nothing is ever taken out of the target.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from export.artifact import UnreadableImage, read_image
from serving.cli.place import held
from serving.collection.exchange import ROWS_AT_ONCE, Contents, Writer
from serving.collection.index import Index, IndexProblem, Item, WrongEncoder, collections, unit
from serving.collection.store import Store
from serving.inference.thumbnail import thumbnail
from serving.limits import cores
from serving.protocol.filters import Filter
from training.data.sources import read_file

READERS = 16  # threads that wait for thumbnails
SAMPLE = 256  # items that are compared after a copy
SAME = 1e-5  # normalising a unit vector once more changes 1e-7
DIRECTIONS = 4

Rows = Iterable[tuple[list[Item], np.ndarray]]
Thumbnails = Callable[[Sequence[Item]], Iterable[tuple[str, bytes | None]]]


@dataclass
class Sent:
    sent: int = 0
    present: int = 0

    def __str__(self) -> str:
        return f"{self.sent:,} sent, {self.present:,} already there"


def export(index: Index, path: Path, where: Filter | None = None) -> int:
    """How many items there were. raises FileProblem, IndexProblem"""
    writer = Writer(path, index.encoder_id, index.dimension, index.name, index.keys())
    with _bar(index.count(where), "exporting") as bar, writer as file:
        for items, vectors in index.scan(where, ROWS_AT_ONCE):
            file.write(items, vectors)
            bar.update(len(items))
    return bar.n


def import_(contents: Contents, target: Index) -> Sent:
    """Thumbnails are made of the originals that still lie where they were; other items have none.

    raises FileProblem, IndexProblem
    """
    there = _thumbnails(target)

    def make(items: Sequence[Item]) -> Iterator[tuple[str, bytes | None]]:
        lacking = [item for item in items if item.path and target.thumbnail_path(item.id) not in there]
        return zip([item.id for item in lacking], pool.map(_make_thumbnail, lacking), strict=True)

    with _bar(contents.count, "importing") as bar, ThreadPoolExecutor(cores(), "thumbnails") as pool:
        return _send(contents.rows(), target, make, bar, beside=False)


def pairs(source: str, target: str, collection: str | None = None) -> list[tuple[Index, Index]]:
    """What is to be copied and where to, for each encoder of each collection, or of the one. raises IndexProblem"""
    if _place(source) == _place(target):
        raise IndexProblem(f"{source} and {target} are the same index")
    tables, there = held(source, collection), collections(target)
    for facts in tables:
        encoders = {facts.encoder, *facts.others}
        if strange := {other.encoder for other in there if other.name == facts.name} - encoders:
            raise WrongEncoder(
                f"{facts.name} holds vectors of {', '.join(sorted(strange))} in {target}, and of "
                f"{', '.join(sorted(encoders))} in {source}; copy it into another index"
            )
    return [
        tuple(Index(uri, facts.encoder, facts.dimension, facts.name) for uri in (source, target)) for facts in tables
    ]


def copy(source: Index, target: Index) -> Sent:
    """One encoder's table, with the thumbnails; then both are compared. raises IndexProblem"""
    lacking = _thumbnails(source) - _thumbnails(target)

    def read(items: Sequence[Item]) -> Iterator[tuple[str, bytes | None]]:
        ids = [item.id for item in items if source.thumbnail_path(item.id) in lacking]
        return zip(ids, pool.map(source.read_thumbnail, ids), strict=True)

    with _bar(source.count(), f"copying {source.name}") as bar, ThreadPoolExecutor(READERS, "thumbnails") as pool:
        sent = _send(source.scan(batch=ROWS_AT_ONCE), target, read, bar, beside=True)
    compare(source, target)
    return sent


def compare(source: Index, target: Index) -> None:
    """Whether all items of `source` are in `target`, and a sample of them is equal. raises IndexProblem"""
    ids = sorted(source.ids())
    if missing := sorted(set(ids) - target.ids()):
        raise IndexProblem(
            f"{len(missing):,} of {len(ids):,} items of {source.name} are not in {target.store.uri} after the copy, "
            f"{missing[0]} among them; the same command sends what is missing"
        )
    sample = random.sample(ids, min(SAMPLE, len(ids)))
    ours, theirs = source.get_many(sample), target.get_many(sample)
    for id, (item, vector) in ours.items():
        if id not in theirs or _facts(theirs[id][0]) != _facts(item) or not np.abs(vector - theirs[id][1]).max() < SAME:
            raise IndexProblem(
                f"{id} of {source.name} is not the same in {target.store.uri} after the copy; if nobody is writing to "
                f"either, the same command sends it again"
            )


class _There:
    """What an index holds, in some 150 bytes an item: facts as a hash, and a vector as a few products with others."""

    def __init__(self, index: Index, beside: bool):
        self._directions = np.random.default_rng(0).standard_normal((index.dimension, DIRECTIONS))
        self._rows: dict[str, int] = {}
        facts, products = [], [np.zeros((0, DIRECTIONS))]
        for items, vectors in _scan(index, beside):
            self._rows |= {item.id: len(self._rows) + i for i, item in enumerate(items)}
            facts += [hash(_facts(item)) for item in items]
            products.append(unit(vectors) @ self._directions)
        self._facts, self._products = np.array(facts, np.int64), np.concatenate(products)

    def lacks(self, items: Sequence[Item], vectors: np.ndarray) -> list[int]:
        """Which of them are not there, or are not the same there."""
        products = unit(vectors) @ self._directions
        rows = [self._rows.get(item.id) for item in items]
        return [
            i
            for i, row in enumerate(rows)
            if row is None
            or self._facts[row] != hash(_facts(items[i]))
            or not np.abs(self._products[row] - products[i]).max() < SAME
        ]


def _scan(index: Index, beside: bool) -> Rows:
    try:
        yield from index.scan(batch=ROWS_AT_ONCE)
    except WrongEncoder:  # another encoder's table is there, and this one's is to come
        if not beside:
            raise


def _send(rows: Rows, target: Index, thumbnails: Thumbnails, bar: tqdm, beside: bool) -> Sent:
    """beside  whether another encoder's vectors may stand beside these"""
    there, sent = _There(target, beside), Sent()
    for items, vectors in rows:
        new = there.lacks(items, vectors)
        jpegs = {id: jpeg for id, jpeg in thumbnails(items) if jpeg is not None}
        if new:
            target.upsert([items[i] for i in new], vectors[new], jpegs, beside)
        else:
            target.store.write_many({target.thumbnail_path(id): jpeg for id, jpeg in jpegs.items()})
        sent.sent += len(new)
        sent.present += len(items) - len(new)
        bar.update(len(items))
    return sent


def _make_thumbnail(item: Item) -> bytes | None:
    """None where the file is no longer there, or another one is."""
    try:
        data = read_file(Path(item.path))
        return thumbnail(read_image(data)) if len(data) == item.bytes else None
    except UnreadableImage:
        return None


def _thumbnails(index: Index) -> set[str]:
    """Their paths in the store."""
    return set(index.store.list(f"thumbnails/{index.name}"))


def _place(uri: str) -> str | Path:
    store = Store(uri)
    return store.local.resolve() if store.local else store.uri


def _facts(item: Item) -> str:
    """As text: 3, 3.0 and True differ in it."""
    return repr(replace(item, metadata=dict(sorted(item.metadata.items()))))


def _bar(total: int, what: str) -> tqdm:
    return tqdm(total=total, desc=what, unit="item", unit_scale=True, dynamic_ncols=True)
