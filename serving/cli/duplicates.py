"""`twinview duplicates`: lists the near-duplicates of a collection in a CSV file."""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

from serving.cli.options import TableOptions, least_cosine
from serving.derived.duplicates import LEAST, THRESHOLD, group, looked_up
from serving.derived.task import Derived, DerivedProblem, Result

COLUMNS = ("group", "stays", "cosine", "id", "name", "label", "path", "width", "height", "bytes")


@dataclass(frozen=True, kw_only=True)
class DuplicatesSettings(TableOptions):
    """List the near-duplicates of a collection in a CSV file."""

    threshold: float | None = None
    """Lowest cosine of two pictures that count as near-duplicates. Default: 0.95."""
    closer_than: float | None = None
    """Instead of --threshold: 0.999 means more alike than 99.9 % of random pairs of the collection."""
    output: Path = Path("groups.csv")
    """A CSV file with one row per picture: its group, whether to keep it, its cosine to the picture to keep, and
    its other fields."""


def run(settings: DuplicatesSettings) -> int:
    """Returns the number of pictures that could be deleted. Raises IndexProblem, DerivedProblem."""
    if settings.threshold is not None and not 0 < settings.threshold <= 1:
        raise DerivedProblem(f"--threshold {settings.threshold:g}: must be above 0 and at most 1")
    index = settings.chosen_table()
    threshold = least_cosine(index, settings.threshold, settings.closer_than)
    threshold = THRESHOLD if threshold is None else threshold
    result = _up_to_date(Derived(index, "duplicates"), threshold)
    groups = group(result.arrays, threshold)
    rows, count = [], 0
    for count, duplicates in enumerate(looked_up(index, groups, threshold), 1):
        for item, cosine in [(duplicates.keep, 1.0), *duplicates.others]:
            stays = "yes" if item is duplicates.keep else "no"
            facts = (item.id, item.name, item.label, item.path, item.width, item.height, item.bytes)
            rows.append((count, stays, f"{cosine:.4f}", *facts))
    try:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        with open(settings.output, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
    except OSError as error:
        raise DerivedProblem(f"--output: {settings.output} cannot be written: {error.strerror}") from error
    extra = len(rows) - count
    print(
        f"{len(result.arrays['ids']):,} pictures of {index.name}: {count:,} groups with a cosine of at "
        f"least {threshold:g}, {extra:,} pictures could be deleted; listed in {settings.output}"
    )
    return extra


def _up_to_date(derived: Derived, threshold: float) -> Result:
    """Returns the newest result if it is still valid; otherwise computes a new one."""
    newest = derived.result()
    if newest and not newest.stale and newest.settings["threshold"] <= threshold:
        return newest
    print(f"comparing {derived.index.count():,} pictures of {derived.index.name}", file=sys.stderr)
    return derived.compute(threshold=min(threshold, LEAST))
