"""`twinview coverage`: lists the pictures of a collection that another one, or another part of it, does not cover."""

from dataclasses import dataclass
from pathlib import Path

from serving.cli.options import CollectionOptions, TableOptions
from serving.cli.table import refuse_existing, write_table
from serving.collection.index import Index
from serving.collection.problems import IndexProblem
from serving.curation.coverage_items import NoneToCover, TooFewToCover, uncovered_items
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
    asked, covering = _named(index, settings.where), _named(other, settings.by_where)
    where = parse_shell(settings.where) if settings.where else None
    by_where = parse_shell(settings.by_where) if settings.by_where else None
    try:
        found = uncovered_items(index, other, where, by_where)
    except NoneToCover as error:
        raise IndexProblem(f"{asked} has no pictures") from error
    except TooFewToCover as error:
        raise IndexProblem(f"{covering} {error}") from error
    rows = (
        (item.id, item.name, item.path, item.label, f"{cosine:.4f}", near.id, near.name, near.path)
        for item, cosine, near in found.rows
    )
    write_table(settings.output, COLUMNS, rows)
    print(
        f"{found.share:.1%} of {found.compared:,} pictures of {asked} are covered by {found.by:,} of {covering}, of "
        f"which the others cover {found.usual:.1%}; the {len(found.rows):,} that are not are listed in "
        f"{settings.output}"
    )
    if found.both:
        print(f"{found.both:,} pictures are in both, and so covered.")
    return found.share


def _named(index: Index, where: str | None) -> str:
    return index.name + (f" with {where}" if where else "")
