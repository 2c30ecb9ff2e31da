"""`twinview coverage`: lists the pictures of a collection that another one, or another part of it, does not cover."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from serving.cli.options import CollectionOptions, TableOptions
from serving.cli.table import counted, refuse_existing, write_table
from serving.collection.index import Index, Item
from serving.collection.problems import IndexProblem
from serving.curation.coverage import K, coverage
from serving.curation.items import read_items
from serving.protocol.filters import parse_shell

COLUMNS = ("id", "name", "path", "label", "cosine", "nearest_id", "nearest_name", "nearest_path")


@dataclass(frozen=True, kw_only=True)
class CoverageSettings(TableOptions):
    """List the pictures of a collection that another one, or another part of it, does not cover: those that have no
    picture of the other around them as near as that one's own third-nearest neighbour."""

    by: str | None = None
    """Name of the other collection, of the same encoder. Default: the same one, which needs --where and --by-where. A
    picture is covered if it is as near to one of the other's pictures as that one's third-nearest neighbour is."""
    where: str | None = None
    """Only these pictures of the collection: 'year>=2020 colour=red,blue', or JSON as in the HTTP API."""
    by_where: str | None = None
    """Cover them only by these pictures of the other."""
    output: Path = Path("uncovered.csv")
    """A new CSV file with the id, name, path and label of each picture that is not covered, its cosine to the nearest
    picture of the other, and that one's id, name and path; the farthest first."""


def run(settings: CoverageSettings) -> float:
    """Returns the share that is covered. Raises IndexProblem, FilterProblem."""
    refuse_existing(settings.output)
    index = settings.chosen_table()
    other = index
    if settings.by is not None:
        other = CollectionOptions(index=settings.index, collection=settings.by).table(index.encoder_id)
    if other.stored == index.stored and settings.where == settings.by_where:
        raise IndexProblem(
            f"{index.name} is compared with itself; give --by another collection, or --where and --by-where"
        )
    items, vectors = _read(index, settings.where)
    others, by = _read(other, settings.by_where)
    asked, covering = _named(index, settings.where), _named(other, settings.by_where)
    if not items:
        raise IndexProblem(f"{asked} has no pictures")
    if len(others) <= K:
        raise IndexProblem(f"{covering} has {counted(len(others))}, and at least {K + 1} are needed to cover others")
    found = coverage(vectors, by)
    missing = np.flatnonzero(~found.covered)
    missing = missing[np.argsort(found.cosine[missing], kind="stable")]
    rows = []
    for row in missing.tolist():
        item, near = items[row], others[found.nearest[row]]
        cosine = f"{found.cosine[row]:.4f}"
        rows.append((item.id, item.name, item.path, item.label, cosine, near.id, near.name, near.path))
    write_table(settings.output, COLUMNS, rows)
    share = 1 - len(missing) / len(items)
    both = len({item.id for item in items} & {item.id for item in others})
    print(
        f"{share:.1%} of {len(items):,} pictures of {asked} are covered by {len(others):,} of {covering}, of which the "
        f"others cover {found.usual:.1%}; the {len(missing):,} that are not are listed in {settings.output}"
    )
    if both:
        print(f"{both:,} pictures are in both, and so covered.")
    return share


def _named(index: Index, where: str | None) -> str:
    return index.name + (f" with {where}" if where else "")


def _read(index: Index, where: str | None) -> tuple[list[Item], np.ndarray]:
    """Returns the pictures with their vectors (n, d), in the order of their ids."""
    items, vectors = read_items(index, parse_shell(where) if where else None)
    order = sorted(range(len(items)), key=lambda row: items[row].id)
    return [items[row] for row in order], vectors[order]
