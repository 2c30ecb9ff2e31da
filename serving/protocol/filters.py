"""Which rows of a collection a search keeps.

    {"label": "shirt", "price": {"gte": 3, "lt": 9}, "colour": {"in": ["red", "blue"]}, "note": null}

All must hold. A bare value is equality, null is "has none". A row without the key differs from every value (`ne`) and
is never above, below, or in a list that does not name null.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

BASE = {"id": str, "name": str, "label": str, "path": str, "width": int, "height": int, "bytes": int}
OPERATORS = {"eq": "=", "ne": "<>", "gt": ">", "gte": ">=", "lt": "<", "lte": "<=", "in": "IN"}
KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
MOST_VALUES = 10_000  # of one `in`

Value = str | int | float | bool | None


class FilterProblem(ValueError):
    """A filter that cannot be meant. The message names key and value."""


@dataclass(frozen=True)
class Filter:
    """Conditions (key, operator, value), of which all hold; of `in` the value is a tuple."""

    conditions: tuple[tuple[str, str, Value | tuple[Value, ...]], ...]

    @classmethod
    def parse(cls, given: Mapping) -> "Filter":
        if not isinstance(given, Mapping):
            raise FilterProblem(f"A filter is an object of keys and values, not {_shown(given)}.")
        found = []
        for key, wanted in given.items():
            if not isinstance(key, str) or not KEY.fullmatch(key):
                raise FilterProblem(f"{_shown(key)} is no key: letters, digits and _, at most 64.")
            if isinstance(wanted, Mapping) and not wanted:
                raise FilterProblem(f"The filter on {key} is empty.")
            for operator, value in (wanted if isinstance(wanted, Mapping) else {"eq": wanted}).items():
                found.append((key, operator, _checked(key, operator, value)))
        return cls(tuple(found))

    @property
    def keys(self) -> set[str]:
        return {key for key, _, _ in self.conditions}

    def values(self) -> list[tuple[str, Value]]:
        """(key, value) of all comparisons, null left out."""
        flat = ((key, one) for key, _, value in self.conditions for one in (value if _many(value) else (value,)))
        return [(key, one) for key, one in flat if one is not None]

    def sql(self, columns: Mapping[str, str] = {}) -> str:
        """For LanceDB; "true" where there is no condition. `columns`: the table's names for keys, where they differ."""
        return " AND ".join(_sql(columns.get(key, key), *rest) for key, *rest in self.conditions) or "true"


def literal(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return repr(value)


def _sql(column: str, operator: str, value) -> str:
    name = f"`{column}`"
    if any(isinstance(one, float) for one in (value if _many(value) else (value,))):
        name = f"CAST({name} AS DOUBLE)"  # Lance refuses 3.5 beside a column of whole numbers
    if operator == "in":
        listed = ", ".join(literal(one) for one in value if one is not None)
        parts = ([f"{name} IN ({listed})"] if listed else []) + ([f"{name} IS NULL"] if None in value else [])
        return f"({' OR '.join(parts)})" if parts else "false"
    if value is None:
        return f"{name} IS {'NOT ' if operator == 'ne' else ''}NULL"
    if operator == "ne":
        return f"({name} <> {literal(value)} OR {name} IS NULL)"
    return f"{name} {OPERATORS[operator]} {literal(value)}"


def _checked(key: str, operator: str, value):
    if operator not in OPERATORS:
        raise FilterProblem(
            f"The filter on {key} has no operator {_shown(operator)}; there are {', '.join(OPERATORS)}."
        )
    if operator != "in":
        return _scalar(key, value, orders=operator in ("gt", "gte", "lt", "lte"))
    if not _many(value):
        raise FilterProblem(f"The filter `in` on {key} wants a list, not {_shown(value)}.")
    if len(value) > MOST_VALUES:
        raise FilterProblem(
            f"The filter `in` on {key} has {len(value):,} values; at most {MOST_VALUES:,} are compared."
        )
    return tuple(_scalar(key, one) for one in value)


def _scalar(key: str, value, orders: bool = False) -> Value:
    good = isinstance(value, (str, int, float)) or value is None
    if not good or (isinstance(value, float) and not math.isfinite(value)):
        raise FilterProblem(
            f"The filter on {key} compares with {_shown(value)}; text, numbers, true, false, null can be."
        )
    if orders and (value is None or isinstance(value, bool)):
        raise FilterProblem(f"The filter on {key} orders by {_shown(value)}; text and numbers have an order.")
    if isinstance(value, int) and not abs(value) < 2**63:
        raise FilterProblem(f"The filter on {key} compares with {value}, which is more than 64 bits.")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise FilterProblem(f"The filter on {key} compares with {_shown(value)}, which is no text.") from None
    return value


def _many(value) -> bool:
    return isinstance(value, (list, tuple, set, frozenset))


def _shown(value) -> str:
    return ascii(value)[:80]
