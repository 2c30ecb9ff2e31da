"""`twinview index ...`: the options and the output of its commands. `index add` is serving/bulk.py."""

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tyro.conf import Positional

from export.paths import local_path
from serving.cli.options import DEFAULT_ENCODER, CollectionOptions, IndexOptions, TableOptions, least_cosine
from serving.collection.changes import new_id
from serving.collection.index import (
    DEFAULT,
    Index,
    IndexProblem,
    collections,
    existing_collections,
    refuse_missing_index,
)
from serving.collection.names import delete_alias, names_of, refuse_alias
from serving.collection.store import FileStore
from serving.collection.undo import Listed, changes
from serving.collection.undo import undo as undo_change
from serving.collection.upgrade import Upgrade
from serving.protocol.filters import parse_shell
from serving.protocol.shown import counted

if TYPE_CHECKING:
    from export.artifact import Bundle


@dataclass(frozen=True, kw_only=True)
class Remove(CollectionOptions):
    ids: Positional[tuple[str, ...]] = ()
    """Ids of the items."""
    where: str | None = None
    """Filter, instead of ids: 'label=shirt price>=3 colour=red,blue', or JSON as in the HTTP API."""
    yes: bool = False
    """Do not ask."""


def remove(settings: Remove) -> None:
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
    tables[0].delete(sorted(ids))
    print(f"removed {len(ids):,}; {settings.collection} holds {max(table.count() for table in tables):,}")


@dataclass(frozen=True, kw_only=True)
class Drop(IndexOptions):
    collection: Positional[str]
    """Name of the collection."""
    yes: bool = False
    """Do not ask."""


def drop(settings: Drop) -> None:
    tables = _tables(settings, settings.collection)
    count = max(table.count() for table in tables)
    question = (
        f"Delete the collection {settings.collection} with {counted(count, 'item')} from {settings.index}, for good?"
    )
    _confirm(question, settings.yes)
    print(f"deleted {settings.collection} with {tables[0].drop():,} items")


@dataclass(frozen=True, kw_only=True)
class Rename(IndexOptions):
    collection: Positional[str]
    """Name of the collection."""
    name: Positional[str]
    """Its new name."""


def rename(settings: Rename) -> None:
    _tables(settings, settings.collection)[0].rename(settings.name)
    print(f"renamed {settings.collection} to {settings.name}")


@dataclass(frozen=True, kw_only=True)
class Alias(IndexOptions):
    alias: Positional[str]
    """Another name, that stands for a collection."""
    collection: Positional[str | None] = None
    """Name of the collection that it stands for from now on."""
    delete: bool = False
    """Delete the alias; the collection stays."""


def alias(settings: Alias) -> None:
    if (settings.collection is None) != settings.delete:
        raise IndexProblem(f"give the collection that {settings.alias} is to stand for, or --delete")
    if settings.collection is None:
        delete_alias(FileStore(settings.index), settings.alias)
        print(f"deleted the alias {settings.alias}")
        return
    table = settings.open(existing_collections(settings.index, settings.collection)[0])
    table.set_alias(settings.alias)
    print(f"{settings.alias} stands for {table.name}")


def _tables(settings: IndexOptions, collection: str) -> list[Index]:
    """Returns the tables of a collection, which must not be named by an alias. Raises IndexProblem."""
    refuse_alias(names_of(FileStore(settings.index)), collection)
    return [settings.open(facts) for facts in existing_collections(settings.index, collection)]


@dataclass(frozen=True, kw_only=True)
class Search(CollectionOptions):
    query: Positional[str | None] = None
    """An image file, or the id of an item."""
    text: str | None = None
    """Words for what the pictures should show, instead: for an encoder that reads text."""
    k: int = 10
    """Number of results."""
    where: str | None = None
    """Filter: 'label=shirt price>=3 colour=red,blue', or JSON as the service takes it."""
    threshold: float | None = None
    """Lowest cosine of a result."""
    closer_than: float | None = None
    """Instead of --threshold: 0.99 means more alike to the query than 99 % of random pairs of the collection."""
    encoder: str | None = DEFAULT_ENCODER
    """An encoder bundle's folder, or a tag of BentoML's model store. Default: the first in TWINVIEW_ENCODER, or under
    runs/ the newest one that has embedded the collection. Not needed for an id, if only one has."""
    json: bool = False
    """Print JSON, with all fields of the items."""


