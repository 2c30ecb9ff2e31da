"""A filter as it is typed in a shell.

    label=shirt  price>=3 price<9  colour=red,blue  brand!=acme  year=null

Conditions between spaces, all of which must hold; of values between commas, one. A number, true, false and null mean
themselves, and everything else is text; so is what stands in double quotes, as in sku="42" or name="a b". An item's id,
name, label and path are always text. What this cannot say is said in JSON, as the service takes it:
{"price": {"gte": 3, "lt": 9}}.
"""

import json
import re

from serving.protocol.filters import Filter, FilterProblem

VALUE = r'(?:"(?:[^"\\]|\\.)*"|[^\s,"]+)'
CONDITION = re.compile(rf"\s*([A-Za-z_]\w*)(>=|<=|!=|=|>|<)({VALUE}(?:,{VALUE})*)(?=\s|$)")
OPERATORS = {"=": "eq", "!=": "ne", ">": "gt", ">=": "gte", "<": "lt", "<=": "lte"}
TEXTS = ("id", "name", "label", "path")


def parse(typed: str) -> Filter:
    """raises FilterProblem"""
    if typed.lstrip().startswith("{"):
        try:
            return Filter.parse(json.loads(typed))
        except ValueError as error:
            if isinstance(error, FilterProblem):
                raise
            raise FilterProblem(f"--where {typed} is no JSON: {error}") from error
    conditions: dict[str, dict] = {}
    rest = typed
    while rest.strip():
        if not (found := CONDITION.match(rest)):
            raise FilterProblem(f"--where: {rest.strip()} is no condition such as label=shirt or price>=3")
        key, sign, values = found.groups()
        operator, value = OPERATORS[sign], [_value(key, one) for one in re.findall(VALUE, values)]
        if len(value) > 1 and operator != "eq":
            raise FilterProblem(f"--where: {found[0].strip()} compares with several values; only = does")
        operator, value = ("in", value) if len(value) > 1 else (operator, value[0])
        if operator in conditions.setdefault(key, {}):
            raise FilterProblem(f"--where names {key}{sign} twice; what may be one of several is {key}=a,b")
        conditions[key][operator] = value
        rest = rest[found.end() :]
    if not conditions:
        raise FilterProblem("--where is empty; leave it out for all items")
    return Filter.parse(conditions)


def _value(key: str, typed: str) -> str | int | float | bool | None:
    if key in TEXTS and typed != "null" and not typed.startswith('"'):
        return typed
    try:
        return json.loads(typed, parse_constant=str)
    except ValueError:
        return typed
