"""Filters: which rows of a collection a search returns.

In JSON, as the service takes it:   {"label": "shirt", "price": {"gte": 3, "lt": 9}, "colour": {"in": ["red", "blue"]}}
In a shell, `--where`:              label=shirt price>=3 price<9 colour=red,blue brand!=acme year=null
On the page, a list:                ["label=shirt", "price >= 3", "name=a b", "part of a name"]

All conditions must hold. In JSON a bare value means equality, and null means "has no value". A row without the key
differs from every value (`ne`); it is never above, below, or in a list without null, and contains no text. `contains`
ignores case.

Only in JSON, "$or" has a list of filters of which at least one must hold, and "$not" a filter that must not hold:

    {"year": {"gte": 2020}, "$or": [{"label": "shirt"}, {"name": {"contains": "dress"}}], "$not": {"sold": true}}

    filter     = {key: value | {operator: value, ...}, "$or": [filter, ...], "$not": filter}, all members optional
    operator   = eq | ne | gt | gte | lt | lte | in | contains

Typed values: numbers, true, false and null are read as such; everything else is text, and so is anything in double
quotes: sku="42". An item's id, name, label and path are always text. In --where conditions are separated by blanks, so
a value with blanks needs quotes: name="a b". On the page it does not.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from serving.protocol.shown import shown

BASE = {"id": str, "name": str, "label": str, "path": str, "width": int, "height": int, "bytes": int}
TEXTS = ("id", "name", "label", "path")
KEY = re.compile(r"[^\W\d]\w{0,63}")  # letters of all languages, digits and _
MOST_VALUES = 10_000  # in one list
MOST_CONDITIONS = 100  # in one filter; the SQL of thousands would overflow a stack
MOST_DEPTH = 8  # of filters within filters
OR, NOT = "$or", "$not"  # no keys, which have no $

Value = str | int | float | bool | None


class FilterProblem(ValueError):
    """A filter that is not valid. The message names the key and the value."""


@dataclass(frozen=True)
class Operator:
    key: str
    """Its name in a JSON filter."""
    sign: str
    """Its sign in typed conditions; empty for an operator without one."""
    sql: str
    """The SQL condition, with {column} and {value}."""
    null: str = ""
    """The SQL condition for null, with {column}; empty for operators that compare by order, since null has none."""
    takes_list: bool = False
    texts_only: bool = False


OPERATORS = {
    operator.key: operator
    for operator in (
        Operator("eq", "=", "{column} = {value}", "{column} IS NULL"),
        Operator("ne", "!=", "{column} <> {value} OR {column} IS NULL", "{column} IS NOT NULL"),
        Operator("gt", ">", "{column} > {value}"),
        Operator("gte", ">=", "{column} >= {value}"),
        Operator("lt", "<", "{column} < {value}"),
        Operator("lte", "<=", "{column} <= {value}"),
        Operator("in", "", "{column} IN ({value})", "{column} IS NULL", takes_list=True),  # typed as key=value,value
        Operator("contains", "~", "contains(lower({column}), lower({value}))", texts_only=True),
    )
}
_SIGNS = {operator.sign: operator.key for operator in OPERATORS.values() if operator.sign}

_SIGN = "|".join(re.escape(sign) for sign in sorted(_SIGNS, key=len, reverse=True))
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_PLAIN = r'[^\s,"]+'
_VALUE = rf"(?:{_QUOTED}|{_PLAIN})"
_IN_SHELL = re.compile(rf"\s*([^\W\d]\w*)({_SIGN})({_VALUE}(?:,{_VALUE})*)(?=\s|$)")
_ON_PAGE = re.compile(rf"\s*([^\W\d]\w*)\s*({_SIGN})\s*(.*\S)\s*")
_WORDS = r"[^=<>!~]+"  # without a sign: a part of a name
_PAGE_VALUE = re.compile(rf"\s*({_QUOTED}|[^,]+)")


@dataclass(frozen=True)
class Filter:
    """Conditions that must all hold: (key, operator, values); only an operator that takes a list has several values.

    either   groups of filters; of each group at least one must hold
    without  filters that must not hold
    """

    conditions: tuple[tuple[str, Operator, tuple[Value, ...]], ...]
    either: tuple[tuple["Filter", ...], ...] = ()
    without: tuple["Filter", ...] = ()

    @classmethod
    def parse(cls, query: Mapping) -> "Filter":
        """Returns the filter of a decoded JSON object. Raises FilterProblem."""
        parsed = cls._parse(query, 1)
        if (count := parsed._size()) > MOST_CONDITIONS:
            raise FilterProblem(f"The filter has {count:,} conditions; the limit is {MOST_CONDITIONS}.")
        if (count := sum(len(values) for _, _, values in parsed._all_conditions())) > MOST_VALUES:
            raise FilterProblem(f"The filter has {count:,} values; the limit is {MOST_VALUES:,}.")
        return parsed

    @classmethod
    def _parse(cls, query: Mapping, depth: int) -> "Filter":
        if not isinstance(query, Mapping):
            raise FilterProblem(f"A filter is an object of keys and values, not {shown(query)}.")
        if depth > MOST_DEPTH:
            raise FilterProblem(f"The filter has more than {MOST_DEPTH} filters within each other.")
        conditions, either, without = [], [], []
        for key, bounds in query.items():
            if key == OR:
                if not isinstance(bounds, (list, tuple)) or not bounds:
                    raise FilterProblem(f"{OR} needs a list of filters, not {shown(bounds)}.")
                either.append(tuple(cls._parse(one, depth + 1) for one in bounds))
                continue
            if key == NOT:
                without.append(cls._parse(bounds, depth + 1))
                continue
            if not isinstance(key, str) or not KEY.fullmatch(key):
                raise FilterProblem(f"{shown(key)} is not a key: letters, digits and _, at most 64.")
            if isinstance(bounds, Mapping) and not bounds:
                raise FilterProblem(f"The filter on {key} is empty.")
            for operator, value in (bounds if isinstance(bounds, Mapping) else {"eq": bounds}).items():
                conditions.append(_condition(key, operator, value))
        return cls(tuple(conditions), tuple(either), tuple(without))

    @property
    def keys(self) -> set[str]:
        return {key for key, _, _ in self._all_conditions()}

    def values(self) -> list[tuple[str, Value]]:
        """Returns (key, value) of every comparison except those with null."""
        return [(key, value) for key, _, values in self._all_conditions() for value in values if value is not None]

    def sql(self, columns: Mapping[str, str] = {}) -> str:
        """Returns the SQL condition; "true" for no condition. `columns`: column names, where they differ from keys."""
        parts = [_sql(columns.get(key, key), operator, values) for key, operator, values in self.conditions]
        parts += [f"({' OR '.join(f'({one.sql(columns)})' for one in group)})" for group in self.either]
        parts += [f"(({one.sql(columns)}) IS NOT TRUE)" for one in self.without]  # NOT of null would be null
        return " AND ".join(parts) or "true"

    def _size(self) -> int:
        """Number of conditions. An empty filter inside another is one, as it becomes a part of the SQL too."""
        inner = (*(one for group in self.either for one in group), *self.without)
        return len(self.conditions) + sum(max(1, one._size()) for one in inner)

    def _all_conditions(self) -> Iterator[tuple[str, Operator, tuple[Value, ...]]]:
        yield from self.conditions
        for inner in (*(one for group in self.either for one in group), *self.without):
            yield from inner._all_conditions()


def parse_shell(text: str) -> Filter:
    """Returns the filter of the option --where: typed conditions or a JSON object. Raises FilterProblem."""
    if text.lstrip().startswith("{"):
        try:
            query = json.loads(text)
        except ValueError as error:
            raise FilterProblem(f"--where {text} is not valid JSON: {error}") from error
        return Filter.parse(query)
    query: dict[str, dict] = {}
    rest = text
    while rest.strip():
        if not (match := _IN_SHELL.match(rest)):
            raise FilterProblem(f"--where: {rest.strip()} is not a condition like label=shirt or price>=3")
        key, sign, values = match.groups()
        typed = re.findall(_VALUE, values)
        if len(typed) > 1 and sign != "=":
            raise FilterProblem(f"--where: {match[0].strip()} compares with several values; only = can do that")
        operator, value = _typed(key, sign, typed)
        if operator in query.setdefault(key, {}):
            raise FilterProblem(f"--where uses {key}{sign} twice; to allow several values write {key}=a,b")
        query[key][operator] = value
        rest = rest[match.end() :]
    if not query:
        raise FilterProblem("--where is empty; leave it out to select all items")
    return Filter.parse(query)


def parse_conditions(conditions: Sequence[str]) -> dict[str, dict] | None:
    """Returns the JSON filter of conditions typed on the page, None if there are none. Text without a sign is a part of
    the name. Several values that one key may equal are alternatives, in one condition or in several. Raises
    FilterProblem, which names the condition."""
    query: dict[str, dict] = {}
    for condition in conditions:
        match = _ON_PAGE.fullmatch(condition)
        if match is None and not (condition.strip() and re.fullmatch(_WORDS, condition)):
            raise _no_condition(condition)
        key, sign, values = match.groups() if match else ("name", "~", json.dumps(condition.strip()))
        typed = [value for value in map(str.strip, _PAGE_VALUE.findall(values)) if value]
        if not typed or (len(typed) > 1 and sign != "="):
            raise _no_condition(condition)
        if any(value[0] == '"' and not re.fullmatch(_QUOTED, value) for value in typed):
            raise _no_condition(condition)
        operator, value = _typed(key, sign, typed)
        try:
            Filter.parse({key: {operator: value}})
        except FilterProblem as error:
            raise _no_condition(condition) from error
        bounds = query.setdefault(key, {})
        if operator in ("eq", "in"):
            bounds["in"] = [*bounds.get("in", []), *(value if isinstance(value, list) else [value])]
        elif bounds.setdefault(operator, value) != value:
            raise FilterProblem(f"{condition} sets a second limit of the same kind; remove one of them.")
    return query or None


def quoted(value: str) -> str:
    """Returns the text as it is typed: in double quotes if it has blanks, commas or quotes."""
    return value if re.fullmatch(_PLAIN, value) else json.dumps(value, ensure_ascii=False)


def typed_equality(key: str, value: str | int | float | bool) -> str:
    """Returns the typed condition that `key` equals `value`. Both parsers above read it back unchanged."""
    if isinstance(value, str) and _read(key, quoted(value)) == value:
        return f"{key}={quoted(value)}"
    return f"{key}={json.dumps(value)}"


def literal(value: Value) -> str:
    """Returns a value as SQL."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return repr(value)


