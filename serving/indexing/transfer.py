"""Transfers collections: to a Parquet file, back from one, and from one index to another.

Items that are already equal in the target are not sent again, so to resume an interrupted transfer, run it again.
Each batch is durable once it is sent. Only a copy deletes anything from the target: what the source does not have.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from export.artifact import UnreadableImage, read_image
from serving.collection.exchange import ROWS_AT_ONCE, Contents, ParquetWriter
from serving.collection.files import ENDS
from serving.collection.index import (
    Index,
    IndexProblem,
    Item,
    WrongEncoder,
    collections,
    existing_collections,
    unit,
)
from serving.collection.store import FileStore
from serving.inference.original import read_below
from serving.inference.thumbnail import thumbnail
from serving.limits import cores
from serving.protocol.filters import Filter
from serving.protocol.replies import Collection
from serving.protocol.shown import counted
from training.data.sources import MAX_FILE_BYTES

THUMBNAIL_THREADS = 16
TOLERANCE = 1e-5  # normalising a unit vector again changes it by 1e-7
DIRECTIONS = 4  # random directions for the fingerprint of a vector

Rows = Iterable[tuple[list[Item], np.ndarray]]
Thumbnails = Callable[[Sequence[Item], set[str]], Iterable[tuple[str, bytes | None]]]
"""(items, ids of those whose row is sent) -> the thumbnails to send, by id"""


@dataclass
class TransferCounts:
    sent: int = 0
    present: int = 0

    def __str__(self) -> str:
        return f"{self.sent:,} sent, {self.present:,} already there"


def export(index: Index, path: Path, where: Filter | None = None) -> int:
    """Returns the number of items. Raises FileProblem, IndexProblem."""
    writer = ParquetWriter(path, index.encoder_id, index.dimension, index.name, index.keys())
    with _bar(index.count(where), "exporting") as bar, writer as file:
        for items, vectors in index.scan(where, ROWS_AT_ONCE):
            file.write(items, vectors)
            bar.update(len(items))
    return bar.n


def import_(contents: Contents, target: Index, folders: Sequence[str] = ()) -> TransferCounts:
    """Makes thumbnails from the original files that still exist below the folders; other items get none.

    raises FileProblem, IndexProblem
    """
    present = target.files.ids("thumbnails")

    def make(items: Sequence[Item], _: set[str]) -> Iterator[tuple[str, bytes | None]]:
        missing = [item for item in items if folders and item.path and item.id not in present]
        return zip([item.id for item in missing], pool.map(partial(_make_thumbnail, folders), missing), strict=True)

    with (
        _bar(contents.count, "importing") as bar,
        ThreadPoolExecutor(cores(), "thumbnails") as pool,
        target.one_change() as whole,
    ):
        return _send(contents.rows(), whole, make, bar, allow_other_encoder=False)


def tables_to_copy(source: str, target: str, collection: str | None = None) -> list[tuple[Index, Index]]:
    """Source and target for each encoder's table of each collection, or of the one named. Raises IndexProblem."""
    if _resolved(source) == _resolved(target):
        raise IndexProblem(f"{source} and {target} are the same index")
    tables, in_target = existing_collections(source, collection), collections(target)
    for table in tables:
        encoders = {table.encoder, *table.others}
        if others := {other.encoder for other in in_target if other.name == table.name} - encoders:
            raise WrongEncoder(
                f"{table.name} holds vectors of {', '.join(sorted(others))} in {target}, and of "
                f"{', '.join(sorted(encoders))} in {source}; copy it to another index"
            )

    def open_in(uri: str, table: Collection) -> Index:
        return Index(uri, table.encoder, table.dimension, table.name)

    return [(open_in(source, table), open_in(target, table)) for table in tables]


def only_in(target: Index, source: Index) -> list[str]:
    """Returns the ids that the target's table has and the source's has not. Raises IndexProblem."""
    try:
        return sorted(target.ids() - source.ids())
    except WrongEncoder:  # the target has only vectors of another encoder
        return []


def copy(source: Index, target: Index, change: str | None = None) -> TransferCounts:
    """Makes one encoder's table in the target equal to that of the source, with the thumbnails and originals, and
    compares both. Items that only the target has are deleted there. Raises IndexProblem.

    change  id of the change in the target, which the copies of other encoders' tables belong to, too
    """
    theirs, rewritten = target.files.sizes("thumbnails"), set()
    different = {id for id, size in source.files.sizes("thumbnails").items() if theirs.get(id) != size}

    def read(items: Sequence[Item], sent: set[str]) -> Iterator[tuple[str, bytes | None]]:
        rewritten.update(sent)
        ids = [item.id for item in items if item.id in sent or item.id in different]
        return zip(ids, pool.map(source.read_thumbnail, ids), strict=True)

    with target.one_change(id=change) as whole:
        with (
            _bar(source.count(), f"copying {source.name}") as bar,
            ThreadPoolExecutor(THUMBNAIL_THREADS, "thumbnails") as pool,
        ):
            counts = _send(source.scan(batch=ROWS_AT_ONCE), whole, read, bar, allow_other_encoder=True)
        whole.delete(only_in(target, source), of_all_encoders=False)
    _copy_originals(source, target, rewritten)
    compare(source, target)
    return counts


