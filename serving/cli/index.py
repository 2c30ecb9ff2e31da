"""`twinview index ...`: the options and the output of its commands. `index add` is serving/bulk.py."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from serving.cli.options import DEFAULT_ENCODER, CollectionOptions, IndexOptions, TableOptions, least_cosine
from serving.collection.index import DEFAULT, Index, IndexProblem, collections, existing_collections
from serving.protocol.filters import parse_shell

SHOWN_VERSIONS = 10


@dataclass(frozen=True, kw_only=True)
class Remove(CollectionOptions):
    ids: Positional[tuple[str, ...]] = ()
    """Ids of the items."""
    where: str | None = None
    """Filter, instead of ids: 'label=shirt price>=3 colour=red,blue', or JSON as in the HTTP API."""
    yes: bool = False
    """Do not ask."""


def remove(settings: Remove) -> None:
    """Remove the items from the tables of all encoders."""
    if bool(settings.ids) == bool(settings.where):
        raise IndexProblem("give the ids of the items to remove, or --where")
    tables = settings.tables()
    if settings.where:
        where = parse_shell(settings.where)
        ids = {item.id for table in tables for item in table.page(table.count(where), where=where)}
    else:
        ids = set().union(*(table.known(settings.ids) for table in tables))
        if unknown := [id for id in settings.ids if id not in ids]:
            examples = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
            print(f"not in {settings.collection}: {len(unknown):,} of the ids ({examples})")
    if not ids:
        print(f"nothing to remove from {settings.collection}")
        return
    count = max(table.count() for table in tables)
    _confirm(f"Remove {len(ids):,} of {count:,} items from {settings.collection} in {settings.index}?", settings.yes)
    for table in tables:
        table.delete(sorted(ids))
    print(f"removed {len(ids):,}; {settings.collection} holds {max(table.count() for table in tables):,}")


@dataclass(frozen=True, kw_only=True)
class Search(CollectionOptions):
    query: Positional[str]
    """An image file, or the id of an item."""
    k: int = 10
    """Number of results."""
    where: str | None = None
    """Filter: 'label=shirt price>=3 colour=red,blue', or JSON as the service takes it."""
    threshold: float | None = None
    """Lowest cosine of a result."""
    closer_than: float | None = None
    """Instead of --threshold: 0.99 means more alike to the query than 99 % of random pairs of the collection."""
    encoder: str | None = DEFAULT_ENCODER
    """An encoder bundle's folder, or a tag of BentoML's model store. Default: the first in TWINVIEW_ENCODER, or the
    newest under runs/. Not needed for an id, if the collection holds vectors of one encoder."""
    json: bool = False
    """Print JSON, with all fields of the items."""


def search(settings: Search) -> None:
    if not settings.k > 0:
        raise IndexProblem(f"--k {settings.k}: must be at least 1")
    where = parse_shell(settings.where) if settings.where else None
    index, vector, without = _query(settings)
    least = least_cosine(index, settings.threshold, settings.closer_than)
    results = index.search(vector, settings.k, where, without, least)
    pairs = index.random_pairs.up_to_date()
    ranked = [(item, cosine, pairs.closer_than(cosine) if pairs else None) for item, cosine in results]
    if settings.json:
        rows = [{"similarity": round(cosine, 6), "closer_than": rank, **asdict(item)} for item, cosine, rank in ranked]
        print(json.dumps(rows, indent=2))
    elif results:
        heads = ("cosine", *(["closer than"] if pairs else []), "id", "name", "path")
        numbers = ([f"{cosine:.4f}", *([] if rank is None else [f"{rank:.5f}"])] for _, cosine, rank in ranked)
        facts = ((item.id, item.name, item.path or "") for item, _, _ in ranked)
        _print_table(heads, [(*cells, *fact) for cells, fact in zip(numbers, facts, strict=True)])
    else:
        print(f"nothing found in {settings.collection}")


def _query(settings: Search) -> tuple[Index, np.ndarray, tuple[str, ...]]:
    """The index, the vector (d,) to search for, and the ids to leave out of the results."""
    from export.artifact import UnreadableImage, read_pixels
    from serving.inference.encoder import OnnxEncoder, find_bundle

    if not os.path.isfile(path := os.path.expanduser(settings.query)):
        several = len(settings.tables()) > 1
        index = settings.table(find_bundle(settings.encoder).card.id if several else None)
        if (known := index.get(settings.query)) is None:
            raise IndexProblem(f"{settings.query} is neither a file nor an item of {settings.collection}")
        return index, known[1], (settings.query,)
    bundle = find_bundle(settings.encoder)
    index = Index(settings.index, bundle.card.id, bundle.card.dimension, settings.collection)
    index.count()  # raises WrongEncoder before the picture is encoded
    try:
        pixels = read_pixels(Path(path).read_bytes(), bundle.card.preprocessing)
    except UnreadableImage as error:
        raise IndexProblem(f"{settings.query} {error}") from error
    return index, OnnxEncoder(bundle)(pixels[None])[0], ()


@dataclass(frozen=True, kw_only=True)
class List(IndexOptions):
    json: bool = False
    """Print JSON."""


def list_(settings: List) -> None:
    everything = collections(settings.index)
    if settings.json:
        print(json.dumps([asdict(collection) for collection in everything], indent=2))
    elif everything:
        rows = [(c.name, c.encoder, f"{c.count:,}", _size(c.bytes), c.index) for c in everything]
        _print_table(("collection", "encoder", "items", "size", "index"), rows)
    else:
        print(f"{settings.index} holds no collection")


@dataclass(frozen=True, kw_only=True)
class Verify(IndexOptions):
    collection: str | None = None
    """Name of a collection; default: all."""


def verify(settings: Verify) -> None:
    damaged = False
    for collection in existing_collections(settings.index, settings.collection):
        problems = settings.open(collection).verify()
        damaged |= bool(problems)
        state = "damaged" if problems else "no damage"
        print(f"{collection.name} of {collection.encoder}: {collection.count:,} items, {state}")
        for problem in problems:
            print(f"  {problem}")
    if damaged:
        sys.exit(1)


@dataclass(frozen=True, kw_only=True)
class Undo(TableOptions):
    yes: bool = False
    """Do not ask."""


def undo(settings: Undo) -> None:
    index = settings.chosen_table()
    versions = sorted(index.versions(), key=lambda version: version[0])
    rows = [(str(number), f"{when:%Y-%m-%d %H:%M:%S}", f"{count:,}") for number, when, count in versions]
    _print_table(("version", "made", "items"), rows[-SHOWN_VERSIONS:])
    if len(versions) < 2:
        raise IndexProblem(f"{settings.collection} has no earlier version")
    _confirm(f"Undo the change that made version {versions[-1][0]}?", settings.yes)
    print(f"version {index.undo()} of {settings.collection} holds {index.count():,} items")


@dataclass(frozen=True, kw_only=True)
class Export(TableOptions):
    output: Positional[Path]
    """A .parquet file."""
    where: str | None = None
    """Filter: 'label=shirt price>=3 colour=red,blue', or JSON as the service takes it."""


def export(settings: Export) -> None:
    from serving.collection.exchange import FileProblem
    from serving.indexing import transfer

    if settings.output.suffix != ".parquet":
        raise FileProblem(f"{settings.output} must end in .parquet")
    where = parse_shell(settings.where) if settings.where else None
    count = transfer.export(settings.chosen_table(), settings.output, where)
    print(f"{count:,} items of {settings.collection} in {settings.output}")


@dataclass(frozen=True, kw_only=True)
class Import(IndexOptions):
    input: Positional[Path]
    """A .parquet file of `twinview index export` or `twinview embed`."""
    collection: str | None = None
    """Name of the collection; default: the name in the file."""


def import_(settings: Import) -> None:
    from serving.collection import exchange
    from serving.indexing import transfer

    contents = exchange.contents(settings.input)
    name = settings.collection or contents.collection or DEFAULT
    target = Index(settings.index, contents.encoder, contents.dimension, name)
    counts = transfer.import_(contents, target)
    target.maintain()
    print(f"{counts}; {name} holds {target.count():,}")


@dataclass(frozen=True, kw_only=True)
class Copy:
    source: Positional[str]
    """A folder, or s3://bucket/prefix."""
    target: Positional[str]
    """Another folder, or s3://bucket/prefix."""
    collection: str | None = None
    """Name of a collection; default: all."""


def copy(settings: Copy) -> None:
    from serving.indexing import transfer

    for source, target in transfer.tables_to_copy(settings.source, settings.target, settings.collection):
        counts = transfer.copy(source, target)
        target.maintain()
        print(f"{source.name} of {source.encoder_id}: {counts}; compared and equal")


def _confirm(question: str, yes: bool) -> None:
    """Returns if the answer is yes; otherwise ends the command."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise IndexProblem(f"{question} This is not a terminal, so nobody can answer; to confirm, add --yes")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        sys.exit("nothing was changed")


def _print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _size(bytes: int) -> str:
    size, unit = float(bytes), "B"
    while size >= 1000 and unit != "TB":
        size, unit = size / 1000, {"B": "kB", "kB": "MB", "MB": "GB", "GB": "TB"}[unit]
    return f"{size:.3g} {unit}"
