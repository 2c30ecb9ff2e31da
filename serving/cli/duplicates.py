"""`twinview duplicates`: lists the near-duplicates of a collection in a CSV file."""

import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from export.paths import local_path
from serving.cli.options import TableOptions, least_cosine
from serving.cli.table import refuse_existing, write_table
from serving.collection.index import Index, Item
from serving.collection.problems import IndexProblem
from serving.curation.items import NoValues, values_of
from serving.derived.duplicates import MOST_SUGGESTED, group, is_too_much, looked_up, near_duplicates, pairs_among
from serving.derived.task import DerivedProblem, Result
from serving.protocol.shown import counted

COLUMNS = ("group", "stays", "copy", "cosine", "id", "name", "label", "path", "width", "height", "bytes")
FACTS = ("id", "name", "label", "path")
PAIR_COLUMNS = ("cosine", "part", *FACTS, "other_part", *(f"other_{fact}" for fact in FACTS))


@dataclass(frozen=True, kw_only=True)
class DuplicatesSettings(TableOptions):
    """List the near-duplicates of a collection in a CSV file."""

    threshold: float | None = None
    """Lowest cosine of two pictures that count as near-duplicates. Default: the collection's own, from which on nearly
    all pairs are copies."""
    closer_than: float | None = None
    """Instead of --threshold: 0.999 means more alike than 99.9 % of random pairs of the collection."""
    across: str | None = None
    """A metadata key, or label, whose values are the parts of a split: list each pair of near-duplicates in two
    different parts, into a new file."""
    output: Path | None = None
    """A CSV file with one row per picture: its group, whether it stays, whether it is an exact or a near copy of the
    picture that stays, its cosine to it, and its other fields. Default: groups.csv, or across.csv with --across."""


def run(settings: DuplicatesSettings) -> int:
    """Returns the number of pictures that are suggested to go, or with --across of the listed pairs. Raises
    IndexProblem, DerivedProblem."""
    if settings.across is not None:
        return _list_across(settings, settings.across)
    index = settings.chosen_table()
    result, threshold = _near_duplicates(index, settings)
    count = len(result.arrays["ids"])
    groups = group(result.arrays, threshold)
    too_much = is_too_much(groups, count)
    rows, exact, near, number = [], 0, 0, 0
    for number, found in enumerate(looked_up(index, groups, threshold), 1):
        exact, near = exact + len(found.exact), near + len(found.near)
        copies = [(found.keep, "yes", "", 1.0), *((item, "no", "exact", 1.0) for item in found.exact)]
        copies += [(item, "yes" if too_much else "no", "near", cosine) for item, cosine in found.near]
        for item, stays, copy, cosine in copies:
            facts = (item.id, item.name, item.label, item.path, item.width, item.height, item.bytes)
            rows.append((number, stays, copy, f"{cosine:.4f}", *facts))
    output = settings.output or local_path("groups.csv")
    write_table(output, COLUMNS, rows, replace=True)
    print(
        f"{counted(count)} of {index.name}: {counted(number, 'group')} with a cosine of at least {threshold:g}, with "
        f"{counted(exact, 'exact copy')} and {counted(near, 'near-duplicate')}; listed in {output}"
    )
    if too_much:
        print(
            f"More than {MOST_SUGGESTED:.0%} of the collection are near-duplicates at this threshold, so they are "
            "probably different pictures. Only exact copies are suggested to go; give a higher --threshold."
        )
    return exact + (0 if too_much else near)


def _list_across(settings: DuplicatesSettings, key: str) -> int:
    """Returns the number of pairs of near-duplicates in different parts."""
    output = settings.output or local_path("across.csv")
    refuse_existing(output)
    index = settings.chosen_table()
    items = [item for page, _ in index.scan() for item in page]
    try:
        parts = values_of(items, key)
    except NoValues as error:
        raise IndexProblem(f"--across {key}: no picture of {settings.collection} has a value of {key}") from error
    result, threshold = _near_duplicates(index, settings)
    pairs = pairs_among(result.arrays, threshold, [item.id for item in items])
    rows, between = [], Counter[str]()
    for pair in np.argsort(-pairs.cosine, kind="stable").tolist():
        ends = [(parts[row], items[row]) for row in (int(pairs.first[pair]), int(pairs.second[pair]))]
        (part, item), (other_part, other) = sorted(ends, key=lambda end: (end[0] or "", end[1].id))
        if part is not None and other_part is not None and part != other_part:
            rows.append((f"{pairs.cosine[pair]:.4f}", part, *_facts(item), other_part, *_facts(other)))
            between[f"{part} and {other_part}"] += 1
    write_table(output, PAIR_COLUMNS, rows)
    without = sum(part is None for part in parts)
    print(
        f"{counted(len(items))} of {index.name}: {counted(len(rows), 'pair')} of near-duplicates, with a cosine of at "
        f"least {threshold:g}, in different parts by {key}; listed in {output}"
    )
    for names, count in between.most_common():
        print(f"  {names}: {count:,}")
    if without:
        print(f"Without a value of {key}, and so in no part: {without:,}.")
    return len(rows)


def _facts(item: Item) -> tuple[str | None, ...]:
    return tuple(getattr(item, fact) for fact in FACTS)


def checked(threshold: float | None) -> float | None:
    """Returns the threshold. Raises DerivedProblem."""
    if threshold is not None and not 0 < threshold <= 1:
        raise DerivedProblem(f"--threshold {threshold:g}: must be above 0 and at most 1")
    return threshold


def say_comparing(index: Index) -> None:
    print(f"comparing {index.count():,} pictures of {index.name}", file=sys.stderr)


def _near_duplicates(index: Index, settings: DuplicatesSettings) -> tuple[Result, float]:
    """Returns as near_duplicates. Raises IndexProblem, DerivedProblem."""
    threshold = least_cosine(index, checked(settings.threshold), settings.closer_than)
    return near_duplicates(index, threshold, partial(say_comparing, index))