def _typed(key: str, sign: str, values: Sequence[str]) -> tuple[str, Value | list[Value]]:
    """Returns the operator's key and the value, or the list of values, of one typed condition."""
    read = [_read(key, value) for value in values]
    return ("in", read) if len(read) > 1 else (_SIGNS[sign], read[0])


def _read(key: str, typed: str) -> Value:
    """Returns the value that a typed word means."""
    if typed[0] != '"' and (not re.fullmatch(_PLAIN, typed) or (key in TEXTS and typed != "null")):
        return typed
    try:
        return json.loads(typed, parse_constant=str)
    except ValueError:
        return typed


def _no_condition(condition: str) -> FilterProblem:
    return FilterProblem(f"{condition} is not a condition like label=shirt, price>=3 or colour=red,blue.")


def _sql(column: str, operator: Operator, values: tuple[Value, ...]) -> str:
    name = f"`{column}`"
    if any(isinstance(value, float) for value in values):
        name = f"CAST({name} AS DOUBLE)"  # Lance refuses to compare a column of whole numbers with 3.5
    parts = []
    if present := [literal(value) for value in values if value is not None]:
        parts.append(operator.sql.format(column=name, value=", ".join(present)))
    if None in values:
        parts.append(operator.null.format(column=name))
    return f"({' OR '.join(parts)})" if parts else "false"


