"""`twinview odd`: lists the odd pictures of a collection in a CSV file."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from serving.cli.options import TableOptions
from serving.cli.table import refuse_existing, write_table
from serving.collection.problems import IndexProblem
from serving.curation.odd_items import FINDERS, CannotCompare
from serving.protocol.filters import parse_shell
from serving.protocol.queries import OddKind
from serving.protocol.shown import counted

COLUMNS = ("id", "name", "path", "label")


class Kind(NamedTuple):
    columns: tuple[str, ...]
    """What is odd, after COLUMNS."""
    odd: str
    """What was found of the odd pictures, in words."""
    lacking: str
    """What pictures lack that could not be looked at."""


KINDS: dict[OddKind, Kind] = {
    "outliers": Kind(("outlier_factor",), "are ranked by how unlike the others they are", ""),
    "labels": Kind(("suggested_label", "score"), "have neighbours of another label", "label"),
    "broken": Kind(("problem", "value"), "are dark, over-exposed, empty or blurred", "readable thumbnail"),
}


@dataclass(frozen=True, kw_only=True)
class OddSettings(TableOptions):
    """List the odd pictures of a collection in a CSV file."""

    kind: OddKind = "outliers"
    """outliers: pictures unlike all others. outlier_factor is 1 for ordinary ones, and grows with the distance to the
    100 nearest, compared with what is usual in the collection, and around these 100. It is for sorting: from which
    factor on pictures do not belong, only looking shows. labels: pictures whose nearest ones have another label. That
    one is suggested, and score says how many times as much they speak for it as for the picture's own. broken: pictures
    whose thumbnail is dark, over-exposed, empty or blurred, with the measured value."""
    k: int = 30
    """Most pictures to list."""
    where: str | None = None
    """Only these pictures, compared with each other: 'year>=2020 colour=red,blue', or JSON as in the HTTP API."""
    output: Path = Path("odd.csv")
    """A new CSV file with the id, name, path and label of each picture, and what is odd about it; the most odd ones
    first."""


def run(settings: OddSettings) -> int:
    """Returns the number of pictures that are listed. Raises IndexProblem, FilterProblem."""
    if settings.k < 1:
        raise IndexProblem(f"--k {settings.k}: must be 1 or more")
    refuse_existing(settings.output)
    index, kind = settings.chosen_table(), KINDS[settings.kind]
    where = parse_shell(settings.where) if settings.where else None
    asked = settings.collection + (f" with {settings.where}" if where else "")
    count = index.count(where)
    if not count:
        raise IndexProblem(f"{asked} has no pictures")
    print(f"looking at {counted(count)} of {asked}", file=sys.stderr)
    try:
        found = FINDERS[settings.kind](index, settings.k, where)
    except CannotCompare as problem:
        raise IndexProblem(f"{asked} {problem}") from problem
    rows = [(item.id, item.name, item.path, item.label, *facts) for item, facts in found.rows]
    write_table(settings.output, (*COLUMNS, *kind.columns), rows)
    first = f"the first {len(rows):,}" if len(rows) < found.odd else "they"
    lacking = f"; {counted(found.left_out)} without a {kind.lacking} left out" if found.left_out else ""
    print(
        f"{found.odd:,} of {counted(found.compared)} of {asked} {kind.odd}; {first} are listed in {settings.output}"
        f"{lacking}"
    )
    return len(rows)
