"""`twinview index remove`, `search`, `list`, `verify` and `undo`: what is typed and printed. The work is index.py's."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tyro.conf import Positional

from serving.cli.place import Collection, Place, Table
from serving.collection.index import Index, IndexProblem, collections
from serving.protocol.filters import parse_shell

SHOWN_VERSIONS = 10


@dataclass(frozen=True, kw_only=True)
class Remove(Collection):
    ids: Positional[tuple[str, ...]] = ()
    """The items."""
    where: str | None = None
    """Or what holds of them: 'label=shirt price>=3 colour=red,blue', or JSON as the service takes it."""
    yes: bool = False
    """Do not ask."""


def remove(settings: Remove) -> None:
    """From the tables of all encoders."""
    if bool(settings.ids) == bool(settings.where):
        raise IndexProblem("give the ids of the items to remove, or --where")
    tables = settings.tables()
    if settings.where:
        which = parse_shell(settings.where)
        ids = {item.id for table in tables for item in table.page(table.count(which), where=which)}
    else:
        ids = set().union(*(table.known(settings.ids) for table in tables))
        if strange := [id for id in settings.ids if id not in ids]:
            print(f"{len(strange):,} of them {'is' if len(strange) == 1 else 'are'} not there: {_some(strange)}")
    if not ids:
        print(f"nothing to remove from {settings.collection}")
        return
    count = max(table.count() for table in tables)
    _ask(f"Remove {len(ids):,} of {count:,} items from {settings.collection} in {settings.index}?", settings.yes)
    for table in tables:
        table.delete(sorted(ids))
    print(f"removed {len(ids):,}; {settings.collection} holds {max(table.count() for table in tables):,}")


@dataclass(frozen=True, kw_only=True)
class Search(Collection):
    query: Positional[str]
    """An image file, or the id of an item."""
    k: int = 10
    """How many."""
    where: str | None = None
    """What must hold of them: 'label=shirt price>=3 colour=red,blue', or JSON as the service takes it."""
    threshold: float | None = None
    """The least cosine."""
    encoder: str | None = os.environ.get("TWINVIEW_ENCODER", "").partition(",")[0].strip() or None
    """An encoder bundle's folder, or a tag of BentoML's model store. By default the first that TWINVIEW_ENCODER names,
    else the newest under runs/. An id needs none where the collection holds vectors of one encoder."""
    json: bool = False
    """Print JSON, with everything that is known of an item."""


def search(settings: Search) -> None:
    if not settings.k > 0:
        raise IndexProblem(f"--k {settings.k}: at least 1")
    which = parse_shell(settings.where) if settings.where else None
    index, vector, without = _query(settings)
    found = index.search(vector, settings.k, which, without, settings.threshold)
    if settings.json:
        print(json.dumps([{"similarity": round(cosine, 6), **asdict(item)} for item, cosine in found], indent=2))
    elif found:
        _print_table(
            ("cosine", "id", "name", "path"),
            [(f"{cosine:.4f}", item.id, item.name, item.path or "") for item, cosine in found],
        )
    else:
        print(f"nothing found in {settings.collection}")


def _query(settings: Search):
    """The index, a vector (d,), and ids to leave out."""
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
class List(Place):
    json: bool = False
    """Print JSON."""


def list_(settings: List) -> None:
    held = collections(settings.index)
    if settings.json:
        print(json.dumps([asdict(facts) for facts in held], indent=2))
    elif held:
        rows = [(f.name, f.encoder, f"{f.count:,}", _size(f.bytes), f.index) for f in held]
        _print_table(("collection", "encoder", "items", "size", "index"), rows)
    else:
        print(f"{settings.index} holds no collection")


@dataclass(frozen=True, kw_only=True)
class Verify(Place):
    collection: str | None = None
    """Its name; by default all."""


def verify(settings: Verify) -> None:
    wrong = False
    for facts in settings.held(settings.collection):
        found = settings.open(facts).verify()
        wrong |= bool(found)
        print(f"{facts.name} of {facts.encoder}: {facts.count:,} items, {'not sound' if found else 'sound'}")
        for sentence in found:
            print(f"  {sentence}")
    if wrong:
        sys.exit(1)


@dataclass(frozen=True, kw_only=True)
class Undo(Table):
    yes: bool = False
    """Do not ask."""


def undo(settings: Undo) -> None:
    index = settings.one()
    versions = sorted(index.versions(), key=lambda version: version[0])
    rows = [(str(number), f"{when:%Y-%m-%d %H:%M:%S}", f"{count:,}") for number, when, count in versions]
    _print_table(("version", "made", "items"), rows[-SHOWN_VERSIONS:])
    if len(versions) < 2:
        raise IndexProblem(f"{settings.collection} has no version before this one")
    _ask(f"Go back from version {versions[-1][0]} by one step?", settings.yes)
    print(f"version {index.undo()} of {settings.collection} holds {index.count():,} items")


def _ask(question: str, yes: bool) -> None:
    """Returns where the answer is yes."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise IndexProblem(f"{question} Nobody is here to ask; --yes answers it")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        sys.exit("nothing was changed")


def _print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")


def _size(bytes: int) -> str:
    size, unit = float(bytes), "B"
    while size >= 1000 and unit != "TB":
        size, unit = size / 1000, {"B": "kB", "kB": "MB", "MB": "GB", "GB": "TB"}[unit]
    return f"{size:.3g} {unit}"
