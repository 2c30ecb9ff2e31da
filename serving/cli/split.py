"""`twinview split`: divides a collection into parts such as train and test, without near-duplicates across them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from serving.cli.duplicates import checked, say_comparing
from serving.cli.options import TableOptions
from serving.cli.table import refuse_existing, write_table
from serving.collection.problems import IndexProblem
from serving.curation.items import NoValues
from serving.curation.split import WrongShares, as_one
from serving.curation.split_items import SplitItems, TooFewToDivide, split_items
from serving.protocol.filters import parse_shell
from serving.protocol.shown import counted

COLUMNS = ("id", "name", "path", "label", "part")


@dataclass(frozen=True, kw_only=True)
class SplitSettings(TableOptions):
    """Divide a collection into train, validation and test, and list them in a CSV file. Near-duplicates are in the same
    part, and each part has about the same share of each label."""

    parts: tuple[str, ...] = ("train=0.8", "validation=0.1", "test=0.1")
    """Names of the parts with their shares of the pictures."""
    group_by: str | None = None
    """A metadata key, or label: pictures with the same value of it are in the same part."""
    threshold: float | None = None
    """Lowest cosine of two pictures that count as near-duplicates. Default: the collection's own, from which on nearly
    all pairs are copies."""
    where: str | None = None
    """Divide only these: 'year>=2020 colour=red,blue', or JSON as in the HTTP API."""
    seed: int = 0
    """Another seed gives another split."""
    output: Path = Path("split.csv")
    """A new CSV file with the id, name, path, label and part of each picture."""


def run(settings: SplitSettings) -> int:
    """Returns the number of pictures. Raises IndexProblem, DerivedProblem, FilterProblem."""
    shares = parse_parts(settings.parts)
    if settings.seed < 0:
        raise IndexProblem(f"--seed {settings.seed}: must be 0 or more")
    refuse_existing(settings.output)
    index = settings.chosen_table()
    where = parse_shell(settings.where) if settings.where else None
    threshold, begin = checked(settings.threshold), partial(say_comparing, index)
    try:
        found = split_items(index, shares, where, settings.group_by, threshold, settings.seed, begin)
    except TooFewToDivide as error:
        with_ = f" with {settings.where}" if where else ""
        few = counted(error.args[0])
        raise IndexProblem(f"{index.name} has {few}{with_}, fewer than the {len(shares)} --parts") from error
    except NoValues as error:
        key = settings.group_by
        raise IndexProblem(f"--group-by {key}: no picture of {settings.collection} has a value of {key}") from error
    rows = zip(found.items, found.parts, strict=True)
    write_table(settings.output, COLUMNS, ((item.id, item.name, item.path, item.label, part) for item, part in rows))
    count = len(found.items)
    print(f"divided {counted(count)} of {index.name}, listed in {settings.output}")
    for name, size in found.sizes.items():
        print(f"  {name}: {counted(size)}, {size / count:.1%}")
    print(_kept_together(found))
    for note in found.notes:
        print(note)
    return count


def parse_parts(given: Sequence[str]) -> dict[str, float]:
    """Returns the share of each part, by its name, 1 together. Raises IndexProblem."""
    shares: dict[str, float] = {}
    for text in given:
        name, equals, number = text.rpartition("=")
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not (name and equals and 0 < share < 1):
            raise IndexProblem(f"--parts {text}: must be a name and a share between 0 and 1, as train=0.8")
        if name in shares:
            raise IndexProblem(f"--parts {' '.join(given)}: {name} is there twice")
        shares[name] = share
    if len(shares) < 2:
        raise IndexProblem("--parts: needs two parts or more, as train=0.8 test=0.2")
    try:
        return as_one(shares)
    except WrongShares as error:
        raise IndexProblem(f"--parts {' '.join(given)}: {error}") from error


def _kept_together(found: SplitItems) -> str:
    if not found.copies:
        return f"No two pictures have a cosine of at least {found.threshold:g}, so there are no near-duplicates."
    return (
        f"{counted(len(found.copies), 'group')} of near-duplicates (cosine of at least {found.threshold:g}) with "
        f"{counted(sum(map(len, found.copies)))}: each in one part."
    )
