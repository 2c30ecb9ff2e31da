"""`twinview split`: divides a collection into parts such as train and test, without near-duplicates across them."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from serving.cli.duplicates import near_duplicates
from serving.cli.options import TableOptions
from serving.cli.table import counted, refuse_existing, write_table
from serving.collection.index import Index, Item
from serving.collection.problems import IndexProblem
from serving.curation.items import NoValues, values_of
from serving.curation.split import Links, divide, links_of, sets
from serving.derived.duplicates import pairs_among
from serving.protocol.filters import parse_shell

COLUMNS = ("id", "name", "path", "label", "part")
FAR = 0.1  # of the size asked for: a part that is farther from it is named
MOST_NAMED = 10  # labels that are not in each part


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
    items = _items(index, settings.where, len(shares))
    links = []
    if settings.group_by is not None:
        links = [_of_equal(items, settings.group_by, settings.collection)]
    result, threshold = near_duplicates(index, settings.threshold)
    near = pairs_among(result.arrays, threshold, [item.id for item in items])[:2]
    together = sets(len(items), [near, *links])
    balanced = [None if settings.group_by == "label" else item.label for item in items]
    parts = divide(together, balanced, list(shares.values()), settings.seed)
    names = list(shares)
    rows = ((item.id, item.name, item.path, item.label, names[part]) for item, part in zip(items, parts, strict=True))
    write_table(settings.output, COLUMNS, rows)
    print(f"divided {len(items):,} pictures of {index.name}, listed in {settings.output}")
    counts = np.bincount(parts, minlength=len(shares))
    for name, count in zip(names, counts.tolist(), strict=True):
        print(f"  {name}: {counted(count)}, {count / len(items):.1%}")
    print(_kept_together(len(items), near, threshold))
    for line in [*_far_off(shares, counts, together, settings.group_by), *_missing(balanced, parts, names, together)]:
        print(line)
    return len(items)


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
    total = sum(shares.values())
    if len(shares) < 2:
        raise IndexProblem("--parts: needs two parts or more, as train=0.8 test=0.2")
    if not abs(total - 1) < 0.005:  # 0.333 0.333 0.333
        raise IndexProblem(f"--parts {' '.join(given)}: the shares add up to {total:g}, not to 1")
    return {name: share / total for name, share in shares.items()}


def _items(index: Index, where: str | None, least: int) -> list[Item]:
    """Returns the pictures to divide, by their ids. Raises IndexProblem for fewer than `least`."""
    filter = parse_shell(where) if where else None
    items = sorted((item for page, _ in index.scan(filter) for item in page), key=lambda item: item.id)
    if len(items) < least:
        with_ = f" with {where}" if where else ""
        raise IndexProblem(f"{index.name} has {counted(len(items))}{with_}, fewer than the {least} --parts")
    return items


def _of_equal(items: list[Item], key: str, collection: str) -> Links:
    try:
        return links_of(values_of(items, key))
    except NoValues as error:
        raise IndexProblem(f"--group-by {key}: no picture of {collection} has a value of {key}") from error


def _kept_together(count: int, near: Links, threshold: float) -> str:
    sizes = np.bincount(sets(count, [near]))
    copies = sizes[sizes > 1]
    if not len(copies):
        return f"No two pictures have a cosine of at least {threshold:g}, so there are no near-duplicates."
    return (
        f"{counted(len(copies), 'group')} of near-duplicates (cosine of at least {threshold:g}) with "
        f"{counted(int(copies.sum()))}: each in one part."
    )


def _far_off(shares: dict[str, float], counts: np.ndarray, together: np.ndarray, group_by: str | None) -> list[str]:
    """Returns a sentence for each part that is empty, or far from the size asked for."""
    largest = int(np.bincount(together).max())
    why = f"{counted(largest)} that are near-duplicates" + (f" or have the same {group_by}" if group_by else "")
    lines = []
    for (name, share), count in zip(shares.items(), counts.tolist(), strict=True):
        asked = share * len(together)
        if count and abs(count - asked) <= max(1.0, FAR * asked):
            continue
        because = f"the largest group that stays together has {why}" if largest > 1 else "there are too few pictures"
        lines.append(f"{name} has {counted(count)} instead of {round(asked, 1):,g}: {because}.")
    return lines


def _missing(labels: Sequence[str | None], parts: np.ndarray, names: list[str], together: np.ndarray) -> list[str]:
    """Returns a sentence for each label, of the first MOST_NAMED, that is not in every part."""
    counts = Counter(label for label in labels if label is not None)
    found: dict[str, tuple[set[int], set[int]]] = {label: (set(), set()) for label in sorted(counts)}
    for label, part, one in zip(labels, parts.tolist(), together.tolist(), strict=True):
        if label is not None:
            found[label][0].add(part)
            found[label][1].add(one)
    lines = []
    for label, (there, groups) in found.items():
        if missing := [name for part, name in enumerate(names) if part not in there]:
            count = counts[label]
            why = f"it is the label of {counted(count)}"
            why += ", fewer than the parts" if count < len(names) else ""
            why += f", in {counted(len(groups), 'group')}" if len(groups) < count else ""
            lines.append(f"No {label} in {' and '.join(missing)}: {why}.")
    more = len(lines) - MOST_NAMED
    return [*lines[:MOST_NAMED], *([f"And so for {counted(more, 'more label')}."] if more > 0 else [])]