def search(settings: Search) -> None:
    if not settings.k > 0:
        raise IndexProblem(f"--k {settings.k}: must be at least 1")
    if (settings.query is None) == (settings.text is None):
        raise IndexProblem("give an image file or the id of an item to search by, or --text")
    if settings.text is not None and settings.closer_than is not None:
        raise IndexProblem("--closer-than: the cosines of pictures and text have no rank; give --threshold")
    where = parse_shell(settings.where) if settings.where else None
    index, vector, without = _query(settings)
    least = least_cosine(index, settings.threshold, settings.closer_than)
    (found,), estimated = Upgrade(index).search_many(vector[None], settings.k + len(without), where)
    near = [(item, cosine) for item, cosine in found if item.id not in without and (least is None or cosine >= least)]
    if estimated:
        print(f"note: {settings.collection} is being embedded again, so some cosines are estimates", file=sys.stderr)
    pairs = index.random_pairs.up_to_date() if settings.text is None else None
    ranked = [(item, cosine, pairs.closer_than(cosine) if pairs else None) for item, cosine in near[: settings.k]]
    if settings.json:
        rows = [{"similarity": round(cosine, 6), "closer_than": rank, **asdict(item)} for item, cosine, rank in ranked]
        print(json.dumps(rows, indent=2))
    elif ranked:
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

    tables = settings.tables()
    if settings.query is not None and not os.path.isfile(local_path(settings.query)):
        several = len(tables) > 1
        index = settings.table(find_bundle(settings.encoder).card.id if several else None)
        known = Upgrade(index).get_many([settings.query])
        if settings.query not in known:
            raise IndexProblem(f"{settings.query} is neither a file nor an item of {settings.collection}")
        return index, known[settings.query][1], (settings.query,)
    bundle = find_bundle(settings.encoder, used=[table.encoder_id for table in tables])
    index = Index(settings.index, bundle.card.id, bundle.card.dimension, settings.collection)
    index.count()  # raises WrongEncoder before the picture is encoded
    if settings.query is None:
        return index, _vector_of_text(settings.text or "", bundle), ()
    try:
        pixels = read_pixels(local_path(settings.query).read_bytes(), bundle.card.preprocessing)
    except UnreadableImage as error:
        raise IndexProblem(f"{settings.query} {error}") from error
    return index, OnnxEncoder(bundle)(pixels[None])[0], ()


def _vector_of_text(text: str, bundle: "Bundle") -> np.ndarray:
    """Raises IndexProblem, BundleError."""
    from export.tokens import NoTokenizers
    from serving.inference.text import TextEncoder

    if bundle.card.text is None:
        raise IndexProblem(f"--text: the encoder {bundle.card.id} reads no text; export one with a text tower")
    if not text.strip():
        raise IndexProblem("--text: is empty")
    try:
        return TextEncoder(bundle).vector(text)
    except NoTokenizers as error:
        raise IndexProblem(f"--text: {error}") from error


@dataclass(frozen=True, kw_only=True)
class List(IndexOptions):
    json: bool = False
    """Print JSON."""


def list_(settings: List) -> None:
    refuse_missing_index(settings.index)
    everything = collections(settings.index)
    if settings.json:
        print(json.dumps([asdict(collection) for collection in everything], indent=2))
    elif everything:
        rows = [
            (c.name, c.encoder, f"{c.count:,}", _size(c.bytes), _size(c.originals) if c.originals else "-", c.index)
            for c in everything
        ]
        _print_table(("collection", "encoder", "items", "size", "originals", "index"), rows)
        for name, alias in dict.fromkeys((c.name, alias) for c in everything for alias in c.aliases):
            print(f"{alias} is an alias of {name}")
    else:
        print(f"{settings.index} holds no collection")


@dataclass(frozen=True, kw_only=True)
class Verify(IndexOptions):
    collection: str | None = None
    """Name of a collection; default: all."""


def verify(settings: Verify) -> None:
    damaged = False
    for collection in existing_collections(settings.index, settings.collection):
        index = settings.open(collection)
        problems = index.verify()
        damaged |= bool(problems)
        if problems:
            state = "damaged"
        else:
            without = index.without_thumbnail()  # fails on a damaged one
            state = f"no damage, {without:,} without a thumbnail" if without else "no damage"
        print(f"{collection.name} of {collection.encoder}: {counted(collection.count, 'item')}, {state}")
        for problem in problems:
            print(f"  {problem}")
    if damaged:
        sys.exit(1)


@dataclass(frozen=True, kw_only=True)
class History(CollectionOptions):
    json: bool = False
    """Print JSON."""


def history(settings: History) -> None:
    listed = changes(settings.tables()[0])
    if settings.json:
        rows = [{**asdict(one.change), "text": one.text, "undone": one.undone, "next": one.next} for one in listed]
        print(json.dumps(rows, indent=2))
    elif listed:
        notes = [" (undone)" if one.undone else " (to be undone next)" if one.next else "" for one in listed]
        rows = [(_time(one), one.change.id, one.text + note) for one, note in zip(listed, notes, strict=True)]
        _print_table(("began", "change", "what it did"), rows)
    else:
        print(f"no change of {settings.collection} in the last hour is known")


