"""`twinview duplicates`: which pictures of a collection can stay for which others, as a CSV file."""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

from serving.cli.place import Table
from serving.derived.duplicates import LEAST, group, looked_up
from serving.derived.task import Derived, DerivedProblem, Result


@dataclass(frozen=True, kw_only=True)
class DuplicatesSettings(Table):
    """List near-duplicates: which picture can stay for which others."""

    threshold: float = 0.95
    """The least cosine of two pictures that count as the same."""
    output: Path = Path("groups.csv")
    """A row a picture: group, whether it stays, cosine to the one that stays, and what is known of it."""


def run(settings: DuplicatesSettings) -> int:
    """How many could go. raises IndexProblem, DerivedProblem"""
    if not 0 < settings.threshold <= 1:
        raise DerivedProblem(f"--threshold {settings.threshold:g}: over 0 and at most 1")
    index = settings.one()
    result = _fresh(Derived(index, "duplicates"), settings.threshold)
    groups = group(result.arrays, settings.threshold)
    rows = [("group", "stays", "cosine", "id", "name", "label", "path", "width", "height", "bytes")]
    for number, found in enumerate(looked_up(index, groups, settings.threshold), 1):
        for item, cosine in [(found.keep, 1.0), *found.others]:
            stays = "yes" if item is found.keep else "no"
            facts = (item.id, item.name, item.label, item.path, item.width, item.height, item.bytes)
            rows.append((number, stays, f"{cosine:.4f}", *facts))
    try:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        with open(settings.output, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            csv.writer(file).writerows(rows)
    except OSError as error:
        raise DerivedProblem(f"--output: {settings.output} cannot be written: {error.strerror}") from error
    count = rows[-1][0] if len(rows) > 1 else 0
    extra = len(rows) - 1 - count
    print(
        f"{len(result.arrays['ids']):,} pictures of {index.name}: {count:,} groups from a cosine of "
        f"{settings.threshold:g} on, {extra:,} pictures could go; listed in {settings.output}"
    )
    return extra


def _fresh(derived: Derived, threshold: float) -> Result:
    """What is there already, or what is now computed."""
    kept = derived.result()
    if kept and not kept.stale and kept.settings["threshold"] <= threshold:
        return kept
    print(f"comparing {derived.index.count():,} pictures of {derived.index.name}", file=sys.stderr)
    return derived.compute(threshold=min(threshold, LEAST))
