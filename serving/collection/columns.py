"""Columns of other programs' tables as metadata: which can be kept, under which keys, with which values.

unit price, sku-id, größe     the keys unit_price, sku_id and größe
null, NaN, infinite numbers   the item has no value
dates, times, durations       text, in ISO 8601 except durations
lists, structs, bytes         left out
"""

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.types as types

from serving.protocol.filters import KEY

LONGEST = 64  # characters of a key
PANDAS_INDEX = re.compile(r"__index_level_\d+__")
KINDS = (  # the first test that holds
    (str, (types.is_string, types.is_large_string, types.is_string_view)),
    (str, (types.is_timestamp, types.is_date, types.is_time, types.is_duration)),
    (bool, (types.is_boolean,)),
    (int, (types.is_integer,)),
    (float, (types.is_floating, types.is_decimal)),
)
KIND_NAMES = {str: "text", int: "whole numbers", float: "numbers", bool: "true and false"}


class ColumnProblem(ValueError):
    """Columns that cannot be told apart as metadata. The message names them."""


@dataclass(frozen=True)
class MetadataColumns:
    keys: dict[str, str]
    """The key of each column that is kept."""
    kinds: dict[str, type]
    """The type of the values of each key."""
    left_out: dict[str, str]
    """The type of each column that cannot be metadata."""

    @property
    def notes(self) -> list[str]:
        """What a user should know, in sentences."""
        renamed = [f"{column} as {key}" for column, key in self.keys.items() if column != key]
        dropped = [f"{column} ({kind})" for column, kind in self.left_out.items()]
        stored = [f"stored under other names: {', '.join(renamed)}"] if renamed else []
        return stored + ([f"left out: {', '.join(dropped)}"] if dropped else [])

    def values(self, row: dict[str, Any]) -> dict[str, str | int | float | bool]:
        """The metadata of a row."""
        values = {key: value_of(row[column]) for column, key in self.keys.items()}
        return {key: value for key, value in values.items() if value is not None}


def metadata_columns(schema: pa.Schema, names: Iterable[str], prefix: str = "") -> MetadataColumns:
    """prefix  is left out of the keys.  Raises ColumnProblem."""
    keys: dict[str, str] = {}
    kinds: dict[str, type] = {}
    left_out: dict[str, str] = {}
    for name in names:
        if PANDAS_INDEX.fullmatch(name):
            continue
        kind = _kind(schema.field(name).type)
        if kind is None:
            if not types.is_null(schema.field(name).type):
                left_out[name] = str(schema.field(name).type)
            continue
        key = key_of(name.removeprefix(prefix))
        if key in kinds:
            other = next(column for column, used in keys.items() if used == key)
            raise ColumnProblem(f"the columns {other} and {name} would both be the metadata {key}; rename one of them")
        keys[name], kinds[key] = key, kind
    return MetadataColumns(keys, kinds, left_out)


def refuse_twins(names: Sequence[str]) -> None:
    """Raises ColumnProblem when a table has two columns of the same name."""
    if twin := next((name for name in names if names.count(name) > 1), None):
        raise ColumnProblem(f"there are {names.count(twin)} columns {twin}; rename one of them")


def python_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows as Python values. Raises ColumnProblem for dates that Python does not know."""
    try:
        return batch.to_pylist()
    except (OverflowError, ValueError, LookupError) as error:
        for name in batch.schema.names:
            try:
                batch[name].to_pylist()
            except (OverflowError, ValueError, LookupError):
                kind = batch.schema.field(name).type
                raise ColumnProblem(f"a value of the column {name} ({kind}) is no date that can be read") from error
        raise


def key_of(name: str) -> str:
    """The key for a column of this name: letters of all languages, digits and _."""
    key = re.sub(r"\W+", "_", unicodedata.normalize("NFC", name).strip())[:LONGEST]
    return key if KEY.fullmatch(key) else f"_{key}"[:LONGEST]


def value_of(value: Any) -> str | int | float | bool | None:
    """A value as metadata; None if there is none."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if hasattr(value, "isoformat"):
        return value.isoformat()
    try:
        number = float(value)
    except (TypeError, ValueError):  # a duration, bytes
        return str(value)
    return number if math.isfinite(number) else None


def _kind(of: pa.DataType) -> type | None:
    if types.is_dictionary(of):
        of = of.value_type
    return next((kind for kind, tests in KINDS if any(test(of) for test in tests)), None)