def _copy_originals(source: Index, target: Index, rewritten: set[str]) -> None:
    """rewritten  ids whose row was sent, so the original may be another one of the same size"""

    def send(id: str) -> None:
        if (original := source.read_original(id)) is not None:
            target.store.write(target.files.path("originals", id), original)

    ours, theirs = source.files.sizes("originals"), target.files.sizes("originals")
    different = [id for id, size in ours.items() if theirs.get(id) != size or id in rewritten]
    with ThreadPoolExecutor(THUMBNAIL_THREADS, "originals") as pool:  # each has at most one in memory
        for _ in pool.map(send, different):
            pass
    target.store.delete([target.files.path("originals", id) for id in theirs.keys() - ours.keys()])


def compare(source: Index, target: Index) -> None:
    """Raises IndexProblem unless both tables have the same items with equal vectors, and thumbnails and originals of
    equal size."""
    ids = source.ids()
    if missing := sorted(ids - target.ids()):
        raise IndexProblem(
            f"{len(missing):,} of {len(ids):,} items of {source.name} are not in {target.store.uri} after the copy, "
            f"for instance {missing[0]}; run the same command again to send them"
        )
    if extra := only_in(target, source):
        raise IndexProblem(
            f"{source.store.uri} does not have {counted(len(extra), 'item')} of {target.name} in {target.store.uri}, "
            f"for instance {extra[0]}; make sure that nobody is writing to either, and run the same command again"
        )
    target_items = _TargetItems(target, True)
    files = [(source.files.sizes(kind), target.files.sizes(kind)) for kind in ENDS]
    for items, vectors in source.scan(batch=ROWS_AT_ONCE):
        unlike = {items[i].id for i in target_items.missing_or_different(items, vectors)}
        for ours, theirs in files:
            unlike |= {item.id for item in items if item.id in ours and ours[item.id] != theirs.get(item.id)}
        if unlike:
            raise IndexProblem(
                f"{min(unlike)} of {source.name} is not the same in {target.store.uri} after the copy; make sure that "
                f"nobody is writing to either, and run the same command again"
            )


class _TargetItems:
    """Fingerprints of the items of an index, some 150 bytes each: a hash of the facts, and the products of the vector
    with a few random directions."""

    def __init__(self, index: Index, allow_other_encoder: bool):
        self._directions = np.random.default_rng(0).standard_normal((index.dimension, DIRECTIONS))
        self._rows: dict[str, int] = {}
        facts, products = [], [np.zeros((0, DIRECTIONS))]
        for items, vectors in _scan(index, allow_other_encoder):
            self._rows |= {item.id: len(self._rows) + i for i, item in enumerate(items)}
            facts += [hash(_facts(item)) for item in items]
            products.append(unit(vectors) @ self._directions)
        self._facts, self._products = np.array(facts, np.int64), np.concatenate(products)

    def missing_or_different(self, items: Sequence[Item], vectors: np.ndarray) -> list[int]:
        """The positions of the items to send."""
        products = unit(vectors) @ self._directions
        rows = [self._rows.get(item.id) for item in items]
        return [
            i
            for i, row in enumerate(rows)
            if row is None
            or self._facts[row] != hash(_facts(items[i]))
            or not np.abs(self._products[row] - products[i]).max() < TOLERANCE
        ]


def _scan(index: Index, allow_other_encoder: bool) -> Rows:
    try:
        yield from index.scan(batch=ROWS_AT_ONCE)
    except WrongEncoder:  # only another encoder's table exists so far
        if not allow_other_encoder:
            raise


def _send(rows: Rows, target: Index, thumbnails: Thumbnails, bar: tqdm, allow_other_encoder: bool) -> TransferCounts:
    """allow_other_encoder  also if the target's collection has only vectors of another encoder"""
    target_items, counts = _TargetItems(target, allow_other_encoder), TransferCounts()
    for items, vectors in rows:
        new = target_items.missing_or_different(items, vectors)
        jpegs = {id: jpeg for id, jpeg in thumbnails(items, {items[i].id for i in new}) if jpeg is not None}
        if new:
            target.upsert([items[i] for i in new], vectors[new], jpegs, allow_other_encoder)
        else:
            target.store.write_many({target.thumbnail_path(id): jpeg for id, jpeg in jpegs.items()})
        counts.sent += len(new)
        counts.present += len(items) - len(new)
        bar.update(len(items))
    return counts


def _make_thumbnail(folders: Sequence[str], item: Item) -> bytes | None:
    """None if the original file has been deleted or replaced, or is outside the folders."""
    try:
        data = read_below(item.path, folders, MAX_FILE_BYTES)
        return thumbnail(read_image(data)) if len(data) == item.bytes else None
    except UnreadableImage:
        return None


def _resolved(uri: str) -> str | Path:
    store = FileStore(uri)
    return store.local.resolve() if store.local else store.uri


def _facts(item: Item) -> str:
    """Returns the item's fields as a text in which 3, 3.0 and True differ."""
    return repr(replace(item, metadata=dict(sorted(item.metadata.items()))))


def _bar(total: int, what: str) -> tqdm:
    return tqdm(total=total, desc=what, unit="item", unit_scale=True, dynamic_ncols=True)
