"""The keys that the items of a collection can be filtered by, with their commonest values."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute

from serving.protocol.replies import Key, KeyType

compute: Any = pyarrow.compute  # makes its functions when it is imported, so type checkers do not know them

COMMONEST = 20  # most values listed for each key
ROWS = 1_000_000  # most rows to read; of a larger collection the first ones
KINDS: dict[type, KeyType] = {str: "text", bool: "truth", int: "whole", float: "number"}


def summary(rows: pa.Table, columns: Mapping[str, tuple[str, type]]) -> list[Key]:
    """Returns the keys that at least one row has. columns: (column of the table, type of its values) by key."""
    keys = []
    for key, (name, kind) in columns.items():
        values = rows[name].drop_null()
        if not len(values):
            continue
        counts = compute.value_counts(values)
        top = counts.take(compute.select_k_unstable(counts.field("counts"), COMMONEST, [("", "descending")]))
        commonest = [(count["values"], count["counts"]) for count in top.to_pylist()]
        ends = {}
        if kind in (int, float):
            least_most = compute.min_max(values).as_py()
            median = compute.quantile(values, 0.5)[0].as_py()
            ends = {"least": least_most["min"], "median": median, "most": least_most["max"]}
        keys.append(Key(key, KINDS[kind], len(counts), commonest, **ends))
    return keys