def _condition(key: str, operator: str, value: object) -> tuple[str, Operator, tuple[Value, ...]]:
    """Returns the checked condition of one operator of a JSON filter. Raises FilterProblem."""
    if operator not in OPERATORS:
        known = ", ".join(OPERATORS)
        raise FilterProblem(f"The filter on {key} has an unknown operator {shown(operator)}; known are {known}.")
    checked = OPERATORS[operator]
    if not checked.takes_list:
        return key, checked, (_scalar(key, checked, value),)
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise FilterProblem(f"The filter `{operator}` on {key} needs a list, not {shown(value)}.")
    if len(value) > MOST_VALUES:
        raise FilterProblem(
            f"The filter `{operator}` on {key} has {len(value):,} values; the limit is {MOST_VALUES:,}."
        )
    return key, checked, tuple(_scalar(key, checked, one) for one in value)


def _scalar(key: str, operator: Operator, value: object) -> Value:
    compares = f"The filter on {key} compares with {shown(value)}"
    good = isinstance(value, (str, int, float)) or value is None
    if not good or (isinstance(value, float) and not math.isfinite(value)):
        raise FilterProblem(f"{compares}; only text, finite numbers, true, false and null are allowed.")
    if operator.texts_only and not isinstance(value, str):
        raise FilterProblem(f"{compares} by `{operator.key}`, which needs text.")
    if not operator.null and (value is None or isinstance(value, bool)):
        raise FilterProblem(f"{compares} by `{operator.key}`, which needs text or a number.")
    if isinstance(value, int) and not abs(value) < 2**63:
        raise FilterProblem(f"{compares}, which does not fit in 64 bits.")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise FilterProblem(f"{compares}, which is not valid text.") from None
    return value
