"""Dividing a collection into parts such as train and test: `split.py` with what a collection knows of its pictures.
Near-duplicates are in the same part."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from serving.collection.index import Index
from serving.collection.items import Item
from serving.curation.items import values_of
from serving.curation.split import divide, links_of, sets
from serving.derived.duplicates import Begin, near_duplicates, pairs_among
from serving.protocol.filters import Filter
from serving.protocol.shown import counted

FAR = 0.1  # of the size asked for: a part that is farther from it is named
MOST_NAMED = 10  # labels that are not in each part


class TooFewToDivide(Exception):
    """There are fewer pictures than parts; the argument is their number."""


@dataclass(frozen=True)
class SplitItems:
    items: list[Item]
    """In the order of their ids."""
    parts: list[str]
    """The name of each one's part."""
    sizes: dict[str, int]
    """Number of items in each part."""
    copies: list[list[Item]]
    """Groups of near-duplicates, which are in one part, the largest first."""
    threshold: float
    """Lowest cosine of near-duplicates."""
    notes: list[str]
    """A sentence for each part that is far from its size, and for labels that are not in every part."""


def split_items(
    index: Index,
    shares: Mapping[str, float],
    where: Filter | None = None,
    group_by: str | None = None,
    threshold: float | None = None,
    seed: int = 0,
    begin: Begin | None = None,
) -> SplitItems:
    """Divide the items; nothing is changed.

    shares     of the parts by name, each above 0, 1 together
    where      divide only these
    group_by   a metadata key, or label: items with the same value of it are in the same part
    threshold  lowest cosine of near-duplicates, above 0 and at most 1; by default the collection's own
    seed       another one gives another split
    begin      as near_duplicates
    raises     TooFewToDivide, NoValues, IndexProblem, DerivedProblem
    """
    items = sorted((item for page, _ in index.scan(where) for item in page), key=lambda item: item.id)
    if len(items) < len(shares):
        raise TooFewToDivide(len(items))
    links = [] if group_by is None else [links_of(values_of(items, group_by))]
    result, threshold = near_duplicates(index, threshold, begin)
    near = pairs_among(result.arrays, threshold, [item.id for item in items])[:2]
    together = sets(len(items), [near, *links])
    balanced = [None if group_by == "label" else item.label for item in items]
    parts = divide(together, balanced, list(shares.values()), seed)
    names = list(shares)
    sizes = dict(zip(names, np.bincount(parts, minlength=len(names)).tolist(), strict=True))
    groups: dict[int, list[Item]] = {}
    for item, group in zip(items, sets(len(items), [near]).tolist(), strict=True):
        groups.setdefault(group, []).append(item)
    copies = sorted((group for group in groups.values() if len(group) > 1), key=len, reverse=True)
    notes = [*_far_off(shares, sizes, together, group_by), *_missing(balanced, parts, names, together)]
    return SplitItems(items, [names[part] for part in parts], sizes, copies, threshold, notes)


def _far_off(
    shares: Mapping[str, float], sizes: Mapping[str, int], together: np.ndarray, group_by: str | None
) -> list[str]:
    """Returns a sentence for each part that is empty, or far from the size asked for."""
    largest = int(np.bincount(together).max())
    why = f"{counted(largest)} that are near-duplicates" + (f" or have the same {group_by}" if group_by else "")
    lines = []
    for name, share in shares.items():
        count, asked = sizes[name], share * len(together)
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