def _time(listed: Listed) -> str:
    return f"{datetime.fromtimestamp(listed.change.at):%Y-%m-%d %H:%M:%S}"


@dataclass(frozen=True, kw_only=True)
class Undo(CollectionOptions):
    change: Positional[str | None] = None
    """A change as `twinview index history` lists it, which may also be an undo. Default: the newest that is not undone
    yet."""
    yes: bool = False
    """Do not ask."""


def undo(settings: Undo) -> None:
    tables = settings.tables()
    listed = changes(tables[0])
    wanted = settings.change
    for chosen in listed:
        if chosen.change.id == wanted if wanted else chosen.next:
            _confirm(f"Undo the change of {_time(chosen)} in {settings.collection}: {chosen.text}?", settings.yes)
            wanted = chosen.change.id  # and not one that is made while the question is asked
            break
    undone, _ = undo_change(tables[0], wanted)
    count = max(table.count() for table in settings.tables())
    print(f"undone: {undone.text}; {settings.collection} holds {counted(count, 'item')}")


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
    print(f"{counted(count, 'item')} of {settings.collection} in {settings.output}")


ENCODER_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")  # it names a table


@dataclass(frozen=True, kw_only=True)
class Import(IndexOptions):
    input: Positional[Path]
    """A .parquet file of `twinview index export` or `twinview embed`, also after another program has changed it."""
    collection: str | None = None
    """Name of the collection; default: the name in the file."""
    encoder: str | None = None
    """Id of the encoder of the vectors, as `twinview index list` shows it, if the file does not name it, as after
    pandas; for vectors of another program any name. Default: the one whose vectors the collection holds."""
    pictures: tuple[str, ...] = ()
    """Folders with the items' pictures. Thumbnails are made of those that are below one of them, at their paths."""


def import_(settings: Import) -> None:
    from serving.collection import exchange
    from serving.collection.exchange import FileProblem
    from serving.indexing import transfer
    from serving.indexing.originals import absolute

    contents = exchange.contents(settings.input)
    name = settings.collection or contents.collection or DEFAULT
    if settings.encoder and not ENCODER_ID.fullmatch(settings.encoder):
        raise FileProblem(f"--encoder {settings.encoder} is no id of an encoder: letters, digits, _ and -, at most 128")
    encoder = contents.encoder or settings.encoder or _only_encoder(settings, name, contents.dimension)
    if settings.encoder not in (None, encoder):
        raise FileProblem(f"{settings.input} holds vectors of {encoder}, not of {settings.encoder}")
    for note in contents.metadata.notes:
        print(f"columns {note}")
    target = Index(settings.index, encoder, contents.dimension, name)
    folders = absolute(settings.pictures)
    counts = transfer.import_(contents, target, folders)
    target.add_folders(folders)
    target.maintain()
    print(f"{counts}; {name} holds {target.count():,}")


def _only_encoder(settings: Import, name: str, dimension: int) -> str:
    """The encoder of a file that does not name it. Raises FileProblem."""
    from serving.collection.exchange import FileProblem

    name = names_of(FileStore(settings.index)).resolve(name)[0]
    found = [table for table in collections(settings.index) if table.name == name]
    encoders = {table.encoder for table in found if table.dimension == dimension}
    if len(encoders) != 1:
        raise FileProblem(
            f"{settings.input} does not name the encoder of its vectors; name it with --encoder, by its id, as "
            "`twinview index list` shows it"
        )
    return encoders.pop()


@dataclass(frozen=True, kw_only=True)
class Copy:
    source: Positional[str]
    """A folder, or s3://bucket/prefix."""
    target: Positional[str]
    """Another folder, or s3://bucket/prefix."""
    collection: str | None = None
    """Name of a collection; default: all."""
    yes: bool = False
    """Do not ask before items are deleted from the target that the source does not have."""


def copy(settings: Copy) -> None:
    """Make the collections of the target equal to those of the source."""
    from serving.indexing import transfer

    tables = transfer.tables_to_copy(settings.source, settings.target, settings.collection)
    if extra := sum(len(transfer.only_in(target, source)) for source, target in tables):
        _confirm(
            f"Delete {counted(extra, 'item')} from {settings.target} that {settings.source} does not have?",
            settings.yes,
        )
    ids = {source.name: new_id() for source, _ in tables}
    for source, target in tables:
        counts = transfer.copy(source, target, ids[source.name])
        target.maintain()
        print(f"{source.name} of {source.encoder_id}: {counts}; compared and equal")


def _confirm(question: str, yes: bool) -> None:
    """Returns if the answer is yes; otherwise ends the command."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise IndexProblem(f"{question} Not a terminal: pass --yes to confirm.")
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
